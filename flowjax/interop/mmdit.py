"""Where the weights of an MM-DiT (SD3, SD3.5) live in other people's files."""

import dataclasses
import math
from typing import Any

import numpy as np

from flowjax.interop import held, lazy, tables
from flowjax.models import layers, mmdit, positions

# M dual layers, L like ones after them; D width and E the same where both
# sides have it; N heads, H head size; F hidden width of the MLP; p, q rows and
# columns of a patch, C its channels, O values of one that comes out; X features
# of the time, Y width of the pooled text, J of the text. Parts of a fused
# linear: P query, key, value; S shift, scale, gate of attention and of the MLP;
# G the same and those of the second attention; R shift, scale. For our own
# torch: I values of a patch that goes in, K labels and the one for none, T
# tokens of the text that is learned for each.

POSITIONS, POSITIONS_IN_DIFFUSERS = "pos_embed", "pos_embed.pos_embed"
_QKV = ("q", "k", "v")

# What is theirs to choose in our config, and fixed in the code that will read
# the weights.
_FIXED = {
  "num_classes": 0,
  "position": "sincos2d",
  "mlp_ratio": 4.0,
  "timestep_scale": 1000.0,
}
_HELD = {"diffusers": _FIXED, "original": _FIXED | {"context_channels": 0}}


@dataclasses.dataclass(frozen=True)
class _Blocks:
  """Like blocks of ours, and where among all layers theirs are."""

  ours: str
  layer: str  # what stands for the layer in their key
  names: dict[str, tuple[str, ...]]
  dual: bool = False
  last: bool = False


def torch_layout(config: mmdit.MMDiTConfig) -> tables.Table:
  """Returns the table to the state dict of `interop/torch/mmdit.py`."""
  rules = [
    *tables.linear("patch_embed", "patch_embed", "I -> D"),
    *tables.linear("text_embed", "text_embed", "J -> D"),
    *tables.linear("time_embed/in", "time_embed.in_proj", "X -> D"),
    *tables.linear("time_embed/out", "time_embed.out_proj", "E -> D"),
    *tables.linear("pooled_embed/in", "pooled_embed.in_proj", "Y -> D"),
    *tables.linear("pooled_embed/out", "pooled_embed.out_proj", "E -> D"),
    *tables.linear("final/modulation", "final.modulation", "E -> R D"),
    *tables.linear("final/out", "final.out_proj", "D -> O"),
  ]
  if config.num_classes:
    rules += [
      tables.Rule("label_embed/text", "label_embed.text", "K T J -> K T J"),
      tables.Rule("label_embed/pooled", "label_embed.pooled", "K Y -> K Y"),
    ]
  for like in _like_blocks(config):
    for stream in ("image", "text"):
      ours, theirs = f"{like.ours}/{stream}", f"blocks.{like.layer}.{stream}"
      ends = like.last and stream == "text"
      rules += _modulation(like, stream, f"{theirs}.modulation")
      second = ["attention2"] if like.dual and stream == "image" else []
      for name in ["attention", *second]:
        attention = f"{theirs}.{name}"
        norms = f"{attention}.query_norm", f"{attention}.key_norm"
        rules += _attention(
          config, like, f"{ours}/{name}", f"{attention}.qkv", norms
        )
        if not ends:
          rules += _out(like, f"{ours}/{name}", f"{attention}.out_proj")
      if not ends:
        maps = f"{theirs}.mlp.in_proj", f"{theirs}.mlp.out_proj"
        rules += _mlp(like, ours, *maps)
  return tables.Table(tuple(rules), _sizes(config))


def diffusers_layout(config: mmdit.MMDiTConfig) -> tables.Table:
  """Returns the table to the state dict of `SD3Transformer2DModel`.

  Where there is no gate, in the last modulation of each stream, it is (scale,
  shift), and ours (shift, scale).
  """
  _require(config, "diffusers")
  embed = "time_text_embed.{}_embedder.linear_{}"
  rules = [
    *_patch_embed("pos_embed.proj"),
    *tables.linear("text_embed", "context_embedder", "J -> D"),
    *tables.linear("time_embed/in", embed.format("timestep", 1), "X -> D"),
    *tables.linear("time_embed/out", embed.format("timestep", 2), "E -> D"),
    *tables.linear("pooled_embed/in", embed.format("text", 1), "Y -> D"),
    *tables.linear("pooled_embed/out", embed.format("text", 2), "E -> D"),
    *tables.linear("final/modulation", "norm_out.linear", "E -> R D", flip="R"),
    *tables.linear("final/out", "proj_out", "D -> O"),
  ]
  for like in _like_blocks(config):
    ours, theirs = like.ours, f"transformer_blocks.{like.layer}"
    for stream, norm, qkv, qk_norm, out, mlp in (
      ("image", "norm1", "attn.to_{P}", "attn.norm_", "attn.to_out.0", "ff"),
      ("text", "norm1_context", "attn.add_{P}_proj", "attn.norm_added_")
      + ("attn.to_add_out", "ff_context"),
    ):
      ends = like.last and stream == "text"
      rules += _modulation(like, stream, f"{theirs}.{norm}.linear", flip=True)
      attention = f"{ours}/{stream}/attention"
      rules += _attention(
        config,
        like,
        attention,
        f"{theirs}.{qkv}",
        _short(f"{theirs}.{qk_norm}"),
      )
      if not ends:
        rules += _out(like, attention, f"{theirs}.{out}")
        mlp = f"{theirs}.{mlp}.net"
        rules += _mlp(like, f"{ours}/{stream}", f"{mlp}.0.proj", f"{mlp}.2")
    if like.dual:
      second, attention = f"{ours}/image/attention2", f"{theirs}.attn2"
      rules += _attention(
        config,
        like,
        second,
        attention + ".to_{P}",
        _short(f"{attention}.norm_"),
      )
      rules += _out(like, second, f"{attention}.to_out.0")
  return tables.Table(
    tuple(rules),
    _sizes(config),
    {POSITIONS_IN_DIFFUSERS: _position_table(config)},
  )


