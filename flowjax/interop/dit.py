"""Where the weights of a DiT live in other people's files."""

from typing import Any

from flowjax.interop import held, lazy, tables
from flowjax.models import dit, layers, positions

# L layers; D width and E the same where both sides have it; N heads, H head
# size; F hidden width of the MLP; I, O values of a patch, in and out; Y, Z, C
# its rows, columns and channels; X features of the time; K labels and the one
# for none; T tokens. Parts of a fused linear: P query, key, value; S shift,
# scale, gate of both branches; R shift, scale; G gate and value of SwiGLU.

# What the published network is; the other formats hold nothing else.
_PUBLISHED = {
  "position": "sincos2d",
  "mlp": "gelu",
  "norm": "layernorm",
  "qk_norm": False,
  "timestep_scale": 1000.0,
}
HELD: dict[str, dict[str, Any]] = {
  "diffusers": _PUBLISHED | {"mlp_ratio": 4.0, "frequency_shift": 1.0},
  "original": _PUBLISHED
  | {"frequency_shift": 0.0, "mlp_norm_epsilon": 1e-6, "context_channels": 0},
}
# Of these the tensors say nothing: whoever reads some may say otherwise.
UNTOLD = ("frequency_shift", "mlp_norm_epsilon", "timestep_scale")


def torch_layout(config: dit.DiTConfig) -> tables.Table:
  """Returns the table to the state dict of `interop/torch/dit.py`."""
  hidden = "G F" if config.mlp == "swiglu" else "F"
  rules = [
    *tables.linear("patch_embed", "patch_embed", "I -> D"),
    *tables.linear("time_embed/in", "time_embed.in_proj", "X -> D"),
    *tables.linear("time_embed/out", "time_embed.out_proj", "E -> D"),
    tables.Rule("label_embed/embedding", "label_embed.weight", "K D -> K D"),
  ]
  if config.position == "learned":
    rules += [
      tables.Rule("pos_embed/embedding", "pos_embed.weight", "T D -> T D")
    ]
  for ours, theirs, axes in (
    ("modulation", "modulation", "E -> S D"),
    ("attention/qkv", "attention.qkv", "D -> P N H"),
    ("attention/out", "attention.out_proj", "N H -> D"),
    ("mlp/in", "mlp.in_proj", f"D -> {hidden}"),
    ("mlp/out", "mlp.out_proj", "F -> D"),
  ):
    rules += tables.linear(f"blocks/{ours}", "blocks.{L}." + theirs, axes)
  scales = []
  if config.qk_norm:
    scales += [(f"attention/{name}_norm", "H") for name in ("query", "key")]
  if config.norm == "rmsnorm":
    scales += [("attention_norm", "D"), ("mlp_norm", "D")]
    rules += [tables.Rule("final/norm/scale", "final.norm.weight", "D -> D")]
  for name, axis in scales:
    theirs = "blocks.{L}." + name.replace("/", ".") + ".weight"
    pattern = f"L {axis} -> L {axis}"
    rules += [tables.Rule(f"blocks/{name}/scale", theirs, pattern)]
  rules += tables.linear("final/modulation", "final.modulation", "E -> R D")
  rules += tables.linear("final/out", "final.out_proj", "D -> O")
  return tables.Table(tuple(rules), _sizes(config))


def diffusers_layout(config: dit.DiTConfig) -> tables.Table:
  """Returns the table to the state dict of `DiTTransformer2DModel`.

  It holds the embedders of time and label once in every block, and its
  position in no tensor.
  """
  _require(config, "diffusers")
  block = "transformer_blocks.{L}."
  embed = block + "norm1.emb."
  rules = [
    *_patch_embed("pos_embed.proj"),
    *_copies("time_embed/in", f"{embed}timestep_embedder.linear_1", "X"),
    *_copies("time_embed/out", f"{embed}timestep_embedder.linear_2", "E"),
    tables.Rule(
      "label_embed/embedding",
      f"{embed}class_embedder.embedding_table.weight",
      "K D -> L K D",
    ),
    *tables.linear("blocks/modulation", f"{block}norm1.linear", "E -> S D"),
    *tables.linear(
      "blocks/attention/qkv",
      block + "attn1.{P}",
      "D -> P N H",
      names={"P": ("to_q", "to_k", "to_v")},
    ),
    *tables.linear(
      "blocks/attention/out", f"{block}attn1.to_out.0", "N H -> D"
    ),
    *tables.linear("blocks/mlp/in", f"{block}ff.net.0.proj", "D -> F"),
    *tables.linear("blocks/mlp/out", f"{block}ff.net.2", "F -> D"),
    *tables.linear("final/modulation", "proj_out_1", "E -> R D"),
    *tables.linear("final/out", "proj_out_2", "D -> O"),
  ]
  return tables.Table(tuple(rules), _sizes(config))


