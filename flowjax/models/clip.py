"""The text encoders of CLIP (arXiv:2103.00020), L and OpenCLIP's bigG.

A transformer whose tokens see those before them. The text is what one of its
last blocks says, and the pooled text what the last says of the token that ends
it, mapped if there is a projection.
"""

# Shape suffixes: B batch, L tokens, E width, K query, key and value, N heads,
# H head size, F hidden width of the MLP, P pooled width.

import dataclasses
import functools
import typing
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from flowjax import schema
from flowjax.models import blocks, layers, text_attention
from flowjax.ops import axes

# 123,060,480 parameters, and 694,659,840 with the projection.
SIZES: dict[str, dict[str, Any]] = {
  "l": dict(width=768, depth=12, heads=12),
  "big_g": dict(
    width=1280, depth=32, heads=20, activation="gelu", projection=1280
  ),
}
ACTIVATIONS = {
  "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
  "gelu": functools.partial(jax.nn.gelu, approximate=False),
}
# Configs with this end of text are older than the right one, and stand for the
# token with the highest number.
LEGACY_END = 2


@dataclasses.dataclass(frozen=True)
class ClipConfig:
  """What a text encoder of CLIP is made of.

  It reads at most `positions` tokens, of which `end` ends the text. With `skip`
  0 the text is what the last block says, normalised; with n it is, not
  normalised, what the block n before the last says. `projection` is the width
  to which the pooled text is mapped, if it is.
  """

  causal: ClassVar[bool] = True  # A token sees those before it.

  name: str = "clip"
  vocabulary: int = 49408
  positions: int = 77
  width: int = 768
  depth: int = 12
  heads: int = 12
  mlp_width: int = 0  # 0: four times the width
  activation: str = "quick_gelu"
  projection: int | None = None
  end: int = 49407
  skip: int = 0
  epsilon: float = 1e-5
  dtype: str = "float32"

  def __post_init__(self):
    if self.mlp_width == 0:
      object.__setattr__(self, "mlp_width", 4 * self.width)
    check(self, "clip", "vocabulary positions width depth heads")
    if not 0 <= self.skip <= self.depth:
      raise ValueError(
        f"skip={self.skip} must be at least 0, and at most depth={self.depth}."
      )

  @property
  def pooled_width(self) -> int:
    return self.width if self.projection is None else self.projection

  @property
  def text_width(self) -> int:
    return self.width


def check(config: Any, name: str, positive: str) -> None:
  """Raises ValueError for what no encoder of CLIP is made of."""
  for field, known in (
    ("name", (name,)),
    ("activation", ACTIVATIONS),
    ("dtype", blocks.DTYPES),
  ):
    if getattr(config, field) not in known:
      word = getattr(config, field)
      raise ValueError(
        f"{field}={word!r} is not known. {schema.closest(word, known)}"
      )
  for field in positive.split():
    if getattr(config, field) <= 0:
      raise ValueError(f"{field}={getattr(config, field)} must be positive.")
  if config.width % config.heads:
    raise ValueError(
      f"heads={config.heads} do not divide width={config.width} evenly."
    )


class LayerNorm(nn.Module):
  """Normalises the last dim, scales and shifts it, in float32."""

  epsilon: float

  @nn.compact
  def __call__(self, x_BLE: jax.Array) -> jax.Array:
    shape = x_BLE.shape[-1:]
    scale_E = self.param("scale", nn.initializers.ones, shape)
    bias_E = self.param("bias", nn.initializers.zeros, shape)
    x = x_BLE.astype(jnp.float32)
    centred = x - jnp.mean(x, axis=-1, keepdims=True)
    variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
    y = centred * jax.lax.rsqrt(variance + self.epsilon)
    scale, bias = (jnp.broadcast_to(v, y.shape) for v in (scale_E, bias_E))
    return y * scale + bias