def original_layout(config: mmdit.MMDiTConfig) -> tables.Table:
  """Returns the table to the state dict of Stability's reference, no prefix.

  Their code reads the number of layers, and of heads of size 64, off the
  width: both are width / 64.
  """
  _require(config, "original")
  rules = [
    *_patch_embed("x_embedder.proj"),
    *tables.linear("text_embed", "context_embedder", "J -> D"),
    *tables.linear("time_embed/in", "t_embedder.mlp.0", "X -> D"),
    *tables.linear("time_embed/out", "t_embedder.mlp.2", "E -> D"),
    *tables.linear("pooled_embed/in", "y_embedder.mlp.0", "Y -> D"),
    *tables.linear("pooled_embed/out", "y_embedder.mlp.2", "E -> D"),
    *tables.linear(
      "final/modulation", "final_layer.adaLN_modulation.1", "E -> R D"
    ),
    *tables.linear("final/out", "final_layer.linear", "D -> O"),
  ]
  for like in _like_blocks(config):
    for stream, block in (("image", "x_block"), ("text", "context_block")):
      ours = f"{like.ours}/{stream}"
      theirs = f"joint_blocks.{like.layer}.{block}"
      rules += _modulation(like, stream, f"{theirs}.adaLN_modulation.1")
      pairs = [(f"{ours}/attention", f"{theirs}.attn")]
      if like.dual and stream == "image":
        pairs.append((f"{ours}/attention2", f"{theirs}.attn2"))
      for attention, attn in pairs:
        rules += _attention(
          config, like, attention, f"{attn}.qkv", _short(f"{attn}.ln_")
        )
        if not (like.last and stream == "text"):
          rules += _out(like, attention, f"{attn}.proj")
      if not (like.last and stream == "text"):
        rules += _mlp(like, ours, f"{theirs}.mlp.fc1", f"{theirs}.mlp.fc2")
  return tables.Table(
    tuple(rules), _sizes(config), {POSITIONS: _position_table(config)}
  )


def diffusers_config(config: mmdit.MMDiTConfig) -> dict[str, Any]:
  """Returns the arguments of the `SD3Transformer2DModel` of that config."""
  _require(config, "diffusers")
  return {
    "sample_size": max(config.image_size),
    "patch_size": config.patch_size,
    "in_channels": config.channels_in,
    "out_channels": config.channels_out,
    "num_layers": config.depth,
    "attention_head_dim": config.head_size,
    "num_attention_heads": config.heads,
    "joint_attention_dim": config.text_width,
    "caption_projection_dim": config.width,
    "pooled_projection_dim": config.pooled_width,
    "pos_embed_max_size": config.position_table,
    "dual_attention_layers": list(range(config.dual_layers)),
    "qk_norm": "rms_norm" if config.qk_norm else None,
  }


def is_grid(shape: tuple[int, ...]) -> bool:
  """Says whether a table [1, T, D] of square images can have this shape."""
  if len(shape) != 3 or shape[0] != 1 or min(shape) == 0 or shape[2] % 4:
    return False
  return math.isqrt(shape[1]) ** 2 == shape[1]