def original_layout(config: dit.DiTConfig) -> tables.Table:
  """Returns the table to the state dict of the code of the DiT paper.

  arXiv:2212.09748. The fixed table of positions is in it. SiT's code
  (arXiv:2401.08740) has the same keys, but its time runs from noise to data,
  and is not scaled.
  """
  _require(config, "original")
  block, label = "blocks.{L}.", "y_embedder.embedding_table.weight"
  rules = [
    *_patch_embed("x_embedder.proj"),
    *tables.linear("time_embed/in", "t_embedder.mlp.0", "X -> D"),
    *tables.linear("time_embed/out", "t_embedder.mlp.2", "E -> D"),
    tables.Rule("label_embed/embedding", label, "K D -> K D"),
    *tables.linear(
      "blocks/modulation", f"{block}adaLN_modulation.1", "E -> S D"
    ),
    *tables.linear("blocks/attention/qkv", f"{block}attn.qkv", "D -> P N H"),
    *tables.linear("blocks/attention/out", f"{block}attn.proj", "N H -> D"),
    *tables.linear("blocks/mlp/in", f"{block}mlp.fc1", "D -> F"),
    *tables.linear("blocks/mlp/out", f"{block}mlp.fc2", "F -> D"),
    *tables.linear(
      "final/modulation", "final_layer.adaLN_modulation.1", "E -> R D"
    ),
    *tables.linear("final/out", "final_layer.linear", "D -> O"),
  ]
  rows, columns = config.grid
  table_1TD = lazy.Array(
    (1, rows * columns, config.width),
    lambda: positions.sincos2d(rows, columns, config.width)[None],
  )
  return tables.Table(tuple(rules), _sizes(config), {"pos_embed": table_1TD})


def _patch_embed(theirs: str) -> tuple[tables.Rule, ...]:
  """Returns the rules of a map of patches that they hold as a convolution."""
  return (
    tables.Rule(
      "patch_embed/kernel", f"{theirs}.weight", "(Y Z C) D -> D C Y Z"
    ),
    tables.Rule("patch_embed/bias", f"{theirs}.bias", "D -> D"),
  )


def _copies(ours: str, theirs: str, inputs: str) -> tuple[tables.Rule, ...]:
  """Returns the rules of a linear that they hold in every layer."""
  return (
    tables.Rule(
      f"{ours}/kernel", f"{theirs}.weight", f"{inputs} D -> L D {inputs}"
    ),
    tables.Rule(f"{ours}/bias", f"{theirs}.bias", "D -> L D"),
  )


def _require(config: dit.DiTConfig, format: str):
  found = {name: held.faults(config, HELD[name]) for name in HELD}
  height, width = config.image_size
  if height != width:
    for faults in found.values():
      faults.append(f"images of {height}x{width}, there square")
  held.require(format, "DiT", found)


def _sizes(config: dit.DiTConfig) -> dict[str, int]:
  height, width = config.image_size
  patch = config.patch_size**2
  return {
    "L": config.depth,
    "D": config.width,
    "E": config.width,
    "N": config.heads,
    "H": config.head_size,
    "F": config.mlp_width,
    "I": patch * config.channels_in,
    "O": patch * config.channels_out,
    "Y": config.patch_size,
    "Z": config.patch_size,
    "C": config.channels_in,
    "X": layers.TIME_FREQUENCIES,
    "K": config.num_classes + 1,
    "T": height * width // patch,
    "P": 3,
    "S": 6,
    "R": 2,
    "G": 2,
  }
