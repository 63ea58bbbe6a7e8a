"""FLUX.1: two streams that join, then one (Black Forest Labs, 2024).

First blocks in which text and image have weights of their own, as in SD3
(arXiv:2403.03206); then blocks over both as one sequence, whose attention and
MLP stand side by side (arXiv:2302.05442). No paper describes it; the equations
here are those of the released weights.
"""

# Shape suffixes: B batch, H height, W width, C channels of the image; L text
# tokens, T image tokens, S = L + T, E width of the text, P one flattened patch,
# D width, K parts of a modulation, N heads, H head size, A axes.

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
  joint,
  layers,
  patches,
  positions,
  sequences,
)
from flowjax.ops import attention, axes

# They differ in how they were distilled: "schnell" is not told a guidance, and
# was trained on shorter texts.
SIZES: dict[str, dict[str, Any]] = {
  "dev": dict(guidance_embed=True, text_tokens=512),
  "schnell": dict(guidance_embed=False, text_tokens=256),
}


@dataclasses.dataclass(frozen=True)
class FluxConfig:
  """What a FLUX is made of.

  `rope_axes` are the parts of a head that turn with the index of the image
  (always 0 here), the row and the column. With `guidance_embed` the network is
  told cond["guidance"], or `train_guidance` where that is not given.
  `context_channels` are those of cond["context"], read beside the image.
  `text_tokens` is the length that `flops` counts with; any is taken. With
  `num_classes` the network reads labels, and learns a text for each. With
  `size_conditioning` it is told size and crop of an image, cond["size_crop"].
  """

  name: str = "flux"
  image_size: tuple[int, int] = (128, 128)
  channels: int = 16
  context_channels: int = 0
  patch_size: int = 2
  width: int = 3072
  heads: int = 24
  double_depth: int = 19
  single_depth: int = 38
  mlp_ratio: float = 4.0
  text_width: int = 4096
  pooled_width: int = 768
  text_tokens: int = 512
  rope_axes: tuple[int, int, int] = (16, 56, 56)
  rope_theta: float = 10000.0
  guidance_embed: bool = True
  train_guidance: float = 1.0
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
    checks.choices(self, name=("flux",))
    checks.positive(
      self,
      "channels patch_size width heads double_depth single_depth mlp_ratio "
      "rope_theta timestep_scale",
    )
    checks.patches(self.image_size, self.patch_size)
    checks.context(self)
    _check_heads(self)
    conditions.check_config(self)

  @property
  def head_size(self) -> int:
    return self.width // self.heads

  @property
  def channels_in(self) -> int:
    return self.channels + self.context_channels

  @property
  def mlp_width(self) -> int:
    return int(self.mlp_ratio * self.width)

  @property
  def grid(self) -> tuple[int, int]:
    """Rows and columns of patches."""
    height, width = self.image_size
    return height // self.patch_size, width // self.patch_size

  @property
  def depth(self) -> int:
    """How many blocks there are of both kinds."""
    return self.double_depth + self.single_depth


class Attention(joint.Attention):
  """Attention among all tokens, without a bias at its end.

  The MLP beside it has that bias for both.
  """

  answers: bool = False

  def setup(self):
    super().setup()
    self.out = layers.Dense(
      (self.width,),
      contract=2,
      dtype=self.dtype,
      bias=False,
      tokens="tokens",
      split="heads",
      summed=False,
    )


class SingleBlock(nn.Module):
  """One block over text and image as one sequence, modulated by c.

  x + gate (A y + M y) with y = (1 + scale) LayerNorm(x) + shift: attention A
  and MLP M read the same y, and are added.
  """

  config: FluxConfig

  @nn.compact
  def __call__(self, x_BSD, c_BD, rope, mask_BS):
    config = self.config
    dtype = blocks.DTYPES[config.dtype]
    modulation_BKD = layers.Dense(
      (3, config.width), 1, dtype, layers.zeros, name="modulation"
    )(c_BD)
    shift_BD, scale_BD, gate_BD = jnp.unstack(
      blocks.saved(modulation_BKD, "modulation"), axis=1
    )
    y_BSD = layers.modulated_norm(x_BSD, shift_BD, scale_BD, joint.EPSILON)

    maps = Attention(
      config.width,
      config.heads,
      config.head_size,
      qk_norm=True,
      dtype=dtype,
      name="attention",
    )
    heads_BSNH = attention.attention(
      *maps.ask(y_BSD, rope), body=config.attention, mask_BS=mask_BS
    )
    # Devices that have some heads and hidden units sum for both at once.
    hidden_BSD = blocks.Mlp("gelu", config.mlp_width, dtype, name="mlp")(
      y_BSD, beside=maps.answer(heads_BSNH)
    )

    # The sum is what the gradient reads: saved, its terms need not be.
    hidden_BSD = blocks.saved(hidden_BSD, "mlp_out")
    x_BSD = layers.add_gated(x_BSD, gate_BD, hidden_BSD)
    return axes.name(x_BSD, "batch", "tokens", "width"), None


