"""A small encoder of layouts, trained with the network that it tells.

A layout says of some things what they are and in which boxes: layout to image
of latent diffusion (arXiv:2112.10752, section 4.3.2), whose boxes are tokens. A
class and the four sides of its box are embedded, and the boxes see each other
in a few blocks. They have no order. One token more is always there, so that
"nothing" is a layout too.
"""

# Shape suffixes: B batch, N boxes, L = N + 1 tokens, E width of the text, P
# width of the pooled text, K classes, S = 4 sides, F frequencies.

import dataclasses
import math
import typing
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from flowjax.models import blocks, layers, text
from flowjax.ops import products

GROUP = "layout_encoder"
FREQUENCIES = 8


@dataclasses.dataclass(frozen=True)
class LayoutConfig:
  """An encoder of at most `boxes` boxes of `classes` classes; 0: there is none.

  `width` is that of the text and of the pooled text.
  """

  classes: int = 0
  boxes: int = 8
  width: int = 128
  depth: int = 2
  heads: int = 4
  mlp_ratio: float = 4.0
  attention: str = "auto"
  dtype: str = "float32"

  def __post_init__(self):
    text.check_sizes(self, "boxes")
    if self.classes < 0:
      raise ValueError(f"classes = {self.classes} is below 0; 0: no encoder.")

  @property
  def mlp_width(self) -> int:
    return int(self.mlp_ratio * self.width)


class LayoutEncoder(nn.Module):
  """From boxes to the text and the pooled text."""

  config: LayoutConfig

  @nn.compact
  def __call__(self, box_BN5: jax.Array, mask_BL: jax.Array):
    config, (batch, count) = self.config, box_BN5.shape[:2]
    # The last row is that of the token which is always there.
    table_KE = layers.Table(config.classes + 1, config.width, name="embed")()
    class_BN = box_BN5[..., 0].astype(jnp.int32)
    class_BL = jnp.pad(class_BN, ((0, 0), (0, 1)), constant_values=-1)
    class_BL = jnp.where(class_BL < 0, config.classes, class_BL)
    kind_BLE = products.rows(table_KE, class_BL.reshape(-1)).reshape(
      batch, count + 1, config.width
    )
    dense = layers.Dense((config.width,), name="box_in")
    hidden_BNE = nn.silu(dense(waves(box_BN5[..., 1:])))
    place_BNE = layers.Dense(
      (config.width,), init_kernel=layers.normal, name="box_out"
    )(hidden_BNE)
    x_BLE = kind_BLE + jnp.pad(place_BNE, ((0, 0), (0, 1), (0, 0)))
    return text.understood(config, x_BLE, mask_BL)


def waves(side_BNS: jax.Array) -> jax.Array:
  """Returns sin(2^i pi s) and cos(2^i pi s) of each side s, i = 0, 1, ...

  The Fourier features of arXiv:2003.08934, eq. 4.
  """
  frequency_F = math.pi * 2.0 ** np.arange(FREQUENCIES, dtype=np.float32)
  side_BNS1 = side_BNS.astype(jnp.float32)[..., None]
  angle_BNSF = side_BNS1 * frequency_F[None, None, None]
  waves_BNSF = jnp.concatenate([jnp.sin(angle_BNSF), jnp.cos(angle_BNSF)], -1)
  return waves_BNSF.reshape(*side_BNS.shape[:-1], -1)


def init(config: LayoutConfig, rng: jax.Array) -> dict[str, Any]:
  """Draws the parameters, float32."""
  box_BN5 = jnp.zeros((1, config.boxes, 5), jnp.float32)
  mask_BL = jnp.ones((1, config.boxes + 1), bool)
  module = LayoutEncoder(blocks.anywhere(config))
  return module.init(rng, box_BN5, mask_BL)["params"]


def apply(
  config: LayoutConfig,
  params: dict[str, Any],
  box_BN5: jax.Array,
  mask_BN: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Returns text_BLE, pooled_BP, and mask_BL of what is in the layout.

  A box is (class, top, left, bottom, right), the sides from 0 to 1.
  """
  shape = (config.boxes, 5)
  if box_BN5.shape[1:] != shape or mask_BN.shape != box_BN5.shape[:2]:
    raise ValueError(
      f"The encoder takes boxes [B, {config.boxes}, 5] and their mask [B, "
      f"{config.boxes}], not {box_BN5.shape} and {mask_BN.shape}."
    )
  mask_BL = jnp.pad(mask_BN, ((0, 0), (0, 1)), constant_values=True)
  found = LayoutEncoder(config).apply({"params": params}, box_BN5, mask_BL)
  return *typing.cast(tuple[jax.Array, jax.Array], found), mask_BL


def flops(config: LayoutConfig) -> int:
  """Counts the arithmetic of a layout; a multiply-add is two."""
  sides = 2 * config.boxes * config.width * (8 * FREQUENCIES + config.width)
  return sides + text.flops_of_blocks(config, config.boxes + 1)
