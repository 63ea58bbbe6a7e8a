"""Where the weights of a DiT live in other people's files."""

from flowjax.interop import tables
from flowjax.models import dit

# L layers; D width and E the same where both sides have it; N heads, H head
# size; F hidden width of the MLP; I, O values of a patch, in and out;
# X features of the time; K labels and the one for none; T tokens.
# Parts of a fused linear: P query, key, value; S shift, scale, gate of both
# branches; R shift, scale; G gate and value of SwiGLU.


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
  if config.qk_norm:
    rules += [
      tables.Rule(
        f"blocks/attention/{name}_norm/scale",
        "blocks.{L}.attention." + f"{name}_norm.weight",
        "L H -> L H",
      )
      for name in ("query", "key")
    ]
  rules += tables.linear("final/modulation", "final.modulation", "E -> R D")
  rules += tables.linear("final/out", "final.out_proj", "D -> O")
  return tables.Table(tuple(rules), _sizes(config))


def _sizes(config: dit.DiTConfig) -> dict[str, int]:
  height, width = config.image_size
  patch = config.patch_size**2
  return {
    "L": config.depth,
    "D": config.width,
    "E": config.width,
    "N": config.heads,
    "H": config.width // config.heads,
    "F": config.mlp_width,
    "I": patch * config.channels,
    "O": patch * (config.out_channels or config.channels),
    "X": 256,
    "K": config.num_classes + 1,
    "T": height * width // patch,
    "P": 3,
    "S": 6,
    "R": 2,
    "G": 2,
  }