def grid_of(table_1TD: np.ndarray) -> dict[str, float]:
  """Returns the fields of our config that give their table of positions.

  Released and fresh weights differ in the grid of the table. Its first row
  holds the sines and cosines of w_i scale (p - offset), i = 0, 1, ...; the
  scale is the slope of the first angle over p. The angle at p = 0 is known up
  to whole turns: none in the slowest wave, and from each the next is found.
  Where whole places of the table for the scale, and halves of one for the
  offset, give the same table, they are returned.
  """
  side = math.isqrt(table_1TD.shape[1])
  exact = tables.tolerance(table_1TD.dtype)
  waves = table_1TD[0, :side, : table_1TD.shape[2] // 2].astype(np.float64)
  sines_XF, cosines_XF = np.split(waves, 2, axis=1)
  angle_XF = np.arctan2(sines_XF, cosines_XF)
  scale = np.polyfit(np.arange(side), np.unwrap(angle_XF[:, 0]), 1)[0]

  count, start = angle_XF.shape[1], 0.0
  for i in reversed(range(count)):
    frequency = 10000.0 ** -(i / count)
    turns = np.round((start * frequency - angle_XF[0, i]) / (2.0 * np.pi))
    start = (angle_XF[0, i] + 2.0 * np.pi * turns) / frequency
  return {
    "position_scale": _rounded(scale, side, exact / side),
    "position_offset": _rounded(-start / scale, 2, exact / scale),
  }


def _rounded(value: float, parts: int, tolerance: float) -> float:
  """Returns the nearest multiple of 1 / parts, if it is near enough."""
  nearest = round(value * parts) / parts
  return nearest if abs(value - nearest) <= tolerance else float(value)


def _like_blocks(config: mmdit.MMDiTConfig) -> list[_Blocks]:
  found = []
  if config.dual_layers:
    found.append(_Blocks("dual_blocks", "{M}", {}, dual=True))
  if config.like_layers:
    layer_names = map(str, range(config.dual_layers, config.depth - 1))
    found.append(_Blocks("blocks", "{L}", {"L": tuple(layer_names)}))
  found.append(_Blocks("last_block", str(config.depth - 1), {}, last=True))
  return found


def _modulation(
  like: _Blocks, stream: str, theirs: str, *, flip: bool = False
) -> tuple[tables.Rule, ...]:
  """Returns the rules of a modulation; `flip` is for one without a gate."""
  ours, names = f"{like.ours}/{stream}/modulation", like.names
  if like.last and stream == "text":
    return tables.linear(
      ours, theirs, "E -> R D", names=names, flip="R" if flip else ""
    )
  parts = "G" if like.dual and stream == "image" else "S"
  return tables.linear(ours, theirs, f"E -> {parts} D", names=names)


def _attention(
  config: mmdit.MMDiTConfig,
  like: _Blocks,
  ours: str,
  qkv: str,
  norms: tuple[str, str],
) -> list[tables.Rule]:
  """Returns the rules of the maps into attention, and of the norms there."""
  names = {**like.names, **({"P": _QKV} if "{P}" in qkv else {})}
  rules = list(tables.linear(f"{ours}/qkv", qkv, "D -> P N H", names=names))
  if config.qk_norm:
    stack = "" if like.last else like.layer.strip("{}") + " "
    rules += [
      tables.Rule(
        f"{ours}/{name}_norm/scale",
        f"{norm}.weight",
        f"{stack}H -> {stack}H",
        names=like.names,
      )
      for name, norm in zip(("query", "key"), norms, strict=True)
    ]
  return rules


def _short(norm: str) -> tuple[str, str]:
  """Returns the keys of two norms that are told apart by a letter."""
  return f"{norm}q", f"{norm}k"


def _out(like: _Blocks, ours: str, theirs: str) -> tuple[tables.Rule, ...]:
  return tables.linear(f"{ours}/out", theirs, "N H -> D", names=like.names)


def _mlp(
  like: _Blocks, ours: str, first: str, second: str
) -> tuple[tables.Rule, ...]:
  return (
    *tables.linear(f"{ours}/mlp/in", first, "D -> F", names=like.names),
    *tables.linear(f"{ours}/mlp/out", second, "F -> D", names=like.names),
  )


def _patch_embed(theirs: str) -> tuple[tables.Rule, ...]:
  """Returns the rules of a convolution that is a linear map of patches."""
  return (
    tables.Rule(
      "patch_embed/kernel", f"{theirs}.weight", "(p q C) D -> D C p q"
    ),
    tables.Rule("patch_embed/bias", f"{theirs}.bias", "D -> D"),
  )


def _position_table(config: mmdit.MMDiTConfig) -> lazy.Array:
  """Returns their buffer [1, T, D]: a whole table, of which ours is the cut."""
  side = config.position_table

  def make():
    grid = config.position_scale, config.position_offset
    return positions.sincos2d_centre(side, side, config.width, side, *grid)[
      None
    ]

  return lazy.Array((1, side * side, config.width), make)


def _require(config: mmdit.MMDiTConfig, format: str) -> None:
  found = {name: held.faults(config, _HELD[name]) for name in _HELD}
  shape = config.head_size, config.depth
  if shape != (64, config.heads):
    found["original"].append(
      f"depth = {config.depth}, heads = {config.heads} of head_size = "
      f"{config.head_size}, there width / 64 = {config.width / 64:g} is both"
    )
  held.require(format, "SD3", found)


def _sizes(config: mmdit.MMDiTConfig) -> dict[str, int]:
  return {
    "M": config.dual_layers,
    "L": config.like_layers,
    "D": config.width,
    "E": config.width,
    "N": config.heads,
    "H": config.head_size,
    "F": config.mlp_width,
    "p": config.patch_size,
    "q": config.patch_size,
    "C": config.channels_in,
    "I": config.patch_size**2 * config.channels_in,
    "O": config.patch_size**2 * config.channels_out,
    "K": config.num_classes + 1,
    "T": config.label_tokens,
    "X": layers.TIME_FREQUENCIES,
    "Y": config.pooled_width,
    "J": config.text_width,
    "P": 3,
    "S": 6,
    "G": 9,
    "R": 2,
  }
