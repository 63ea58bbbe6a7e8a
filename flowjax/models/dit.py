"""The diffusion transformer with adaLN-Zero (DiT, arXiv:2212.09748)."""

# Shape suffixes: B batch, H height, W width, C channels of the image;
# T tokens, P one flattened patch, D width, K parts of a modulation, L layers.

import collections.abc
import dataclasses
import functools
import typing
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from flowjax.models import (
  blocks,
  checks,
  conditions,
  layers,
  patches,
  positions,
  sequences,
)
from flowjax.ops import axes, products

# Table 1 of the paper. "xl" at patch size 2 is the DiT-XL/2 that people mean.
SIZES: dict[str, dict[str, int]] = {
  "s": dict(depth=12, width=384, heads=6),
  "b": dict(depth=12, width=768, heads=12),
  "l": dict(depth=24, width=1024, heads=16),
  "xl": dict(depth=28, width=1152, heads=16),
}
POSITIONS = ("rope2d", "sincos2d", "learned")


@dataclasses.dataclass(frozen=True)
class DiTConfig:
  """What a DiT is made of.

  `out_channels` is `channels` unless given, and `context_channels` are those of
  cond["context"], read beside the image. `timestep_scale` multiplies t in
  [0, 1] before its sinusoid, whose frequencies `frequency_shift` moves:
  diffusers' DiT has 1. `mlp_norm_epsilon` is that of the norm before the MLP,
  which diffusers makes 1e-5 unless told. With `num_classes` 0 the network is
  told no label. With `size_conditioning` it is told size and crop of an image,
  cond["size_crop"]. `remat` is a key of `blocks.REMAT`.
  """

  name: str = "dit"
  image_size: tuple[int, int] = (32, 32)
  channels: int = 4
  context_channels: int = 0
  out_channels: int | None = None
  patch_size: int = 2
  width: int = 384
  depth: int = 12
  heads: int = 6
  mlp_ratio: float = 4.0
  mlp: str = "gelu"
  norm: str = "layernorm"
  mlp_norm_epsilon: float = 1e-6
  position: str = "rope2d"
  rope_theta: float = 10000.0
  qk_norm: bool = False
  num_classes: int = 1000
  label_dropout: float = 0.1
  size_conditioning: bool = False
  timestep_scale: float = 1000.0
  frequency_shift: float = 0.0
  scan: bool = True
  remat: str = "none"
  attention: str = "auto"
  dtype: str = "float32"

  def __post_init__(self):
    checks.choices(
      self,
      name=("dit",),
      mlp=blocks.MLPS,
      norm=layers.NORMS,
      position=POSITIONS,
    )
    checks.positive(
      self,
      "channels patch_size width depth heads mlp_ratio rope_theta "
      "timestep_scale channels_out mlp_norm_epsilon",
    )
    checks.patches(self.image_size, self.patch_size)
    checks.context(self)
    _check_ranges(self)
    checks.heads(self)

  @property
  def head_size(self) -> int:
    return self.width // self.heads

  @property
  def channels_in(self) -> int:
    return self.channels + self.context_channels

  @property
  def channels_out(self) -> int:
    return self.channels if self.out_channels is None else self.out_channels

  @property
  def grid(self) -> tuple[int, int]:
    """Rows and columns of patches."""
    height, width = self.image_size
    return height // self.patch_size, width // self.patch_size

  @property
  def mlp_width(self) -> int:
    """The hidden width; two thirds for SwiGLU, which has a third matrix."""
    if self.mlp == "gelu":
      return int(self.mlp_ratio * self.width)
    return -(-int(2 / 3 * self.mlp_ratio * self.width) // 8) * 8


class Block(nn.Module):
  """One block: attention and MLP, each modulated and gated by c."""

  config: DiTConfig

  @nn.compact
  def __call__(self, x_BTD, c_BD, rope, identity, mask_BT):
    config = self.config
    dtype = blocks.DTYPES[config.dtype]
    modulation_BKD = layers.Dense(
      (6, config.width),
      dtype=dtype,
      init_kernel=layers.zeros,
      name="modulation",
    )(c_BD)
    shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = (
      jnp.unstack(blocks.saved(modulation_BKD, "modulation"), axis=1)
    )

    y_BTD = layers.ModulatedNorm(config.norm, name="attention_norm")(
      x_BTD, shift_msa, scale_msa
    )
    y_BTD = blocks.Attention(
      config.heads,
      config.head_size,
      config.qk_norm,
      config.attention,
      dtype,
      name="attention",
    )(y_BTD, rope, identity, mask_BT)
    x_BTD = layers.add_gated(x_BTD, gate_msa, y_BTD)
    x_BTD = axes.name(x_BTD, "batch", "tokens", "width")

    y_BTD = layers.ModulatedNorm(
      config.norm, config.mlp_norm_epsilon, name="mlp_norm"
    )(x_BTD, shift_mlp, scale_mlp)
    y_BTD = blocks.Mlp(config.mlp, config.mlp_width, dtype, name="mlp")(y_BTD)
    x_BTD = layers.add_gated(x_BTD, gate_mlp, y_BTD)
    return axes.name(x_BTD, "batch", "tokens", "width"), None


class DiT(nn.Module):
  """From a noisy image, its time and its label to a velocity.

  `identity_L` says in which blocks a token attends to itself alone.
  """

  config: DiTConfig

  @nn.compact
  def __call__(self, x_BHWC, t_B, cond, identity_L=None):
    config = self.config
    patch = config.patch_size
    rows, columns = (size // patch for size in x_BHWC.shape[1:3])

    batch, tokens = x_BHWC.shape[0], rows * columns
    x_BTP = sequences.even(patches.patchify(x_BHWC, patch))
    x_BTD = layers.Dense(
      (config.width,),
      dtype=blocks.DTYPES[config.dtype],
      tokens="tokens",
      name="patch_embed",
    )(x_BTP)
    grid_B2 = cond.get("grid")
    x_BTD, rope = self._place(x_BTD, rows, columns, grid_B2)
    x_BTD = axes.name(x_BTD, "batch", "tokens", "width")

    time_BD = layers.TimeEmbed(
      config.width, config.frequency_shift, name="time_embed"
    )(config.timestep_scale * t_B.astype(jnp.float32))
    # The last row of the table, or its only one, stands for no label.
    labels = layers.Table(
      config.num_classes + 1, config.width, name="label_embed"
    )()
    label_B = _label(config, t_B, cond)
    label_BD = products.rows(labels, label_B, called="label_embed/embedding")
    sum_BD = time_BD + label_BD
    if config.size_conditioning:
      sum_BD += conditions.PooledEmbed(config.width, name="size_embed")(
        conditions.size_waves(cond["size_crop"])
      )
    c_BD = nn.silu(sum_BD)

    x_BTD, _ = _stacked(config)(config, name="blocks")(
      x_BTD,
      c_BD,
      rope,
      identity_L,
      sequences.seen(positions.inside(grid_B2, tokens), batch, tokens),
    )
    x_BTP = blocks.Final(
      patch * patch * config.channels_out, config.norm, name="final"
    )(x_BTD, c_BD)
    return patches.unpatchify(x_BTP[:, :tokens], rows, columns, patch)

  def _place(self, x_BTD, rows, columns, grid_B2):
    """Adds the position to each token, or returns how heads are to turn."""
    config, tokens = self.config, rows * columns
    if config.position == "rope2d":
      rope = positions.rope2d(
        rows, columns, config.head_size, config.rope_theta, grid_B2
      )
      return x_BTD, sequences.even_rope(rope)
    if config.position == "learned":
      table_TD = layers.Table(tokens, config.width, name="pos_embed")()
    elif grid_B2 is None:
      table_TD = positions.sincos2d(rows, columns, config.width)
    else:
      table_TD = positions.sincos2d_within(grid_B2, tokens, config.width)
    return positions.added(x_BTD, sequences.even(table_TD, -2)), None


def _stacked(config: DiTConfig):
  """Returns `depth` blocks, whose parameters share a leading dim."""
  block: Any = Block
  if blocks.REMAT[config.remat] is not None:
    # In a loop the compiler cannot merge the second computation with the first.
    block = nn.remat(
      Block, policy=blocks.REMAT[config.remat], prevent_cse=not config.scan
    )
  return nn.scan(
    block,
    variable_axes={"params": 0},
    split_rngs={"params": True},
    in_axes=(nn.broadcast, nn.broadcast, 0, nn.broadcast),
    length=config.depth,
    unroll=1 if config.scan else config.depth,
  )


def init(config: DiTConfig, rng: jax.Array) -> dict[str, Any]:
  """Draws the parameters, float32."""
  x_BHWC = jnp.zeros((1, *config.image_size, config.channels_in))
  t_B, cond = jnp.zeros(1, jnp.float32), conditions.example(config)
  return DiT(blocks.anywhere(config)).init(rng, x_BHWC, t_B, cond)["params"]


def apply(
  config: DiTConfig,
  params: dict[str, Any],
  x_BHWC: jax.Array,
  t_B: jax.Array,
  cond: dict[str, jax.Array],
  rng: jax.Array | None = None,
  *,
  identity: collections.abc.Sequence[int] = (),
) -> jax.Array:
  """Returns the velocity at (x, t) given cond["label"], in float32.

  Of labels a network of no classes reads none. cond has "context" [B, H, W, K]
  as well, of K = `context_channels`, if any; "size_crop" [B, 6] where the
  network is told sizes; and "grid" [B, 2], rows and columns, where x holds
  patches one under the other.

  With an rng, each label is dropped with probability `label_dropout`. In the
  blocks `identity` a token attends to itself alone.
  """
  _check_inputs(config, x_BHWC, t_B, cond)
  if rng is not None:
    cond = dropped(config, cond, rng)
  identity_L = None
  if identity:
    identity_L = jnp.isin(jnp.arange(config.depth), jnp.array(identity))
  x_BHWC = conditions.with_context(config, x_BHWC, cond)
  v_BHWC = DiT(config).apply({"params": params}, x_BHWC, t_B, cond, identity_L)
  return typing.cast(jax.Array, v_BHWC)


unconditional = conditions.unconditional
example = conditions.example


def _label(config: DiTConfig, t_B: jax.Array, cond) -> jax.Array:
  """Returns the row of the table that each example has."""
  if not config.num_classes:
    return jnp.zeros(t_B.shape, jnp.int32)
  return cond["label"]


def dropped(
  config: DiTConfig, cond: dict[str, jax.Array], rng: jax.Array
) -> dict[str, jax.Array]:
  """Returns `cond` without some labels, each with `label_dropout`."""
  if not config.num_classes:
    return cond
  label_B = cond["label"]
  drop_B = jax.random.bernoulli(rng, config.label_dropout, label_B.shape)
  return {**cond, "label": jnp.where(drop_B, config.num_classes, label_B)}


def check_layers(
  config: DiTConfig, layers: collections.abc.Collection[int]
) -> None:
  """Raises ValueError for blocks that the network cannot be without."""
  if len(set(layers)) >= config.depth:
    raise ValueError(
      f"blocks {tuple(layers)}: at least one of the {config.depth} of this "
      "network must stay."
    )


def without_layers(
  config: DiTConfig,
  params: dict[str, Any],
  layers: collections.abc.Collection[int],
) -> tuple[DiTConfig, dict[str, Any]]:
  """Returns the config and the parameters of a network without some blocks.

  The blocks are stacked: it is a shallower network on a part of the stack.
  """
  kept = np.array([i for i in range(config.depth) if i not in layers])
  stack = jax.tree.map(lambda leaf: leaf[kept], params["blocks"])
  shallow = dataclasses.replace(config, depth=len(kept))
  return shallow, {**params, "blocks": stack}


def with_identity_attention(
  config: DiTConfig, layers: collections.abc.Sequence[int]
) -> collections.abc.Callable[..., jax.Array]:
  """Returns `apply` where, in some blocks, tokens see themselves alone."""
  return functools.partial(apply, config, identity=tuple(layers))


def flops(config: DiTConfig) -> int:
  """Counts the arithmetic of a forward pass per example.

  A multiply-add is two; norms, activations and softmax are left out. For
  width D, T tokens and a GELU MLP of ratio r, a block has
  T 2 (4 + 2r) D^2 + 4 T^2 D + 12 D^2.
  """
  d, tokens = config.width, config.grid[0] * config.grid[1]
  matrices = 2 if config.mlp == "gelu" else 3
  block = (
    2 * tokens * (4 * d * d + matrices * d * config.mlp_width)
    + 4 * tokens * tokens * d
    + 2 * 6 * d * d
  )
  values = config.patch_size**2 * (config.channels_in + config.channels_out)
  ends = 2 * tokens * values * d + 2 * 2 * d * d
  time = 2 * (layers.TIME_FREQUENCIES * d + d * d)
  sizes = 2 * (conditions.size_width(config) * d + d * d)
  time += sizes if config.size_conditioning else 0
  return config.depth * block + ends + time


def _check_ranges(config: DiTConfig) -> None:
  if config.num_classes < 0:
    raise ValueError(
      f"num_classes={config.num_classes} must be positive, or 0 for a network "
      "that is told nothing."
    )
  if not config.frequency_shift < layers.TIME_FREQUENCIES // 2:
    raise ValueError(
      f"frequency_shift={config.frequency_shift} must be below "
      f"{layers.TIME_FREQUENCIES // 2}; 0 is the original DiT's, 1 diffusers'."
    )
  if not 0.0 <= config.label_dropout < 1.0:
    raise ValueError(
      f"label_dropout={config.label_dropout} must be at least 0 and below 1: "
      "with 1 no label is ever seen. 0.1 is usual."
    )


def _check_inputs(config: DiTConfig, x_BHWC, t_B, cond) -> None:
  batch, image_size = checks.image(config, x_BHWC)
  checks.canvas(config, x_BHWC, cond)
  grid = tuple(size // config.patch_size for size in image_size)
  if config.position == "learned" and grid != config.grid:
    raise ValueError(
      f"position='learned' knows a grid of {config.grid[0]}x{config.grid[1]} "
      f"patches, not {grid[0]}x{grid[1]}. Use images of "
      f"{config.image_size[0]}x{config.image_size[1]}, or another position."
    )
  checks.per_example(batch, t=t_B)
  conditions.check_sizes(config, cond, batch)
  if not config.num_classes:
    return
  if "label" not in cond:
    raise ValueError(
      "The network takes cond={'label': [B] integers}, got the keys "
      f"{sorted(cond)}."
    )
  checks.per_example(batch, label=cond["label"])
