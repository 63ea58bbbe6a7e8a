"""The transformer of Stable Diffusion 3 and 3.5 (MM-DiT, arXiv:2403.03206).

Image and text are two streams with weights of their own, which attend
together; the time and the pooled text modulate both.
"""

# Shape suffixes: B batch, H height, W width, C channels of the image;
# T image tokens, L text tokens, P one flattened patch, D width, E width of the
# text.

import collections.abc
import dataclasses
import functools
import typing
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from flowjax.models import (
  blocks,
  checks,
  conditions,
  joint,
  layers,
  patches,
  positions,
  sequences,
)
from flowjax.ops import axes

# The published ones: 2.03, 2.24 and 8.06 billion parameters.
SIZES: dict[str, dict[str, Any]] = {
  "sd3_medium": dict(depth=24, heads=24),
  "sd3.5_medium": dict(
    depth=24, heads=24, qk_norm=True, dual_layers=13, position_table=384
  ),
  "sd3.5_large": dict(depth=38, heads=38, qk_norm=True),
}
POSITIONS = ("sincos2d", "rope2d")


@dataclasses.dataclass(frozen=True)
class MMDiTConfig:
  """What an MM-DiT is made of.

  `dual_layers` is how many of the first blocks have an attention of the image
  alone beside the joint one. "sincos2d" cuts the centre out of a table of
  `position_table` x `position_table` places, whose rows and columns p stand at
  `position_scale` * (p - `position_offset`); "rope2d" turns the tokens of the
  image.
  `context_channels` are those of cond["context"], read beside the image.
  `text_tokens` is the length for which arithmetic is counted: any will do.
  With `num_classes` above 0 the network reads labels, and learns a text of
  `label_tokens` for each. With `size_conditioning` it is told size and crop of
  an image, cond["size_crop"]. `timestep_scale` multiplies t in [0, 1] before
  its sinusoid. `remat` is a key of `blocks.REMAT`.
  """

  name: str = "mmdit"
  image_size: tuple[int, int] = (128, 128)
  channels: int = 16
  context_channels: int = 0
  out_channels: int | None = None
  patch_size: int = 2
  depth: int = 24
  heads: int = 24
  head_size: int = 64
  mlp_ratio: float = 4.0
  text_width: int = 4096
  pooled_width: int = 2048
  text_tokens: int = 154
  position: str = "sincos2d"
  position_table: int = 192
  position_scale: float = 1.0
  position_offset: float = 0.0
  rope_theta: float = 10000.0
  qk_norm: bool = False
  dual_layers: int = 0
  num_classes: int = 0
  label_tokens: int = 8
  condition_dropout: float = 0.1
  size_conditioning: bool = False
  timestep_scale: float = 1000.0
  scan: bool = True
  remat: str = "none"
  attention: str = "auto"
  dtype: str = "float32"

  def __post_init__(self):
    checks.choices(self, name=("mmdit",), position=POSITIONS)
    checks.positive(
      self,
      "channels patch_size depth heads head_size mlp_ratio position_table "
      "position_scale rope_theta timestep_scale channels_out",
    )
    checks.patches(self.image_size, self.patch_size)
    checks.context(self)
    _check_ranges(self)
    _check_table(self, self.image_size)
    _check_heads(self)
    conditions.check_config(self)

  @property
  def width(self) -> int:
    return self.heads * self.head_size

  @property
  def mlp_width(self) -> int:
    return int(self.mlp_ratio * self.width)

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
  def like_layers(self) -> int:
    """How many blocks stand between the dual ones and the last."""
    return self.depth - self.dual_layers - 1


