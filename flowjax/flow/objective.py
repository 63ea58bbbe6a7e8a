"""What a loss asks of a network at time t, and how examples are averaged."""

# Shape suffixes: B batch. Images have any shape that starts with B.

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from flowjax.flow import couplings, paths
from flowjax.flow import prediction as predictions

Batch = Mapping[str, jax.Array]
Condition = dict[str, jax.Array]
NO_CONDITION = ("image", "mask", "region")


class Drawn(NamedTuple):
  """One batch on the path: both ends, x_t, and what is to be predicted."""

  x: jax.Array
  eps: jax.Array
  x_t: jax.Array
  target: jax.Array
  cond: Condition


@dataclasses.dataclass(frozen=True)
class Objective:
  """A path, a coupling of its ends, and a prediction along it."""

  path: paths.Path
  prediction: str = "velocity"
  coupling: couplings.Coupling = couplings.independent()
  sigma_data: float = 0.5

  def __post_init__(self):
    self.form()
    if self.coupling.spread and self.prediction != "velocity":
      raise ValueError(
        "A coupling that spreads x_t about the path (schrodinger_bridge, or "
        f"sigma > 0) gives no meaning to the prediction {self.prediction!r}: "
        "x_t has then three sources. Predict 'velocity'."
      )

  def form(self):
    """Returns (coefficients, x, eps) -> what is to be predicted of them."""
    return predictions._named(self.prediction, self.sigma_data).form

  def inside(self, t_B: jax.Array) -> jax.Array:
    """Clips times to where the path is finite."""
    low, high = self.path.low, self.path.high
    if low <= 0.0 and 1.0 <= high:
      return t_B
    return jnp.clip(t_B, low, high)

  def draw(
    self,
    batch: Batch,
    t_B: jax.Array,
    rng_eps: jax.Array,
    rng_pair: jax.Array,
  ) -> Drawn:
    """Draws the noise, for the global shape, and what follows from it."""
    x = batch["image"]
    eps = jax.random.normal(rng_eps, x.shape, jnp.float32)
    cond = {key: batch[key] for key in batch if key not in NO_CONDITION}
    rng_pair, rng_spread = jax.random.split(rng_pair)
    x, eps, cond = self.coupling(rng_pair, x, eps, cond, mask=batch.get("mask"))
    x_t = self.path.interpolate(x, eps, t_B)
    target = self.form()(self.path.at(t_B, x), x, eps)
    spread = self.coupling.spread
    if spread is not None:
      z = jax.random.normal(rng_spread, x.shape, jnp.float32)
      x_t = x_t + paths.over(spread.std(t_B), z) * z
      target = target + paths.over(spread.std_dot(t_B), z) * z
    return Drawn(x, eps, x_t, target, cond)


def masked(loss_B: jax.Array, batch: Batch) -> jax.Array:
  """Returns the loss of each example, 0 where it is padding."""
  if "mask" not in batch:
    return loss_B
  # Chosen, not multiplied: padding may hold anything, also what is not finite.
  return jnp.where(batch["mask"].astype(bool), loss_B, 0.0)


def average(loss_B: jax.Array, batch: Batch) -> jax.Array:
  """Returns the mean over the real examples of losses that `masked` made."""
  if "mask" not in batch:
    return jnp.mean(loss_B)
  real = jnp.sum(batch["mask"].astype(jnp.float32))
  # A batch of nothing but padding has loss 0, and weight 0 to whoever averages.
  return jnp.sum(loss_B) / jnp.maximum(real, 1.0)
