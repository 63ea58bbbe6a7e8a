"""The diffusion transformer with adaLN-Zero (DiT, arXiv:2212.09748)."""

# Shape suffixes: B batch, H height, W width, C channels of the image;
# T tokens, D width, P flattened patch, K parts; N heads, h head size.

import dataclasses
import math
from typing import Any

import flax.linen as nn
import jax
import jax.ad_checkpoint
import jax.numpy as jnp

from flowjax import schema
from flowjax.models import layers, positions
from flowjax.ops import attention, axes

# The sizes of the paper, table 1.
SIZES = {
  "s": dict(depth=12, width=384, heads=6),
  "b": dict(depth=12, width=768, heads=12),
  "l": dict(depth=24, width=1024, heads=16),
  "xl": dict(depth=28, width=1152, heads=16),
}

_policies = jax.checkpoint_policies
REMAT = {
  "none": None,
  "full": _policies.nothing_saveable,
  "dots": _policies.dots_with_no_batch_dims_saveable,
  "save_attention": _policies.save_only_these_names("qkv", "attention"),
}
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
MLPS = ("gelu", "swiglu")
POSITIONS = ("rope2d", "sincos2d", "learned")
TIME_FREQUENCIES = 256


@dataclasses.dataclass(frozen=True)
class DiTConfig:
  """What a DiT is made of."""

  name: str = "dit"
  image_size: tuple[int, int] = (32, 32)
  channels: int = 4
  out_channels: int | None = None
  patch_size: int = 2
  width: int = 384
  depth: int = 12
  heads: int = 6
  mlp_ratio: float = 4.0
  mlp: str = "gelu"
  position: str = "rope2d"
  rope_theta: float = 10000.0
  qk_norm: bool = False
  num_classes: int = 1000
  label_dropout: float = 0.1
  timestep_scale: float = 1000.0
  scan: bool = True
  remat: str = "none"
  attention: str = "auto"
  dtype: str = "float32"

  @property
  def head_size(self) -> int:
    return self.width // self.heads

  @property
  def channels_out(self) -> int:
    return self.channels if self.out_channels is None else self.out_channels

  @property
  def mlp_width(self) -> int:
    """The hidden width F of the MLP; SwiGLU's third matrix is paid for."""
    if self.mlp == "gelu":
      return int(self.mlp_ratio * self.width)
    return -8 * (-int(2 / 3 * self.mlp_ratio * self.width) // 8)


class Attention(nn.Module):
  config: DiTConfig

  @nn.compact
  def __call__(self, x_BTD, rope):
    config = self.config
    dtype = DTYPES[config.dtype]
    heads = (config.heads, config.head_size)
    qkv = layers.Dense((3, *heads), dtype=dtype, name="qkv")(x_BTD)
    qkv = axes.name(qkv, "batch", "tokens", None, "heads", None)
    qkv = jax.ad_checkpoint.checkpoint_name(qkv, "qkv")
    q_BTNh, k_BTNh, v_BTNh = (qkv[:, :, part] for part in range(3))
    if config.qk_norm:
      q_BTNh = layers.RMSNorm(name="query_norm")(q_BTNh)
      k_BTNh = layers.RMSNorm(name="key_norm")(k_BTNh)
    if rope is not None:
      q_BTNh = positions.rotate(q_BTNh, *rope)
      k_BTNh = positions.rotate(k_BTNh, *rope)
    y_BTNh = attention.attention(q_BTNh, k_BTNh, v_BTNh, body=config.attention)
    y_BTNh = axes.name(y_BTNh, "batch", "tokens", "heads", None)
    y_BTNh = jax.ad_checkpoint.checkpoint_name(y_BTNh, "attention")
    return layers.Dense((config.width,), contract=2, dtype=dtype, name="out")(
      y_BTNh
    )


class Mlp(nn.Module):
  config: DiTConfig

  @nn.compact
  def __call__(self, x_BTD):
    config = self.config
    dtype = DTYPES[config.dtype]
    parts = () if config.mlp == "gelu" else (2,)
    hidden = layers.Dense((*parts, config.mlp_width), dtype=dtype, name="in")(
      x_BTD
    )
    hidden = jax.ad_checkpoint.checkpoint_name(hidden, "mlp")
    if config.mlp == "gelu":
      hidden = nn.gelu(hidden, approximate=True)
    else:
      hidden = nn.silu(hidden[:, :, 0]) * hidden[:, :, 1]
    hidden = axes.name(hidden, "batch", "tokens", "mlp")
    return layers.Dense((config.width,), dtype=dtype, name="out")(hidden)


class Block(nn.Module):
  """One transformer block, steered by the condition c."""

  config: DiTConfig

  @nn.compact
  def __call__(self, x_BTD, c_BD, rope):
    config = self.config
    modulation_BKD = layers.Dense(
      (6, config.width),
      dtype=DTYPES[config.dtype],
      init_kernel=layers.zeros,
      name="modulation",
    )(c_BD)
    shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = (
      modulation_BKD[:, part] for part in range(6)
    )
    y_BTD = layers.modulated_norm(x_BTD, shift_a, scale_a)
    y_BTD = Attention(config, name="attention")(y_BTD, rope)
    x_BTD = x_BTD + gate_a[:, None] * y_BTD
    y_BTD = layers.modulated_norm(x_BTD, shift_m, scale_m)
    y_BTD = Mlp(config, name="mlp")(y_BTD)
    x_BTD = x_BTD + gate_m[:, None] * y_BTD
    return axes.name(x_BTD, "batch", "tokens", "width"), None


class LabelEmbed(nn.Module):
  """A table of labels, the last of which stands for no label."""

  labels: int
  width: int

  @nn.compact
  def __call__(self, label_B):
    table = self.param("embedding", layers.normal, (self.labels, self.width), 1)
    return jnp.take(table, label_B, axis=0)


class PositionTable(nn.Module):
  tokens: int
  width: int

  @nn.compact
  def __call__(self):
    return self.param("embedding", layers.normal, (self.tokens, self.width), 1)


class Final(nn.Module):
  config: DiTConfig

  @nn.compact
  def __call__(self, x_BTD, c_BD):
    config = self.config
    modulation_BKD = layers.Dense(
      (2, config.width), init_kernel=layers.zeros, name="modulation"
    )(c_BD)
    x_BTD = layers.modulated_norm(
      x_BTD.astype(jnp.float32), modulation_BKD[:, 0], modulation_BKD[:, 1]
    )
    features = config.patch_size**2 * config.channels_out
    return layers.Dense((features,), init_kernel=layers.zeros, name="out")(
      x_BTD
    )


class DiT(nn.Module):
  config: DiTConfig

  @nn.compact
  def __call__(self, x_BHWC, t_B, label_B):
    config = self.config
    dtype = DTYPES[config.dtype]
    rows, columns = (size // config.patch_size for size in x_BHWC.shape[1:3])
    x_BTP = patchify(x_BHWC.astype(dtype), config.patch_size)
    x_BTD = layers.Dense((config.width,), dtype=dtype, name="patch_embed")(
      x_BTP
    )
    rope = None
    if config.position == "rope2d":
      rope = positions.rope2d(
        rows, columns, config.head_size, config.rope_theta
      )
    elif config.position == "sincos2d":
      table_TD = positions.sincos2d(rows, columns, config.width)
      x_BTD = x_BTD + jnp.asarray(table_TD, dtype)[None]
    else:
      table_TD = PositionTable(rows * columns, config.width, name="pos_embed")()
      x_BTD = x_BTD + table_TD.astype(dtype)[None]
    x_BTD = axes.name(x_BTD, "batch", "tokens", "width")

    time_BD = layers.TimeEmbed(config.width, name="time_embed")(
      t_B * config.timestep_scale
    )
    label_BD = LabelEmbed(
      config.num_classes + 1, config.width, name="label_embed"
    )(label_B)
    c_BD = nn.silu(time_BD + label_BD)

    block = Block
    if REMAT[config.remat] is not None:
      # Inside a loop XLA cannot merge the second computation with the first.
      block = nn.remat(
        Block, policy=REMAT[config.remat], prevent_cse=not config.scan
      )
    blocks = nn.scan(
      block,
      variable_axes={"params": 0},
      split_rngs={"params": True},
      in_axes=nn.broadcast,
      length=config.depth,
      unroll=1 if config.scan else config.depth,
    )
    x_BTD, _ = blocks(config, name="blocks")(x_BTD, c_BD, rope)
    x_BTP = Final(config, name="final")(x_BTD, c_BD)
    return unpatchify(x_BTP, rows, columns, config.patch_size)


def patchify(x_BHWC: jax.Array, patch: int) -> jax.Array:
  """Cuts images into rows of patches, each flattened as (p_h, p_w, C)."""
  batch, height, width, channels = x_BHWC.shape
  rows, columns = height // patch, width // patch
  x = x_BHWC.reshape(batch, rows, patch, columns, patch, channels)
  return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, rows * columns, -1)


def unpatchify(
  x_BTP: jax.Array, rows: int, columns: int, patch: int
) -> jax.Array:
  """Puts patches back together: the inverse of `patchify`."""
  x = x_BTP.reshape(len(x_BTP), rows, columns, patch, patch, -1)
  x = x.transpose(0, 1, 3, 2, 4, 5)
  return x.reshape(len(x_BTP), rows * patch, columns * patch, -1)


def init(config: DiTConfig, rng: jax.Array) -> dict[str, Any]:
  """Draws the parameters, float32."""
  height, width = config.image_size
  x_BHWC = jnp.zeros((1, height, width, config.channels), jnp.float32)
  return DiT(config).init(rng, x_BHWC, jnp.zeros(1), jnp.zeros(1, jnp.int32))[
    "params"
  ]


def apply(
  config: DiTConfig,
  params: dict[str, Any],
  x_BHWC: jax.Array,
  t_B: jax.Array,
  cond: dict[str, jax.Array],
  rng: jax.Array | None = None,
) -> jax.Array:
  """Returns the velocity at (x, t) given the label, float32."""
  label_B = cond["label"]
  if rng is not None:
    drop_B = jax.random.bernoulli(rng, config.label_dropout, label_B.shape)
    label_B = jnp.where(drop_B, config.num_classes, label_B)
  return DiT(config).apply({"params": params}, x_BHWC, t_B, label_B)


def unconditional(
  config: DiTConfig, cond: dict[str, jax.Array]
) -> dict[str, jax.Array]:
  """Returns `cond` with every label replaced by the one for no label."""
  return {**cond, "label": jnp.full_like(cond["label"], config.num_classes)}


def flops(config: DiTConfig) -> int:
  """Counts the forward pass per example; a multiply-add is two."""
  height, width = config.image_size
  d, p = config.width, config.patch_size
  tokens = (height // p) * (width // p)
  matrices = 2 if config.mlp == "gelu" else 3
  block = (
    2 * tokens * (4 * d * d + matrices * d * config.mlp_width)
    + 4 * tokens * tokens * d
    + 2 * 6 * d * d
  )
  patches = 2 * tokens * p * p * (config.channels + config.channels_out) * d
  time = 2 * (TIME_FREQUENCIES * d + d * d)
  return config.depth * block + patches + time + 2 * 2 * d * d
