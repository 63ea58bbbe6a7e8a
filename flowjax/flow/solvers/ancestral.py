"""DDIM and DDPM: to the data and back to a little less noise.

With D the predicted data, e = (x_s - alpha_s D) / sigma_s the noise that it
implies and z fresh noise, a step from s to t is

  x_t = alpha_t D + sqrt(sigma_t^2 - w^2) e + w z,
  w^2 = eta^2 sigma_t^2 (1 - e^{-2h}),   h = l_t - l_s,  l = log(alpha / sigma)

(arXiv:2010.02502, eq. 12 and 16, where alpha^2 + sigma^2 = 1; in this form it
holds for any path, since sigma_t^2 (1 - e^{-2h}) is the variance of x_t given
x_s and the data). eta = 0 is deterministic, and on the straight path it is
Euler. eta = 1 draws from that posterior: the ancestral sampling of DDPM
(arXiv:2006.11239, eq. 6-7).

Its variance w^2 is beta-tilde of a step of whatever length; that of x_s given
x_t, scaled as x_s, is beta = sigma_s^2 (1 - e^{-2h}). A network that learns its
variance chooses between their logarithms (arXiv:2102.09672, eq. 15).
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from flowjax.flow import paths
from flowjax.flow import variance as variances
from flowjax.flow.solvers import exponential, linear, noise


@dataclasses.dataclass(frozen=True)
class Ancestral:
  """Predicts the data, and renoises it to the next time.

  `clip` bounds the predicted data to [-clip, clip]; the noise is then the one
  that the bounded data imply. The `variance` of the fresh noise is "small",
  that of the posterior, "large", that of x_s given x_t, or "learned", between
  them; the mean stays. For the last one the field returns (data, v).
  """

  name: str
  path: paths.Path
  eta: float = 0.0
  clip: float | None = None
  variance: str = "small"
  order: int = 1
  draw: noise.Draw = noise.normal
  prediction: str = "data"

  @property
  def stochastic(self) -> bool:
    """Whether it draws noise, and so runs from noise to data alone."""
    return self.eta > 0.0

  @property
  def learns_variance(self) -> bool:
    """Whether the field has to return (data, v)."""
    return self.variance == "learned"

  def init(self, x: Any, rng: jax.Array | None) -> Any:
    """Returns the key from which noise is drawn, if it is drawn."""
    return noise.required(rng, self.name) if self.stochastic else ()

  def evaluations(self, count: int) -> int:
    """Returns one per step."""
    return count

  def step(self, field: Any, x: Any, memory: Any, step: Any) -> tuple[Any, Any]:
    """Moves x to the next time."""
    data, v = field(x, step.t), None
    if self.learns_variance:
      data, v = data
    data = linear.like(x, data)
    if self.clip is not None:
      bound = self.clip
      data = jax.tree.map(lambda d: jnp.clip(d, -bound, bound), data)
    over = exponential.interval(self.path, step.t, step.t_next, linear.dtype(x))
    if not self.stochastic:
      return linear.combine([over.keep, over.gain], (x, data)), memory
    fresh = 1.0 - over.decay**2
    # sqrt(1 - eta^2 fresh), without the cancellation: this part of the noise
    # in x_s stays.
    turn = jnp.sqrt(1.0 - self.eta**2 + (self.eta * over.decay) ** 2)
    weights: list[linear.Weight] = [
      turn * over.keep,
      over.alpha * (1.0 - turn * over.decay),
    ]
    drawn = self.draw(memory, step.number, x)
    if v is None:
      weights.append(self._deviation(over, fresh))
    else:
      drawn = _scaled(drawn, v, over, fresh)
      weights.append(1.0)
    return linear.combine(weights, (x, data, drawn)), memory

  def _deviation(self, over, fresh):
    sigma = over.sigma if self.variance == "small" else _before(over)
    return self.eta * sigma * jnp.sqrt(fresh)


def _before(over: exponential.Interval) -> jax.Array:
  """Returns sigma_s; at the data, where no noise is drawn, 0."""
  return over.sigma / jnp.where(over.sigma > 0.0, over.keep, 1.0)


def _scaled(drawn: Any, v: Any, over: exponential.Interval, fresh) -> Any:
  """Returns the noise that is drawn, with the variance that v chooses."""
  noisy = over.sigma > 0.0
  small, large = (
    jnp.log(jnp.where(noisy, fresh * sigma**2, 1.0))
    for sigma in (over.sigma, _before(over))
  )

  def leaf(drawn, v):
    v = v.astype(drawn.dtype)
    deviation = jnp.exp(0.5 * variances.between(v, small, large))
    return jnp.where(noisy, deviation, 0.0) * drawn

  return jax.tree.map(leaf, drawn, v)


def ddim(
  path: paths.Path, eta: float = 0.0, clip: float | None = None
) -> Ancestral:
  """Builds DDIM: deterministic for eta = 0, DDPM's posterior for eta = 1."""
  if not 0.0 <= eta <= 1.0:
    raise ValueError(
      f"eta must lie between 0 and 1, not {eta}: 0 draws no noise, 1 draws as "
      "much as DDPM; beyond it no variance would be left for the noise kept."
    )
  return Ancestral("ddim", path, eta, _checked(clip))


def ddpm(
  path: paths.Path, variance: str = "small", clip: float | None = None
) -> Ancestral:
  """Builds ancestral sampling with the posterior's variance, or a larger.

  "small" is beta-tilde, the variance of x_t given x_s and the data; "large" is
  beta, which arXiv:2006.11239 (section 3.2) found to serve as well; "learned"
  is chosen between them by the network (arXiv:2102.09672).
  """
  if variance not in ("small", "large", "learned"):
    raise ValueError(
      f"There is no variance {variance!r}: it must be 'small' (that of the "
      "posterior), 'large' (that of the forward process), or 'learned' (by the "
      "network, between them)."
    )
  return Ancestral("ddpm", path, 1.0, _checked(clip), variance)


def _checked(clip: float | None) -> float | None:
  if clip is not None and not clip > 0.0:
    raise ValueError(
      f"clip bounds the predicted data to [-clip, clip] and must be above 0, "
      f"not {clip}; None leaves the data as predicted, 1.0 suits images."
    )
  return clip


SOLVERS: dict[str, Callable[..., Ancestral]] = {"ddim": ddim, "ddpm": ddpm}