class Block(nn.Module):
  """Attention, of a text to what came before, and an MLP; both are added.

  The sum is float32. It takes the number of the block, from 0, and carries the
  text beside the sum until the block that says it.
  """

  config: Any

  @nn.compact
  def __call__(self, carry, number, mask_BL):
    config, (x_BLE, text_BLE) = self.config, carry
    dense = functools.partial(
      layers.Dense, dtype=blocks.DTYPES[config.dtype], init_kernel=layers.normal
    )
    size, length = config.width // config.heads, x_BLE.shape[1]

    y_BLE = LayerNorm(config.epsilon, name="attention_norm")(x_BLE)
    qkv_BLKNH = dense((3, config.heads, size), name="qkv")(y_BLE)
    qkv_BLKNH = axes.name(qkv_BLKNH, "batch", None, None, "heads", None)
    y_BLNH = text_attention.attend(
      *jnp.unstack(qkv_BLKNH, axis=2),
      scale=size**-0.5,
      seen_TS=jnp.tri(length, dtype=bool) if config.causal else None,
      mask_BS=mask_BL,
    )
    out_BLE = dense((config.width,), contract=2, name="out")(y_BLNH)
    x_BLE = x_BLE + out_BLE.astype(jnp.float32)

    y_BLE = LayerNorm(config.epsilon, name="mlp_norm")(x_BLE)
    y_BLF = dense((config.mlp_width,), name="mlp_in")(y_BLE)
    y_BLF = axes.name(
      ACTIVATIONS[config.activation](y_BLF), "batch", None, "mlp"
    )
    out_BLE = dense((config.width,), name="mlp_out")(y_BLF)
    x_BLE = x_BLE + out_BLE.astype(jnp.float32)
    says = number == config.depth - 1 - config.skip
    return (x_BLE, jnp.where(says, x_BLE, text_BLE)), None


class Encoder(nn.Module):
  """The whole: from tokens to the text and the pooled text."""

  config: ClipConfig

  @nn.compact
  def __call__(self, token_BL, mask_BL):
    config, length = self.config, token_BL.shape[1]
    table_VE = layers.Table(config.vocabulary, config.width, name="token_embed")
    place_LE = layers.Table(config.positions, config.width, name="pos_embed")
    x_BLE = jnp.take(table_VE(), token_BL, axis=0).astype(jnp.float32)
    x_BLE = x_BLE + place_LE()[None, :length].astype(jnp.float32)
    x_BLE = axes.name(x_BLE, "batch", None, "width")

    # What every block was skipped for is the sum before the first.
    (x_BLE, text_BLE), _ = stacked(config)(
      (x_BLE, x_BLE), jnp.arange(config.depth), mask_BL
    )

    x_BLE = LayerNorm(config.epsilon, name="final_norm")(x_BLE)
    index_B = end_of_text(config, token_BL)
    pooled_BE = jnp.take_along_axis(x_BLE, index_B[:, None, None], axis=1)[:, 0]
    if config.projection is not None:
      pooled_BE = layers.Dense(
        (config.projection,),
        dtype=blocks.DTYPES[config.dtype],
        init_kernel=layers.normal,
        bias=False,
        name="projection",
      )(pooled_BE).astype(jnp.float32)
    return (text_BLE if config.skip else x_BLE), pooled_BE


def stacked(config: Any) -> nn.Module:
  """Returns the blocks of a config; called inside an encoder."""
  stack = nn.scan(
    Block,
    variable_axes={"params": 0},
    split_rngs={"params": True},
    in_axes=(0, nn.broadcast),
    length=config.depth,
  )
  return stack(config, name="blocks")


def end_of_text(config: ClipConfig, token_BL: jax.Array) -> jax.Array:
  """Returns where each text ends, [B].

  That is the first of its tokens `end`. A config with the `LEGACY_END` means
  the highest number in the text, which the end of a text had.
  """
  if config.end == LEGACY_END:
    return jnp.argmax(token_BL, axis=1)
  return jnp.argmax(token_BL == config.end, axis=1)


def init(config: ClipConfig, rng: jax.Array) -> dict[str, Any]:
  """Draws the parameters."""
  token_BL = jnp.zeros((1, 1), jnp.int32)
  return Encoder(config).init(rng, token_BL, None)["params"]


def apply(
  config: ClipConfig,
  params: dict[str, Any],
  token_BL: jax.Array,
  mask_BL: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Returns text_BLE and pooled_BP, in float32.

  `mask_BL` is true where a token is real. Raises ValueError for texts that are
  too long.
  """
  if token_BL.shape[1] > config.positions:
    raise ValueError(
      f"{token_BL.shape[1]} tokens: this CLIP reads at most {config.positions}."
    )
  found = Encoder(config).apply({"params": params}, token_BL, mask_BL)
  return typing.cast(tuple[jax.Array, jax.Array], found)
