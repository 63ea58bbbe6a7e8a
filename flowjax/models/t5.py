"""The encoder of T5 v1.1 (arXiv:1910.10683; gated MLPs of arXiv:2002.05202).

Tokens know where they stand by a bias on the scores of attention alone, which
depends on the distance and is the same in every block. Scores are not scaled.
There is no pooled text. The sum that runs through the blocks grows beyond what
float16 holds; here it is float32, and products are bfloat16 or float32.
"""

# Shape suffixes: B batch, L tokens, T and S the same as queries and keys,
# E width, K parts of a fused map, N heads, H head size, F hidden width of the
# MLP, V vocabulary.

import dataclasses
import functools
import math
import typing
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from flowjax import schema
from flowjax.models import blocks, layers, text_attention
from flowjax.ops import axes

# The published ones, of 35,332,800 to 4,762,310,656 parameters.
SIZES: dict[str, dict[str, Any]] = {
  "small": dict(width=512, mlp_width=1024, heads=6, depth=8),
  "base": dict(width=768, mlp_width=2048, heads=12, depth=12),
  "large": dict(width=1024, mlp_width=2816, heads=16, depth=24),
  "xl": dict(width=2048, mlp_width=5120, heads=32, depth=24),
  "xxl": dict(width=4096, mlp_width=10240, heads=64, depth=24),
}


@dataclasses.dataclass(frozen=True)
class T5Config:
  """What an encoder of T5 is made of.

  Distances share `buckets`, half of them for keys that come later. The first
  half of these is for one distance each; the others are spaced evenly in its
  logarithm, up to `max_distance`.
  """

  name: str = "t5"
  vocabulary: int = 32128
  width: int = 4096
  mlp_width: int = 10240
  heads: int = 64
  head_size: int = 64
  depth: int = 24
  buckets: int = 32
  max_distance: int = 128
  epsilon: float = 1e-6
  dtype: str = "float32"

  def __post_init__(self):
    if self.name != "t5":
      raise ValueError(f"name={self.name!r} is not 't5'.")
    if self.dtype not in blocks.DTYPES:
      raise ValueError(
        f"dtype={self.dtype!r} is not known; in float16 its activations "
        f"overflow. {schema.closest(self.dtype, blocks.DTYPES)}"
      )
    for field in "vocabulary width mlp_width heads head_size depth".split():
      if getattr(self, field) <= 0:
        raise ValueError(f"{field}={getattr(self, field)} must be positive.")
    if self.buckets < 4 or self.buckets % 4:
      raise ValueError(f"buckets={self.buckets} must be a multiple of 4.")
    if self.max_distance <= self.buckets // 4:
      raise ValueError(
        f"max_distance={self.max_distance} must be above {self.buckets // 4}, "
        "a quarter of the buckets."
      )

  @property
  def text_width(self) -> int:
    return self.width


def buckets(config: T5Config, length: int) -> np.ndarray:
  """Returns the bucket [T, S] of key s as query t sees it.

  For a distance d = s - t and n = buckets / 2, e = n / 2, it is n (d > 0) plus
  |d| below e, and else e + floor((n - e) log(|d| / e) / log(max / e)), at most
  n - 1.
  """
  half, exact = config.buckets // 2, config.buckets // 4
  place_L = np.arange(length)
  distance_TS = place_L[None, :] - place_L[:, None]
  size_TS = np.abs(distance_TS)
  # In float32, as PyTorch: what falls between two buckets must fall alike.
  ratio_TS = np.maximum(size_TS, 1).astype(np.float32) / np.float32(exact)
  turn = np.float32(math.log(config.max_distance / exact))
  wide_TS = np.log(ratio_TS) / turn * np.float32(half - exact)
  far_TS = np.minimum(exact + wide_TS.astype(np.int32), half - 1)
  return half * (distance_TS > 0) + np.where(size_TS < exact, size_TS, far_TS)


def _scaled(power: float = 1.0) -> layers.Init:
  """Returns what draws N(0, 1 / (fan_in power))."""

  def draw(key, shape, fan_in):
    spread = (fan_in * power) ** -0.5
    return spread * jax.random.normal(key, shape, jnp.float32)

  return draw