class MMDiT(nn.Module):
  """From a noisy image, its time and its text to a velocity."""

  config: MMDiTConfig

  @nn.compact
  def __call__(self, x_BHWC, t_B, cond):
    config = self.config
    patch = config.patch_size
    rows, columns = (size // patch for size in x_BHWC.shape[1:3])
    text_BLE, pooled_BP, text_mask_BL = conditions.read(config, cond)
    grid_B2 = cond.get("grid")

    embed = functools.partial(
      layers.Dense,
      (config.width,),
      dtype=blocks.DTYPES[config.dtype],
      tokens="tokens",
    )
    x_BTP = sequences.even(patches.patchify(x_BHWC, patch))
    x_BTD, rope = _place(
      config,
      embed(name="patch_embed")(x_BTP),
      rows,
      columns,
      grid_B2,
    )
    text_BLD = embed(name="text_embed")(sequences.even(text_BLE))
    (batch, length), tokens = text_BLE.shape[:2], rows * columns
    streams = tuple(
      axes.name(stream, "batch", "tokens", "width")
      for stream in (text_BLD, x_BTD)
    )
    masks = (
      sequences.seen(text_mask_BL, batch, length),
      sequences.seen(positions.inside(grid_B2, tokens), batch, tokens),
    )

    time_BD = layers.TimeEmbed(config.width, name="time_embed")(
      config.timestep_scale * t_B.astype(jnp.float32)
    )
    pooled_BD = conditions.PooledEmbed(config.width, name="pooled_embed")(
      pooled_BP
    )
    c_BD = nn.silu(time_BD + pooled_BD)

    for layers_of_kind in _blocks(config):
      streams, _ = layers_of_kind(streams, c_BD, (None, rope), masks)
    _, x_BTD = streams
    x_BTP = blocks.Final(
      patch * patch * config.channels_out, norm="layernorm", name="final"
    )(x_BTD, c_BD)
    return patches.unpatchify(x_BTP[:, :tokens], rows, columns, patch)


def _place(config: MMDiTConfig, x_BTD, rows: int, columns: int, grid_B2):
  """Adds the position to each token, or returns how heads are to turn."""
  tokens = rows * columns
  if config.position == "rope2d":
    rope = positions.rope2d(
      rows, columns, config.head_size, config.rope_theta, grid_B2
    )
    return x_BTD, sequences.even_rope(rope)
  table = (
    config.width,
    config.position_table,
    config.position_scale,
    config.position_offset,
  )
  if grid_B2 is None:
    table_TD: Any = positions.sincos2d_centre(rows, columns, *table)
  else:
    table_TD = positions.sincos2d_centre_within(grid_B2, tokens, *table)
  return positions.added(x_BTD, sequences.even(table_TD, -2)), None


def _blocks(config: MMDiTConfig) -> list[nn.Module]:
  """Returns the blocks in their order, like ones stacked.

  The last is alone: its text is seen, and not carried on.
  """
  parts = dict(
    width=config.width,
    heads=config.heads,
    head_size=config.head_size,
    mlp_width=config.mlp_width,
    qk_norm=config.qk_norm,
    body=config.attention,
    dtype=blocks.DTYPES[config.dtype],
  )
  stack = functools.partial(
    joint.repeated, joint.JointBlock, scan=config.scan, remat=config.remat
  )
  found = []
  if config.dual_layers:
    dual = stack(config.dual_layers)
    found.append(dual(**parts, second=True, name="dual_blocks"))
  if config.like_layers:
    found.append(stack(config.like_layers)(**parts, name="blocks"))
  last = joint.remade(joint.JointBlock, config.remat)
  return [*found, last(**parts, last=True, name="last_block")]


def init(config: MMDiTConfig, rng: jax.Array) -> dict[str, Any]:
  """Draws the parameters, float32."""
  x_BHWC = jnp.zeros((1, *config.image_size, config.channels_in))
  cond = conditions.example(config)
  return MMDiT(blocks.anywhere(config)).init(rng, x_BHWC, jnp.zeros(1), cond)[
    "params"
  ]


def apply(
  config: MMDiTConfig,
  params: dict[str, Any],
  x_BHWC: jax.Array,
  t_B: jax.Array,
  cond: conditions.Cond,
  rng: jax.Array | None = None,
) -> jax.Array:
  """Returns the velocity at (x, t) given the text, in float32.

  cond has "text" [B, L, E], "pooled" [B, P] and, if some of the tokens are
  padding, "text_mask" [B, L], true where a token is real; or "label" [B]; and
  "context" [B, H, W, K] of K = `context_channels`, if any; "size_crop" [B, 6]
  where it is told sizes; "grid" [B, 2], rows and columns, where x holds patches
  one under the other. With an rng, each text or label is dropped with
  `condition_dropout`.
  """
  _check_inputs(config, x_BHWC, t_B, cond)
  if rng is not None:
    cond = conditions.dropped(config, cond, rng)
  x_BHWC = conditions.with_context(config, x_BHWC, cond)
  v_BHWC = MMDiT(config).apply({"params": params}, x_BHWC, t_B, cond)
  return typing.cast(jax.Array, v_BHWC)


unconditional = conditions.unconditional
example = conditions.example
dropped = conditions.dropped


def check_layers(
  config: MMDiTConfig, layers: collections.abc.Collection[int]
) -> None:
  """Raises ValueError for blocks that the network cannot be without."""
  if config.depth - 1 in layers:
    raise ValueError(
      f"blocks {tuple(layers)}: the last of an MM-DiT, {config.depth - 1}, has "
      "parameters of another kind, and must stay."
    )


def without_layers(
  config: MMDiTConfig,
  params: dict[str, Any],
  layers: collections.abc.Collection[int],
) -> tuple[MMDiTConfig, dict[str, Any]]:
  """Returns the config and the parameters of a network without some blocks.

  Blocks count from 0, the dual ones first.
  """
  groups = {
    "dual_blocks": range(config.dual_layers),
    "blocks": range(config.dual_layers, config.depth - 1),
  }
  shallow, (dual, like) = joint.without(params, groups, layers)
  changed = dataclasses.replace(config, dual_layers=dual, depth=dual + like + 1)
  return changed, shallow


def flops(config: MMDiTConfig) -> int:
  """Counts the arithmetic of a forward pass per example.

  A multiply-add is two; norms, activations and softmax are left out. For
  width D, an MLP of ratio r, T tokens of image and L of text, a block has
  (T + L) 2 (4 + 2r) D^2 + 4 (T + L)^2 D + 2 (6 + 6) D^2. A dual one has
  T 8 D^2 + 4 T^2 D + 2 3 D^2 more; in the last the text has neither an MLP nor
  a map from its attention, and two parts of modulation instead of six.
  """
  d, image = config.width, config.grid[0] * config.grid[1]
  text = conditions.text_length(config)
  mlp = 2 * d * config.mlp_width
  block = (
    2 * (image + text) * (4 * d * d + mlp)
    + 4 * (image + text) ** 2 * d
    + 2 * (6 + 6) * d * d
  )
  dual = 2 * image * 4 * d * d + 4 * image**2 * d + 2 * 3 * d * d
  absent = 2 * text * (d * d + mlp) + 2 * 4 * d * d
  values = config.patch_size**2 * (config.channels_in + config.channels_out)
  ends = 2 * d * (image * values + text * config.text_width + 2 * d)
  time = 2 * d * (layers.TIME_FREQUENCIES + d)
  pooled = 2 * d * (conditions.told_width(config) + d)
  stack = config.depth * block + config.dual_layers * dual - absent
  return stack + ends + time + pooled


def _check_ranges(config: MMDiTConfig) -> None:
  if not 0 <= config.dual_layers < config.depth:
    raise ValueError(
      f"dual_layers={config.dual_layers} must be at least 0 and below depth="
      f"{config.depth}: the last block has no second attention."
    )


def _check_table(config: MMDiTConfig, image_size: tuple[int, ...]) -> None:
  height, width = image_size
  patch, side = config.patch_size, config.position_table
  if config.position == "sincos2d" and max(image_size) > patch * side:
    raise ValueError(
      f"An image of {height}x{width} is a grid of {height // patch}x"
      f"{width // patch} patches, and does not fit into a table of positions "
      f"of {side}x{side} (position_table={side}). Use a larger table, which "
      "moves its centre, so that weights have to be trained for it; or "
      "position='rope2d', which has no end."
    )


def _check_heads(config: MMDiTConfig) -> None:
  if config.position == "rope2d" and config.head_size % 4:
    raise ValueError(
      "position='rope2d' splits a head into rows and columns and each into "
      f"pairs, so that head_size={config.head_size} must be divisible by 4. Or "
      "use position='sincos2d'."
    )
  if config.width % 4:
    raise ValueError(
      f"position='sincos2d' splits the width into four, and {config.width} "
      f"(heads={config.heads} of head_size={config.head_size}) is not "
      "divisible by 4."
    )


def _check_inputs(config: MMDiTConfig, x_BHWC, t_B, cond) -> None:
  batch, image_size = checks.image(config, x_BHWC)
  if not checks.canvas(config, x_BHWC, cond):
    _check_table(config, image_size)
  checks.per_example(batch, t=t_B)
  conditions.check(config, cond, batch)