class Flux(nn.Module):
  """From a noisy image, its time and what it shows to a velocity."""

  config: FluxConfig

  @nn.compact
  def __call__(self, x_BHWC, t_B, cond):
    config = self.config
    dtype, patch = blocks.DTYPES[config.dtype], config.patch_size
    rows, columns = (size // patch for size in x_BHWC.shape[1:3])
    text_BLE, pooled_BP, text_mask_BL = conditions.read(config, cond)
    grid_B2 = cond.get("grid")

    embed = functools.partial(
      layers.Dense, (config.width,), dtype=dtype, tokens="tokens"
    )
    x_BTP = sequences.even(patches.patchify(x_BHWC, patch))
    streams = tuple(
      axes.name(stream, "batch", "tokens", "width")
      for stream in (
        embed(name="text_embed")(sequences.even(text_BLE)),
        embed(name="patch_embed")(x_BTP),
      )
    )
    (batch, length), tokens = text_BLE.shape[:2], rows * columns
    masks = (
      sequences.seen(text_mask_BL, batch, length),
      sequences.seen(positions.inside(grid_B2, tokens), batch, tokens),
    )
    c_BD = nn.silu(self._condition(t_B, pooled_BP, cond))

    ropes = _ropes(config, length, rows, columns, grid_B2)
    x_BSD = self._joined(streams, c_BD, ropes, masks)
    lengths = tuple(stream.shape[1] for stream in streams)
    single = _repeated(SingleBlock, config, config.single_depth)
    x_BSD, _ = single(config, name="single_blocks")(
      x_BSD,
      c_BD,
      sequences.woven_rope(*ropes),
      sequences.woven_masks(*masks, batch, lengths),
    )

    _, image_BTD = sequences.parted(x_BSD, lengths[0])
    image_BTD = axes.name(image_BTD, "batch", "tokens", "width")
    x_BTP = blocks.Final(
      patch * patch * config.channels, norm="layernorm", name="final"
    )(image_BTD, c_BD)
    return patches.unpatchify(x_BTP[:, :tokens], rows, columns, patch)

  def _condition(self, t_B, pooled_BP, cond):
    """Returns the sum of what time, guidance and text are embedded to."""
    config = self.config
    scaled_B = config.timestep_scale * t_B.astype(jnp.float32)
    sum_BD = layers.TimeEmbed(config.width, name="time_embed")(scaled_B)
    if config.guidance_embed:
      default_B = jnp.full(t_B.shape, config.train_guidance)
      guidance_B = cond.get("guidance", default_B).astype(jnp.float32)
      sum_BD += layers.TimeEmbed(config.width, name="guidance_embed")(
        config.timestep_scale * guidance_B
      )
    return sum_BD + conditions.PooledEmbed(config.width, name="pooled_embed")(
      pooled_BP
    )

  def _joined(self, streams, c_BD, ropes, masks):
    """Returns the sequence that two streams make, after their blocks."""
    config = self.config
    double = _repeated(joint.JointBlock, config, config.double_depth)
    # Text is at the origin, where nothing turns.
    streams, _ = double(
      config.width,
      config.heads,
      config.head_size,
      config.mlp_width,
      qk_norm=True,
      body=config.attention,
      dtype=blocks.DTYPES[config.dtype],
      name="double_blocks",
    )(streams, c_BD, (None, ropes[1]), masks)
    x_BSD = sequences.woven(*streams)
    return axes.name(x_BSD, "batch", "tokens", "width")


def _repeated(block: Any, config: FluxConfig, depth: int):
  return joint.repeated(block, depth, scan=config.scan, remat=config.remat)


def _ropes(config: FluxConfig, length: int, rows: int, columns: int, grid_B2):
  """Returns how to turn text at the origin, and image at (0, row, column)."""
  way = config.rope_axes, config.rope_theta
  text = positions.rope_axes(np.zeros((length, 3)), *way)
  image = positions.rope_of_image(rows, columns, grid_B2, *way)
  return sequences.even_rope(text), sequences.even_rope(image)


def init(config: FluxConfig, rng: jax.Array) -> dict[str, Any]:
  """Draws the parameters, float32."""
  x_BHWC = jnp.zeros((1, *config.image_size, config.channels_in))
  t_B, cond = jnp.zeros(1, jnp.float32), conditions.example(config)
  return Flux(blocks.anywhere(config)).init(rng, x_BHWC, t_B, cond)["params"]


def apply(
  config: FluxConfig,
  params: dict[str, Any],
  x_BHWC: jax.Array,
  t_B: jax.Array,
  cond: dict[str, Any],
  rng: jax.Array | None = None,
) -> jax.Array:
  """Returns the velocity at (x, t) given cond, in float32.

  cond has "text" [B, L, E] and "pooled" [B, P], or "label" [B], and "context"
  [B, H, W, K] of K = `context_channels`, if any, and "size_crop" [B, 6] where
  the network is told sizes; it may have "text_mask" [B, L], "negative" and
  "guidance" [B], and has "grid" [B, 2], rows and columns, where x holds patches
  one under the other. With an rng, each example loses its text or label with
  probability `condition_dropout`.
  """
  _check_inputs(config, x_BHWC, t_B, cond)
  if rng is not None:
    cond = conditions.dropped(config, cond, rng)
  x_BHWC = conditions.with_context(config, x_BHWC, cond)
  v_BHWC = Flux(config).apply({"params": params}, x_BHWC, t_B, cond)
  return typing.cast(jax.Array, v_BHWC)


unconditional = conditions.unconditional
example = conditions.example
dropped = conditions.dropped


def check_layers(
  config: FluxConfig, layers: collections.abc.Collection[int]
) -> None:
  """Raises ValueError for blocks that the network cannot be without."""
  for name, numbers in _numbers(config).items():
    if set(numbers) <= set(layers):
      raise ValueError(
        f"blocks {tuple(layers)} are all {name}, {numbers[0]} to {numbers[-1]}:"
        " one of them must stay."
      )


def without_layers(
  config: FluxConfig,
  params: dict[str, Any],
  layers: collections.abc.Collection[int],
) -> tuple[FluxConfig, dict[str, Any]]:
  """Returns the config and the parameters of a network without some blocks."""
  groups = _numbers(config)
  shallow, (double, single) = joint.without(params, groups, layers)
  changed = dataclasses.replace(
    config, double_depth=double, single_depth=single
  )
  return changed, shallow


def _numbers(config: FluxConfig) -> dict[str, range]:
  """Returns the numbers of the blocks, from 0, the double ones first."""
  return {
    "double_blocks": range(config.double_depth),
    "single_blocks": range(config.double_depth, config.depth),
  }


def flops(config: FluxConfig) -> int:
  """Counts the arithmetic of a forward pass per example.

  A multiply-add is two; norms, activations and softmax are left out. For
  width D, an MLP of width F and S tokens of both kinds, a block of either kind
  has S (8 D^2 + 4 D F) + 4 S^2 D, and its modulation, of 12 parts or 3, 2 D^2
  for each.
  """
  d, tokens = config.width, config.grid[0] * config.grid[1]
  length = conditions.text_length(config)
  both = length + tokens
  block = both * (8 * d * d + 4 * d * config.mlp_width) + 4 * both * both * d
  double = config.double_depth * (block + 2 * 12 * d * d)
  single = config.single_depth * (block + 2 * 3 * d * d)

  values = config.patch_size**2 * (config.channels_in + config.channels)
  ends = 2 * d * (tokens * values + length * config.text_width + 2 * d)
  times = 2 if config.guidance_embed else 1
  inputs = times * layers.TIME_FREQUENCIES + conditions.told_width(config)
  return double + single + ends + 2 * d * (inputs + (times + 1) * d)


def _check_heads(config: FluxConfig) -> None:
  width, heads = config.width, config.heads
  if width % heads:
    raise ValueError(
      f"heads={heads} does not divide width={width}. A width that it divides "
      f"is {heads * sum(config.rope_axes)}, of heads as rope_axes cuts them."
    )
  parts = config.rope_axes
  if sum(parts) != config.head_size or any(n <= 0 or n % 2 for n in parts):
    raise ValueError(
      f"rope_axes={parts} cuts a head of {config.head_size} (width={width} / "
      f"heads={heads}) into pairs that turn: use three even sizes that sum to "
      f"{config.head_size}."
    )


def _check_inputs(config: FluxConfig, x_BHWC, t_B, cond) -> None:
  batch, _ = checks.image(config, x_BHWC)
  checks.canvas(config, x_BHWC, cond)
  conditions.check(config, cond, batch)
  if "guidance" in cond and not config.guidance_embed:
    raise ValueError(
      "cond has 'guidance', and guidance_embed=False: this network is not "
      "told one. Leave it out, or use guidance_embed=True, as FLUX.1-dev does."
    )
  checks.per_example(batch, t=t_B, guidance=cond.get("guidance", t_B))