class Block(nn.Module):
  """Attention and a gated MLP; what they say is added, in float32."""

  config: T5Config

  @nn.compact
  def __call__(self, x_BLE, bias_NTS, mask_BL):
    config = self.config
    dtype = blocks.DTYPES[config.dtype]
    dense = functools.partial(layers.Dense, dtype=dtype, bias=False)
    norm = functools.partial(layers.RMSNorm, config.epsilon)

    y_BLE = norm(name="attention_norm")(x_BLE)
    qkv_BLKNH = dense(
      (3, config.heads, config.head_size), init_kernel=self._queries, name="qkv"
    )(y_BLE)
    qkv_BLKNH = axes.name(qkv_BLKNH, "batch", None, None, "heads", None)
    y_BLNH = text_attention.attend(
      *jnp.unstack(qkv_BLKNH, axis=2),
      scale=1.0,
      bias_NTS=bias_NTS,
      mask_BS=mask_BL,
    )
    out = dense((config.width,), contract=2, init_kernel=_scaled(), name="out")
    x_BLE = x_BLE + out(y_BLNH).astype(jnp.float32)

    y_BLE = norm(name="mlp_norm")(x_BLE)
    hidden_BLKF = dense(
      (2, config.mlp_width), init_kernel=_scaled(), name="mlp_in"
    )(y_BLE)
    gate_BLF, y_BLF = jnp.unstack(hidden_BLKF, axis=2)
    y_BLF = jax.nn.gelu(gate_BLF, approximate=True) * y_BLF
    y_BLF = axes.name(y_BLF, "batch", None, "mlp")
    out = dense((config.width,), init_kernel=_scaled(), name="mlp_out")
    return x_BLE + out(y_BLF).astype(jnp.float32), None

  def _queries(self, key, shape, fan_in):
    """Draws queries small, as nothing else scales the scores."""
    kernel_EKNH = _scaled()(key, shape, fan_in)
    return kernel_EKNH.at[:, 0].multiply(self.config.head_size**-0.5)


class _Table(nn.Module):
  """Holds rows of normal numbers with the given spread."""

  shape: tuple[int, int]
  spread: float

  @nn.compact
  def __call__(self) -> jax.Array:
    draw = nn.initializers.normal(self.spread)
    return self.param("embedding", draw, self.shape)


class Encoder(nn.Module):
  """The whole: from tokens to the text."""

  config: T5Config

  @nn.compact
  def __call__(self, token_BL, mask_BL):
    config = self.config
    table_VE = _Table(
      (config.vocabulary, config.width), 1.0, name="token_embed"
    )
    x_BLE = jnp.take(table_VE(), token_BL, axis=0).astype(jnp.float32)
    x_BLE = axes.name(x_BLE, "batch", None, "width")
    shape = config.buckets, config.heads
    table = _Table(shape, config.width**-0.5, name="position_bias")()
    bias_TSN = jnp.take(table, buckets(config, token_BL.shape[1]), axis=0)
    bias_NTS = axes.name(bias_TSN.transpose(2, 0, 1), "heads", None, None)
    stack = nn.scan(
      Block,
      variable_axes={"params": 0},
      split_rngs={"params": True},
      in_axes=nn.broadcast,
      length=config.depth,
    )(config, name="blocks")
    x_BLE, _ = stack(x_BLE, bias_NTS, mask_BL)
    return layers.RMSNorm(config.epsilon, name="final_norm")(x_BLE)


def init(config: T5Config, rng: jax.Array) -> dict[str, Any]:
  """Draws the parameters, as T5 does."""
  token_BL = jnp.zeros((1, 1), jnp.int32)
  return Encoder(config).init(rng, token_BL, None)["params"]


def apply(
  config: T5Config,
  params: dict[str, Any],
  token_BL: jax.Array,
  mask_BL: jax.Array | None = None,
) -> tuple[jax.Array, None]:
  """Returns text_BLE in float32, and that there is no pooled text.

  `mask_BL` is true where a token is real.
  """
  text_BLE = Encoder(config).apply({"params": params}, token_BL, mask_BL)
  return typing.cast(jax.Array, text_BLE), None
