"""What a path is: two coefficients of t, and what a network may ask of them."""

# x, eps and what is made of them have any shape that starts with that of t: t
# is one number, or one per example.

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

Schedule = Callable[[jax.Array], jax.Array]


class Coefficients(NamedTuple):
  """A path at given times, shaped to multiply x."""

  alpha: jax.Array
  sigma: jax.Array
  alpha_dot: jax.Array
  sigma_dot: jax.Array


@dataclasses.dataclass(frozen=True)
class Path:
  """An affine path, with the derivatives of its coefficients in t.

  `log_snr` is lambda(t) = log(alpha^2 / sigma^2), which falls from data to
  noise, and `log_snr_inverse` gives t back; lambda is infinite where sigma or
  alpha vanishes. Between `low` and `high` the coefficients, their derivatives
  and so the velocity are finite; training and sampling stay there. Outside,
  the functions hold the value of the nearest time at which they are defined:
  nothing is ever nan. `steps` is the length N of the table that a discrete path
  was made of, entry i (from 0) being t = (i + 1) / N.
  """

  name: str
  alpha: Schedule
  sigma: Schedule
  alpha_dot: Schedule
  sigma_dot: Schedule
  log_snr: Schedule
  log_snr_inverse: Schedule
  low: float = 0.0
  high: float = 1.0
  steps: int | None = None

  @property
  def prior_scale(self) -> float:
    """The standard deviation of the noise from which sampling starts."""
    with jax.ensure_compile_time_eval():
      return float(self.sigma(jnp.asarray(self.high)))

  def at(self, t: jax.Array, x: jax.Array) -> Coefficients:
    """Returns the coefficients at `t`, in at least float32 and shaped for x."""
    t = jnp.asarray(t, wide(x).dtype)
    schedules = (self.alpha, self.sigma, self.alpha_dot, self.sigma_dot)
    return Coefficients(*(over(schedule(t), x) for schedule in schedules))

  def interpolate(
    self, x: jax.Array, eps: jax.Array, t: jax.Array
  ) -> jax.Array:
    """Returns x_t = alpha x + sigma eps."""
    c = self.at(t, x)
    return c.alpha * x + c.sigma * eps

  def velocity(self, x: jax.Array, eps: jax.Array, t: jax.Array) -> jax.Array:
    """Returns d x_t / dt = alpha' x + sigma' eps."""
    c = self.at(t, x)
    return c.alpha_dot * x + c.sigma_dot * eps


def narrowed(
  path: Path, *, low: float | None = None, high: float | None = None
) -> Path:
  """Keeps training and sampling within [low, high], a part of the path's own.

  SiT stays 1e-3 away from both ends of its straight path if its network
  predicts noise or score (arXiv:2401.08740).
  """
  low = path.low if low is None else low
  high = path.high if high is None else high
  check(
    path.low <= low < high <= path.high,
    f"The path {path.name!r} goes from t = {path.low} to {path.high}: it "
    f"cannot be narrowed to [{low}, {high}].",
  )
  return dataclasses.replace(path, low=low, high=high)


def over(t: jax.Array, x: jax.Array) -> jax.Array:
  """Gives `t`, one number or one per example, trailing dims to multiply x."""
  t = jnp.asarray(t)
  return t.reshape(t.shape + (1,) * (x.ndim - t.ndim))


def wide(x: jax.Array) -> jax.Array:
  """Casts half precision to float32, and leaves what is wider alone."""
  return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def build(
  name: str,
  *,
  alpha: Schedule,
  sigma: Schedule,
  alpha_dot: Schedule,
  sigma_dot: Schedule,
  log_snr: Schedule,
  log_snr_inverse: Schedule,
  low: float = 0.0,
  high: float = 1.0,
  steps: int | None = None,
) -> Path:
  """Builds a path whose functions hold their values outside of their range.

  Coefficients and lambda are defined on [0, 1], derivatives on [low, high].
  """

  def inside(schedule: Schedule, low: float, high: float) -> Schedule:
    return lambda t: schedule(clip(wide(jnp.asarray(t)), low, high))

  return Path(
    name=name,
    alpha=inside(alpha, 0.0, 1.0),
    sigma=inside(sigma, 0.0, 1.0),
    alpha_dot=inside(alpha_dot, low, high),
    sigma_dot=inside(sigma_dot, low, high),
    log_snr=inside(log_snr, 0.0, 1.0),
    log_snr_inverse=lambda log_snr: clip(
      log_snr_inverse(wide(jnp.asarray(log_snr))), 0.0, 1.0
    ),
    low=low,
    high=high,
    steps=steps,
  )


def clip(t: jax.Array, low: float, high: float) -> jax.Array:
  """Clips t, with derivative 1, not 1/2 as jnp.clip, at the very bounds."""
  return jnp.where(t < low, low, jnp.where(t > high, high, t))


def circle(log_snr: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns (alpha, sigma) of this lambda with alpha^2 + sigma^2 = 1."""
  alpha = jnp.exp(0.5 * jax.nn.log_sigmoid(log_snr))
  return alpha, jnp.exp(0.5 * jax.nn.log_sigmoid(-log_snr))


def other_leg(leg: jax.Array) -> jax.Array:
  """Returns sqrt(1 - leg^2)."""
  return jnp.sqrt((1.0 - leg) * (1.0 + leg))


def root(x: jax.Array) -> jax.Array:
  """Returns sqrt(x), with derivative 0 instead of infinity at 0."""
  return jnp.where(x > 0.0, jnp.sqrt(jnp.where(x > 0.0, x, 1.0)), 0.0)


def check(sound: bool, message: str) -> None:
  """Raises ValueError unless an option of a path is sound."""
  if not sound:
    raise ValueError(message)
