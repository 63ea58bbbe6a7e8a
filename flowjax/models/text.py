"""A small encoder of captions, trained with the network that it tells.

Tokens and their places are embedded, see each other in a few blocks, and are
the text; their sum through one more map is the pooled text.
"""

# Shape suffixes: B batch, L text tokens, E width of the text, P width of the
# pooled text, V vocabulary.

import dataclasses
import math
import typing
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from flowjax import schema
from flowjax.models import blocks, layers, sequences
from flowjax.ops import attention, axes, products

GROUP = "text_encoder"
# Networks draw what reads the pooled text for vectors as wide as those of large
# encoders: a narrow one must be as long, or it is drowned by the time.
POOLED = 2048


@dataclasses.dataclass(frozen=True)
class TextConfig:
  """An encoder of `tokens` tokens, each below `vocabulary`; 0: there is none.

  `width` is that of the text and of the pooled text.
  """

  vocabulary: int = 0
  tokens: int = 32
  width: int = 128
  depth: int = 2
  heads: int = 4
  mlp_ratio: float = 4.0
  attention: str = "auto"
  dtype: str = "float32"

  def __post_init__(self):
    check_sizes(self, "tokens")
    if self.vocabulary < 0:
      raise ValueError(
        f"vocabulary = {self.vocabulary} is below 0; 0: no encoder."
      )

  @property
  def mlp_width(self) -> int:
    return int(self.mlp_ratio * self.width)


def check_sizes(config: Any, *counts: str, least_depth: int = 1) -> None:
  """Raises ValueError for blocks that cannot be, or counts below 1."""
  for name in (*counts, "width", "heads", "mlp_ratio"):
    if getattr(config, name) <= 0:
      raise ValueError(f"{name} = {getattr(config, name)} must be positive.")
  if config.depth < least_depth:
    raise ValueError(f"depth = {config.depth} must be at least {least_depth}.")
  if config.width % config.heads:
    raise ValueError(
      f"heads = {config.heads} does not divide width = {config.width}."
    )
  schema.require_among(
    config, attention=attention.BODIES, dtype=tuple(blocks.DTYPES)
  )


class Block(nn.Module):
  """Attention among the tokens, and an MLP, each after a norm."""

  config: Any

  @nn.compact
  def __call__(self, x_BLE: jax.Array, mask_BL: sequences.Mask):
    config, dtype = self.config, blocks.DTYPES[self.config.dtype]
    y_BLE = layers.RMSNorm(name="attention_norm")(x_BLE)
    x_BLE = x_BLE + blocks.Attention(
      config.heads,
      config.width // config.heads,
      qk_norm=False,
      body=config.attention,
      dtype=dtype,
      name="attention",
    )(y_BLE, None, mask_BT=mask_BL)
    y_BLE = layers.RMSNorm(name="mlp_norm")(x_BLE)
    x_BLE = x_BLE + blocks.Mlp("gelu", config.mlp_width, dtype, name="mlp")(
      y_BLE
    )
    return axes.name(x_BLE, "batch", "tokens", "width"), None


class TextEncoder(nn.Module):
  """From tokens to the text and the pooled text."""

  config: TextConfig

  @nn.compact
  def __call__(self, token_BL: jax.Array, mask_BL: jax.Array):
    config, (batch, length) = self.config, token_BL.shape
    table_VE = layers.Table(config.vocabulary, config.width, name="embed")()
    place_LE = layers.Table(config.tokens, config.width, name="place_embed")()
    word_BLE = products.rows(table_VE, token_BL.reshape(-1)).reshape(
      batch, length, config.width
    )
    return understood(config, word_BLE + place_LE[None], mask_BL)


def understood(
  config: Any, x_BLE: jax.Array, mask_BL: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Returns text_BLE and pooled_BP of embedded tokens, by blocks of a config.

  Called inside an encoder, which gets the parameters. Of each row a token must
  be real.
  """
  length = x_BLE.shape[1]
  # Tables are drawn small; what blocks add to their rows is not.
  x_BLE = layers.RMSNorm(name="embed_norm")(x_BLE)
  x_BLE = sequences.even(x_BLE.astype(blocks.DTYPES[config.dtype]))
  x_BLE = axes.name(x_BLE, "batch", "tokens", "width")
  seen_BL = sequences.seen(mask_BL, len(x_BLE), length)
  stack = nn.scan(
    Block,
    variable_axes={"params": 0},
    split_rngs={"params": True},
    in_axes=nn.broadcast,
    length=config.depth,
  )
  x_BLE, _ = stack(config, name="blocks")(x_BLE, seen_BL)
  text_BLE = layers.RMSNorm(name="norm")(x_BLE)[:, :length]
  share_BL1 = mask_BL[..., None].astype(jnp.float32)
  count_B11 = jnp.sum(share_BL1, axis=1, keepdims=True)
  share_BL1 = share_BL1 * jax.lax.rsqrt(count_B11)
  sum_BE = jnp.sum(share_BL1 * text_BLE.astype(jnp.float32), axis=1)
  pooled_BP = layers.Dense((config.width,), name="pooled")(sum_BE)
  return text_BLE, math.sqrt(POOLED / config.width) * pooled_BP


def init(config: TextConfig, rng: jax.Array) -> dict[str, Any]:
  """Draws the parameters, float32."""
  token_BL = jnp.zeros((1, config.tokens), jnp.int32)
  module = TextEncoder(blocks.anywhere(config))
  return module.init(rng, token_BL, jnp.ones_like(token_BL, bool))["params"]


def apply(
  config: TextConfig,
  params: dict[str, Any],
  token_BL: jax.Array,
  mask_BL: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """Returns text_BLE and pooled_BP; of each row a token must be real."""
  if token_BL.shape[1:] != (config.tokens,) or mask_BL.shape != token_BL.shape:
    raise ValueError(
      f"The encoder takes tokens and their mask [B, {config.tokens}], not "
      f"{token_BL.shape} and {mask_BL.shape}."
    )
  found = TextEncoder(config).apply({"params": params}, token_BL, mask_BL)
  return typing.cast(tuple[jax.Array, jax.Array], found)


def flops(config: TextConfig) -> int:
  """Counts the arithmetic of a caption; a multiply-add is two."""
  return flops_of_blocks(config, config.tokens)


def flops_of_blocks(config: Any, length: int) -> int:
  """Counts the arithmetic of `understood` for so many tokens.

  A block of width E has L 2 (4 E^2 + 2 r E^2) + 4 L^2 E, for an MLP of ratio r;
  the pooled text 2 E^2 more.
  """
  wide = config.width
  kernels = 4 * wide * wide + 2 * wide * config.mlp_width
  block = 2 * length * kernels + 4 * length**2 * wide
  return config.depth * block + 2 * wide * wide
