"""Laws of t for training, the resolution shift, and grids for solvers.

A law is its quantile function: t = quantile(u) with u uniform on (0, 1). So a
law is sampled, shifted or stratified without knowing which one it is.
"""

# Times have any shape; t = 0 is data and t = 1 is noise.

import dataclasses
import math
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
import jax.scipy.special
import numpy as np

Time = TypeVar("Time", float, np.ndarray, jax.Array)

# Half the spacing of jax's uniform numbers in float32. Added to them it makes
# them symmetric about 1/2, exact still, and never 0 or 1.
_HALF_STEP = 2.0**-24


@dataclasses.dataclass(frozen=True)
class TimeLaw:
  """A distribution on (0, 1): its quantile function and its density."""

  quantile: Callable[[jax.Array], jax.Array]
  density: Callable[[jax.Array], jax.Array]

  def sample(self, rng: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Draws times in float32."""
    u = jax.random.uniform(rng, shape, jnp.float32) + _HALF_STEP
    return self.quantile(u)


def uniform() -> TimeLaw:
  """Builds the uniform law."""
  return TimeLaw(quantile=lambda u: u, density=lambda t: jnp.ones_like(t))


def logit_normal(mean: float = 0.0, std: float = 1.0) -> TimeLaw:
  """Builds the law of t = sigmoid(mean + std z), z normal.

  pi(t) = N(logit t; mean, std^2) / (t (1 - t))  (arXiv:2403.03206, section 3.1)

  A positive mean leans towards noise. (In diffusers the same mean leans towards
  data: its indices run down a descending list.)
  """
  if std <= 0.0:
    raise ValueError(
      f"The standard deviation of a logit-normal law must be above 0, not "
      f"{std}; 1.0 is SD3's."
    )

  def quantile(u):
    return jax.nn.sigmoid(mean + std * jax.scipy.special.ndtri(u))

  def density(t):
    # The density vanishes at both ends, where its factors are 0 and infinite.
    t = jnp.clip(t, _HALF_STEP, 1.0 - _HALF_STEP)
    z = (jax.scipy.special.logit(t) - mean) / std
    scale = std * math.sqrt(2.0 * math.pi)
    return jnp.exp(-0.5 * z**2) / (scale * t * (1.0 - t))

  return TimeLaw(quantile, density)


def shifted(law: TimeLaw, shift: float) -> TimeLaw:
  """Builds the law of `shift_times(t, shift)`, t drawn from `law`.

  With t_n = shift_times(t_m, 1 / a), the density gains the factor
  d t_n / d t_m = a / (t_m + a (1 - t_m))^2.
  """
  _check_shift(shift)

  def density(t):
    slope = shift / (t + shift * (1.0 - t)) ** 2
    return law.density(shift_times(t, 1.0 / shift)) * slope

  return TimeLaw(lambda u: shift_times(law.quantile(u), shift), density)


# Laws by the name that a config gives them.
LAWS: dict[str, Callable[..., TimeLaw]] = {
  "uniform": uniform,
  "logit_normal": logit_normal,
}


def shift_times(t: Time, shift: float) -> Time:
  """Moves t towards noise by multiplying its odds t / (1 - t) by `shift`.

  t_m = a t_n / (1 + (a - 1) t_n)   (arXiv:2403.03206, eq. 23)

  On the straight path the log-SNR falls by 2 log a. FLUX's exponential shift by
  mu is a = exp(mu). Written so that 0, 1 and a = 1 are exact in floating point.
  """
  return shift * t / (shift * t + (1.0 - t))


def resolution_shift(tokens: int, base_tokens: int) -> float:
  """Returns the shift sqrt(m / n) that keeps the noise level seen by the eye.

  m tokens average away more noise than n do (arXiv:2403.03206, section 5.3.2).
  """
  return math.sqrt(tokens / base_tokens)


def uniform_grid(steps: int, shift: float = 1.0) -> np.ndarray:
  """Returns the steps + 1 times from exactly 1 down to exactly 0.

  Equidistant, then shifted once; float32.
  """
  if steps < 1:
    raise ValueError(f"A grid needs at least 1 step, not {steps}.")
  _check_shift(shift)
  times = np.linspace(1.0, 0.0, steps + 1)
  return shift_times(times, shift).astype(np.float32)


def _check_shift(shift: float) -> None:
  if shift <= 0.0:
    raise ValueError(
      f"A shift multiplies the odds of t and must be above 0, not {shift}; "
      "1.0 leaves the times as they are, 3.0 is SD3's at 1024 pixels."
    )
