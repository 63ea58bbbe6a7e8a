"""Maximum likelihood: the loss of a flow that is inverted in one pass.

A batch is a dict as in `flow/losses.py`: "image", "mask" if there is padding,
and all else the condition.
"""

# Shape suffixes: B batch. Images have any shape that starts with B.

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from flowjax.flow import likelihood

Batch = Mapping[str, jax.Array]
Loss = Callable[[Any, Batch, jax.Array], tuple[jax.Array, dict[str, jax.Array]]]
# forward(params, x, cond, rng) -> (z, log|det dz/dx| [B]); without rng nothing
# in it is random.
Forward = Callable[
  [Any, jax.Array, dict[str, jax.Array], jax.Array | None],
  tuple[jax.Array, jax.Array],
]


def maximum_likelihood(
  forward: Forward, *, levels: int | None = None, training: bool = True
) -> Loss:
  """Returns the mean of -log2 p(x) per dimension, z = forward(x) being normal.

  log p(x) = log N(z; 0, 1) + log|det dz/dx|   (arXiv:1410.8516, eq. 1)

  With `levels`, data are one of that many in [-1, 1], 2 / (levels - 1) apart,
  and p is their probability: noise, uniform over the width w of a level, makes
  a density of it, whose mean of -log2(p w) is an upper bound of the bits
  (arXiv:1511.01844, section 3.1). All levels alike need log2(levels) bits.
  Without, p is a density, and its bits may be below 0. Where not `training`,
  that noise is all that is random.
  """
  if levels is not None and levels < 2:
    raise ValueError(
      f"levels={levels} are not enough to tell anything: 256 for 8-bit images, "
      "or None for data that are continuous."
    )
  width = 0.0 if levels is None else 2.0 / (levels - 1)

  def loss(params, batch, rng):
    rng_noise, rng_net = jax.random.split(rng)
    x = batch["image"]
    if width:
      x = likelihood.dequantise(rng_noise, x, width)
    cond = {key: batch[key] for key in batch if key not in ("image", "mask")}
    z, log_det_B = forward(params, x, cond, rng_net if training else None)
    bits_B = _bits(z, log_det_B) - (math.log2(width) if width else 0.0)
    return _average(bits_B, batch)

  return loss


def _bits(z: jax.Array, log_det_B: jax.Array) -> jax.Array:
  """Returns -log2 of the density of each example, per dimension."""
  dims = math.prod(z.shape[1:])
  axes = tuple(range(1, z.ndim))
  squared_B = jnp.sum(jnp.square(z.astype(jnp.float32)), axis=axes)
  log_normal_B = -0.5 * squared_B - 0.5 * dims * math.log(2.0 * math.pi)
  return -(log_normal_B + log_det_B) / (dims * math.log(2.0))


def _average(bits_B: jax.Array, batch: Batch):
  if "mask" not in batch:
    return jnp.mean(bits_B), {"loss_by_example": bits_B}
  # Chosen, not multiplied: padding may hold anything, also what is not finite.
  mask_B = batch["mask"].astype(jnp.float32)
  bits_B = jnp.where(mask_B > 0.0, bits_B, 0.0)
  mean = jnp.sum(bits_B) / jnp.maximum(jnp.sum(mask_B), 1.0)
  return mean, {"loss_by_example": bits_B}
