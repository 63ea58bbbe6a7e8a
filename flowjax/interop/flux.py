"""Where the weights of a FLUX live in other people's files."""

from flowjax.interop import held, tables
from flowjax.models import flux, layers

# L double layers, M single layers; D width and E the same where both sides
# have it; N heads, H head size; F hidden width of the MLP; p, q, C rows,
# columns and channels of a patch, of which Z come out; X features of the time,
# Y width of the pooled text, J of the text. Parts of a fused linear: P query,
# key, value; S shift, scale, gate of attention and of the MLP; G the same of
# both at once; R shift, scale. Of our own torch: I, O values of a patch, in and
# out, K labels and the one for none, T tokens of the text learned for each.

_DOUBLE, _SINGLE = "double_blocks", "single_blocks"
_QKV = ("q", "k", "v")

# What is theirs to choose in our config, and fixed in the code that will read
# the weights.
_FIXED = {"num_classes": 0, "timestep_scale": 1000.0}
_HELD = {
  "diffusers": _FIXED | {"mlp_ratio": 4.0, "rope_theta": 10000.0},
  "original": _FIXED,
}


def torch_layout(config: flux.FluxConfig) -> tables.Table:
  """Returns the table to the state dict of `interop/torch/flux.py`."""
  embeddings = ("time_embed", "pooled_embed", "guidance_embed")
  rules = [
    *_embeddings(config, "{}.", embeddings, ("in_proj", "out_proj")),
    *tables.linear("text_embed", "text_embed", "J -> D"),
    *tables.linear("patch_embed", "patch_embed", "I -> D"),
    *tables.linear("final/modulation", "final.modulation", "E -> R D"),
    *tables.linear("final/out", "final.out_proj", "D -> O"),
  ]
  if config.num_classes:
    rules += [
      tables.Rule("label_embed/text", "label_embed.text", "K T J -> K T J"),
      tables.Rule("label_embed/pooled", "label_embed.pooled", "K Y -> K Y"),
    ]
  for ours, layer, parts in (
    (f"{_DOUBLE}/image", "L", "S"),
    (f"{_DOUBLE}/text", "L", "S"),
    (_SINGLE, "M", "G"),
  ):
    theirs = ours.replace("blocks", f"blocks.{{{layer}}}").replace("/", ".")
    scales = ("query_norm.weight", "key_norm.weight")
    rules += [
      *tables.linear(
        f"{ours}/modulation", f"{theirs}.modulation", f"E -> {parts} D"
      ),
      *tables.linear(
        f"{ours}/attention/qkv", f"{theirs}.attention.qkv", "D -> P N H"
      ),
      *_norms(ours, f"{theirs}.attention.", scales, layer),
      *tables.linear(
        f"{ours}/attention/out",
        f"{theirs}.attention.out_proj",
        "N H -> D",
        bias=ours != _SINGLE,
      ),
      *tables.linear(f"{ours}/mlp/in", f"{theirs}.mlp.in_proj", "D -> F"),
      *tables.linear(f"{ours}/mlp/out", f"{theirs}.mlp.out_proj", "F -> D"),
    ]
  return tables.Table(tuple(rules), _sizes(config))


def diffusers_layout(config: flux.FluxConfig) -> tables.Table:
  """Returns the table to the state dict of `FluxTransformer2DModel`.

  Its last modulation is (scale, shift), and ours (shift, scale).
  """
  _require(config, "diffusers")
  time = "time_text_embed.{}_embedder.linear_"
  rules = [
    *_embeddings(config, time, ("timestep", "text", "guidance"), ("1", "2")),
    *tables.linear("text_embed", "context_embedder", "J -> D"),
    *_patches("x_embedder", "proj_out"),
    *tables.linear("final/modulation", "norm_out.linear", "E -> R D", flip="R"),
  ]
  theirs = "transformer_blocks.{L}"
  for stream, norm, qkv, qk_norm, out, mlp in (
    ("image", "norm1", "to_{P}", "norm_", "to_out.0", "ff"),
    (
      *("text", "norm1_context", "add_{P}_proj", "norm_added_"),
      *("to_add_out", "ff_context"),
    ),
  ):
    ours, names = f"{_DOUBLE}/{stream}", {"P": _QKV}
    rules += [
      *tables.linear(
        f"{ours}/modulation", f"{theirs}.{norm}.linear", "E -> S D"
      ),
      *tables.linear(
        f"{ours}/attention/qkv",
        f"{theirs}.attn.{qkv}",
        "D -> P N H",
        names=names,
      ),
      *_norms(ours, f"{theirs}.attn.{qk_norm}", ("q.weight", "k.weight"), "L"),
      *tables.linear(
        f"{ours}/attention/out", f"{theirs}.attn.{out}", "N H -> D"
      ),
      *tables.linear(f"{ours}/mlp/in", f"{theirs}.{mlp}.net.0.proj", "D -> F"),
      *tables.linear(f"{ours}/mlp/out", f"{theirs}.{mlp}.net.2", "F -> D"),
    ]
  theirs = "single_transformer_blocks.{M}"
  rules += [
    *tables.linear(
      f"{_SINGLE}/modulation", f"{theirs}.norm.linear", "E -> G D"
    ),
    *tables.linear(
      f"{_SINGLE}/attention/qkv",
      f"{theirs}.attn.to_{{P}}",
      "D -> P N H",
      names={"P": _QKV},
    ),
    *_norms(_SINGLE, f"{theirs}.attn.norm_", ("q.weight", "k.weight"), "M"),
    *tables.linear(f"{_SINGLE}/mlp/in", f"{theirs}.proj_mlp", "D -> F"),
    *_joined_out(f"{theirs}.proj_out"),
  ]
  return tables.Table(tuple(rules), _sizes(config))


