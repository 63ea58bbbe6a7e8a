"""Paths from data to noise: x_t = alpha(t) x + sigma(t) eps.

t = 0 is data and t = 1 is noise, here and everywhere. A new path is a new
`Path`: four functions of t, and nothing else has to learn of it.
"""

# Shape suffixes: B batch. x, eps and what is made of them have any shape that
# starts with that of t: t is one number, or one per example.

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
  noise, and `log_snr_inverse` gives t back. Between `low` and `high` all of
  them, and the velocity, are finite; training and sampling stay there.
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

  @property
  def prior_scale(self) -> float:
    """The standard deviation of the noise from which sampling starts."""
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


def straight() -> Path:
  """Builds x_t = (1 - t) x + t eps, whose velocity eps - x is constant in t.

  Rectified flow (arXiv:2209.03003), in the direction of SD3 (arXiv:2403.03206,
  section 3).
  """
  return Path(
    name="straight",
    alpha=lambda t: 1.0 - t,
    sigma=lambda t: t,
    alpha_dot=lambda t: -jnp.ones_like(t),
    sigma_dot=lambda t: jnp.ones_like(t),
    log_snr=lambda t: 2.0 * (jnp.log1p(-t) - jnp.log(t)),
    log_snr_inverse=lambda log_snr: jax.nn.sigmoid(-0.5 * log_snr),
  )


# Paths by the name that a config gives them.
PATHS: dict[str, Callable[[], Path]] = {"straight": straight}


def over(t: jax.Array, x: jax.Array) -> jax.Array:
  """Gives `t`, one number or one per example, trailing dims to multiply x."""
  t = jnp.asarray(t)
  return t.reshape(t.shape + (1,) * (x.ndim - t.ndim))


def wide(x: jax.Array) -> jax.Array:
  """Casts half precision to float32, and leaves what is wider alone."""
  return x.astype(jnp.promote_types(x.dtype, jnp.float32))