def original_layout(config: flux.FluxConfig) -> tables.Table:
  """Returns the table to the state dict of Black Forest Labs' own FLUX.

  Queries, keys and values are one map there, and in single blocks one with the
  first map of the MLP.
  """
  _require(config, "original")
  embeddings = ("time", "vector", "guidance")
  rules = [
    *_embeddings(config, "{}_in.", embeddings, ("in_layer", "out_layer")),
    *tables.linear("text_embed", "txt_in", "J -> D"),
    *_patches("img_in", "final_layer.linear"),
    *tables.linear(
      "final/modulation", "final_layer.adaLN_modulation.1", "E -> R D"
    ),
  ]
  scales = ("query_norm.scale", "key_norm.scale")
  for stream, name in (("image", "img"), ("text", "txt")):
    ours, theirs = f"{_DOUBLE}/{stream}", "double_blocks.{L}." + name
    rules += [
      *tables.linear(f"{ours}/modulation", f"{theirs}_mod.lin", "E -> S D"),
      *tables.linear(
        f"{ours}/attention/qkv", f"{theirs}_attn.qkv", "D -> P N H"
      ),
      *_norms(ours, f"{theirs}_attn.norm.", scales, "L"),
      *tables.linear(
        f"{ours}/attention/out", f"{theirs}_attn.proj", "N H -> D"
      ),
      *tables.linear(f"{ours}/mlp/in", f"{theirs}_mlp.0", "D -> F"),
      *tables.linear(f"{ours}/mlp/out", f"{theirs}_mlp.2", "F -> D"),
    ]
  theirs = "single_blocks.{M}"
  rules += [
    *tables.linear(
      f"{_SINGLE}/modulation", f"{theirs}.modulation.lin", "E -> G D"
    ),
    *tables.linear(
      f"{_SINGLE}/attention/qkv", f"{theirs}.linear1", "D -> P N H"
    ),
    *tables.linear(f"{_SINGLE}/mlp/in", f"{theirs}.linear1", "D -> F"),
    *_norms(_SINGLE, f"{theirs}.norm.", scales, "M"),
    *_joined_out(f"{theirs}.linear2"),
  ]
  return tables.Table(tuple(rules), _sizes(config))


def _embeddings(
  config: flux.FluxConfig,
  theirs: str,
  names: tuple[str, str, str],
  maps: tuple[str, str],
) -> list[tables.Rule]:
  """Returns the rules of what is embedded for the modulation."""
  ours = ("time_embed", "pooled_embed", "guidance_embed")
  rules: list[tables.Rule] = []
  for leaf, name, width in zip(ours, names, "XYX", strict=True):
    if leaf == "guidance_embed" and not config.guidance_embed:
      continue
    prefix = theirs.format(name)
    rules += tables.linear(f"{leaf}/in", prefix + maps[0], f"{width} -> D")
    rules += tables.linear(f"{leaf}/out", prefix + maps[1], "E -> D")
  return rules


def _patches(embed: str, out: str) -> list[tables.Rule]:
  """Returns the rules of both ends; the channels of their patches lead."""
  return [
    tables.Rule(
      "patch_embed/kernel", f"{embed}.weight", "(p q C) D -> D (C p q)"
    ),
    tables.Rule("patch_embed/bias", f"{embed}.bias", "D -> D"),
    tables.Rule("final/out/kernel", f"{out}.weight", "D (p q Z) -> (Z p q) D"),
    tables.Rule("final/out/bias", f"{out}.bias", "(p q Z) -> (Z p q)"),
  ]


def _norms(
  ours: str, theirs: str, keys: tuple[str, str], layer: str
) -> list[tables.Rule]:
  return [
    tables.Rule(
      f"{ours}/attention/{name}_norm/scale",
      theirs + key,
      f"{layer} H -> {layer} H",
    )
    for name, key in zip(("query", "key"), keys, strict=True)
  ]


def _joined_out(theirs: str) -> tuple[tables.Rule, ...]:
  """Returns the rules of the one map from [attention | MLP] to the width."""
  return (
    *tables.linear(
      f"{_SINGLE}/attention/out", theirs, "N H -> D", bias=False, along=1
    ),
    *tables.linear(f"{_SINGLE}/mlp/out", theirs, "F -> D", along=1),
  )


def _require(config: flux.FluxConfig, format: str) -> None:
  found = {name: held.faults(config, _HELD[name]) for name in _HELD}
  held.require(format, "FLUX", found)


def _sizes(config: flux.FluxConfig) -> dict[str, int]:
  return {
    "L": config.double_depth,
    "M": config.single_depth,
    "D": config.width,
    "E": config.width,
    "N": config.heads,
    "H": config.head_size,
    "F": config.mlp_width,
    "p": config.patch_size,
    "q": config.patch_size,
    "C": config.channels_in,
    "Z": config.channels,
    "I": config.patch_size**2 * config.channels_in,
    "O": config.patch_size**2 * config.channels,
    "K": config.num_classes + 1,
    "T": config.label_tokens,
    "X": layers.TIME_FREQUENCIES,
    "Y": config.pooled_width,
    "J": config.text_width,
    "P": 3,
    "S": 6,
    "G": 3,
    "R": 2,
  }
