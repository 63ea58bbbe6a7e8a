"""Where each parameter lives: a list of (regex, dims) over its name.

A rule names a mesh axis, or None, for every dim of the parameter. The first
rule that matches the whole name decides; a parameter that no rule matches is
an error that lists it.
"""

import collections.abc
import dataclasses
import math
import re
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

Rules = collections.abc.Sequence[tuple[str, tuple[str | None, ...]]]

# Megatron's division of a transformer block over `tensor` (arXiv:1909.08053):
# columns going in, rows coming out, so that a block pays one all-reduce after
# attention and one after the MLP. `fsdp` divides the other dim (ZeRO-3,
# arXiv:1910.02054). The leading None of a block is its layer.
_DIT: Rules = (
  (r"patch_embed/kernel", (None, "fsdp")),
  (r"(time|size)_embed/\w+/kernel", (None, "fsdp")),
  (r"(label|pos)_embed/embedding", (None, "fsdp")),
  (r"blocks/modulation/kernel", (None, "fsdp", None, None)),
  (r"blocks/attention/qkv/kernel", (None, "fsdp", None, "tensor", None)),
  (r"blocks/attention/qkv/bias", (None, None, "tensor", None)),
  (r"blocks/attention/out/kernel", (None, "tensor", None, "fsdp")),
  (r"blocks/mlp/out/kernel", (None, "tensor", "fsdp")),
  (r"final/modulation/kernel", ("fsdp", None, None)),
  (r"final/out/kernel", ("fsdp", None)),
  # Other biases and scales are small: every device holds them whole.
  (r".*(?<!/qkv)(?<!/mlp/in)/bias|.*/scale|uncertainty/kernel", ()),
)
DIT: Rules = (
  (r"blocks/mlp/in/kernel", (None, "fsdp", "tensor")),
  (r"blocks/mlp/in/bias", (None, "tensor")),
  *_DIT,
)
# SwiGLU keeps its two parts on a dim of their own.
SWIGLU: Rules = (
  (r"blocks/mlp/in/kernel", (None, "fsdp", None, "tensor")),
  (r"blocks/mlp/in/bias", (None, None, "tensor")),
  *_DIT,
)


# The MLPs of a normalizing flow: columns going in, rows coming out.
COUPLING: Rules = (
  (r"label_embed/embedding", (None, "fsdp")),
  (r"blocks/in/kernel", (None, "fsdp", "tensor")),
  (r"blocks/hidden/kernel", (None, "fsdp", "tensor")),
  (r"blocks/out/kernel", (None, "tensor", None, "fsdp")),
  (r".*/(bias|scale)", ()),
)

# As a DiT's, in each stream. The last block of an MM-DiT stands alone, and its
# parameters have no dim of layers.
_STREAM: Rules = (
  (r"modulation/kernel", ("fsdp", None, None)),
  (r"attention2?/qkv/kernel", ("fsdp", None, "tensor", None)),
  (r"attention2?/qkv/bias", (None, "tensor", None)),
  (r"attention2?/out/kernel", ("tensor", None, "fsdp")),
  (r"mlp/in/kernel", ("fsdp", "tensor")),
  (r"mlp/in/bias", ("tensor",)),
  (r"mlp/out/kernel", ("tensor", "fsdp")),
)
_ENDS: Rules = (
  (r"(patch|text)_embed/kernel", (None, "fsdp")),
  (r"(time|pooled)_embed/\w+/kernel", (None, "fsdp")),
  (r"label_embed/text", (None, None, "fsdp")),
  (r"label_embed/pooled", (None, "fsdp")),
  (r"final/modulation/kernel", ("fsdp", None, None)),
  (r"final/out/kernel", ("fsdp", None)),
  (r".*(?<!/qkv)(?<!/mlp/in)/bias|.*/scale|uncertainty/kernel", ()),
)
MMDIT: Rules = (
  *((rf"(dual_)?blocks/\w+/{name}", (None, *dims)) for name, dims in _STREAM),
  *((rf"last_block/\w+/{name}", dims) for name, dims in _STREAM),
  *_ENDS,
)

# As an MM-DiT's; blocks of one stream are divided as those of two.
FLUX: Rules = (
  (r"guidance_embed/\w+/kernel", (None, "fsdp")),
  *(
    (rf"(double_blocks/\w+|single_blocks)/{name}", (None, *dims))
    for name, dims in _STREAM
  ),
  *_ENDS,
)

# Kernels of convolutions have rows and columns first. Channels going out are
# divided, and going in where pixels or patches come out.
AUTOENCODER: Rules = (
  (r"(decoder|discriminator)/out/kernel", (None, None, "fsdp", None)),
  (r".*/attention_\d+/qkv/kernel", ("fsdp", None, None)),
  (r".*/attention_\d+/out/kernel", (None, "fsdp")),
  (r"(codebook/embedding|running_codebook/sum)", ("fsdp", None)),
  (r"running_codebook/count", ("fsdp",)),
  (r"(post_)?quant_conv/kernel|running_steps/count", ()),
  (r"(en|de)coder/in/kernel|encoder/out/kernel", (None, None, None, "fsdp")),
  (
    r"(en|de)coder/\w+/(block_\d+/)?(conv_\d|shortcut|up|down)/kernel",
    (None, None, None, "fsdp"),
  ),
  (
    r"(discriminator|perceptual/stage_\d)/(in|conv_\d+)/kernel",
    (None, None, None, "fsdp"),
  ),
  (r".*/(bias|scale)", ()),
)

# Of what a network is told; divided as its blocks are.
_ENCODER = "((text|layout)_encoder|image_encoder/vision)"
ENCODER: Rules = (
  (rf"{_ENCODER}/(place_)?embed/embedding", (None, "fsdp")),
  (rf"{_ENCODER}/(pooled|box_in|box_out|patch_embed)/kernel", (None, "fsdp")),
  (r"image_encoder/vision/embedding/kernel", ("fsdp", None)),
  (r"image_encoder/text/kernel", (None, None, "fsdp")),
  (r"image_encoder/pooled/kernel", (None, "fsdp")),
  (r"image_encoder/(text|pooled)/bias", ()),
  *((rf"{_ENCODER}/blocks/{name}", (None, *dims)) for name, dims in _STREAM),
  (rf"{_ENCODER}/.*(?<!/qkv)(?<!/mlp/in)/(bias|scale)", ()),
)

# Text encoders: a table of tokens is divided both ways, as it is large.
_TEXT: Rules = (
  (r"token_embed/embedding", ("tensor", "fsdp")),
  (r"blocks/qkv/kernel", (None, "fsdp", None, "tensor", None)),
  (r"blocks/out/kernel", (None, "tensor", None, "fsdp")),
  (r"blocks/mlp_out/kernel", (None, "tensor", "fsdp")),
)
CLIP: Rules = (
  *_TEXT,
  (r"pos_embed/embedding", (None, "fsdp")),
  (r"patch_embed/kernel", (None, "fsdp")),
  (r"blocks/qkv/bias", (None, None, "tensor", None)),
  (r"blocks/mlp_in/kernel", (None, "fsdp", "tensor")),
  (r"blocks/mlp_in/bias", (None, "tensor")),
  (r"projection/kernel", ("fsdp", "tensor")),
  (r".*(?<!/qkv)(?<!/mlp_in)/bias|.*/scale|class_embed", ()),
)
T5: Rules = (
  *_TEXT,
  (r"position_bias/embedding", (None, "tensor")),
  (r"blocks/mlp_in/kernel", (None, "fsdp", None, "tensor")),
  (r".*/scale", ()),
)


def for_model(config: Any) -> Rules:
  """Returns the rules for the parameters of a model's config."""
  if config.name in ("autoencoder", "vq"):
    return AUTOENCODER
  if config.name in ("clip", "clip_vision", "t5"):
    return T5 if config.name == "t5" else CLIP
  if config.name == "coupling":
    return COUPLING
  if config.name == "flux":
    return FLUX
  if config.name == "mmdit":
    return MMDIT
  return SWIGLU if config.mlp == "swiglu" else DIT


def dims(rules: Rules, name: str) -> tuple[str | None, ...]:
  """Returns the axes for the dims of a name; none where no rule matches."""
  for pattern, axes in rules:
    if re.fullmatch(pattern, name):
      return axes
  return ()


def of_factors(
  rules: Rules,
  factors: collections.abc.Mapping[
    str, tuple[str, collections.abc.Sequence[int | None]]
  ],
) -> Rules:
  """Returns a rule for each factor of a kernel, divided as the kernel is.

  A factor's name has that of its kernel, and which of its dims are which of
  the kernel's; None for a dim that the kernel does not have.
  """
  found = []
  for name, (kernel, dims) in factors.items():
    for pattern, axes in rules:
      if re.fullmatch(pattern, kernel):
        of_kernel = (
          tuple(None if i is None else axes[i] for i in dims) if axes else ()
        )
        found.append((re.escape(name), of_kernel))
        break
  return tuple(found)


@dataclasses.dataclass(frozen=True)
class Placement:
  """What a rule decided for one parameter."""

  name: str
  shape: tuple[int, ...]
  dtype: Any
  rule: str
  spec: P
  bytes_per_device: int
  # Dims that a rule wanted divided and whose size does not allow it.
  undivided: tuple[int, ...]


def name_of(path: tuple) -> str:
  """Returns the name of a leaf, as rules see it: `blocks/mlp/in/kernel`."""
  return jax.tree_util.keystr(path, simple=True, separator="/")


def match(rules: collections.abc.Sequence[tuple[str, Any]], tree: Any) -> Any:
  """Returns a tree with, for each leaf, the value of the first rule to match.

  Raises ValueError listing all the leaves that no rule matches.
  """
  missed = []

  def find(path, _):
    name = name_of(path)
    for pattern, value in rules:
      if re.fullmatch(pattern, name):
        return value
    missed.append(name)
    return None

  found = jax.tree_util.tree_map_with_path(find, tree)
  if missed:
    raise ValueError(
      f"No rule matches {', '.join(missed)}. Add a (regex, value) for "
      "each; the last rule may be ('.*', ...)."
    )
  return found


def places(rules: Rules, tree: Any, mesh: Mesh) -> dict[str, Placement]:
  """Decides where each leaf of `tree` lives on `mesh`, by name."""
  found = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    found[name_of(path)] = _place(rules, name_of(path), leaf, mesh)
  missed = [name for name, place in found.items() if place is None]
  if missed:
    raise ValueError(
      f"No sharding rule matches {', '.join(missed)}. Every parameter must be "
      "matched: add a (regex, dims) rule to flowjax/parallel/rules.py."
    )
  return found  # type: ignore[return-value]


def shardings(rules: Rules, tree: Any, mesh: Mesh) -> Any:
  """Returns the tree of NamedSharding of the leaves of `tree`, by name."""
  found = places(rules, tree, mesh)
  return jax.tree_util.tree_map_with_path(
    lambda path, _: NamedSharding(mesh, found[name_of(path)].spec), tree
  )


def like(tree: Any, params: Any, param_shardings: Any, whole: Any) -> Any:
  """Gives the copies of the parameters inside `tree` the parameters' places.

  An optimizer's moments carry a parameter's name as the end of their own path
  and have its shape. Whatever is no copy of a parameter is `whole`.
  """
  known = {
    name_of(path): (leaf.shape, sharding)
    for (path, leaf), sharding in zip(
      jax.tree_util.tree_leaves_with_path(params),
      jax.tree.leaves(param_shardings),
      strict=True,
    )
  }

  def find(path, leaf):
    parts = name_of(path).split("/")
    for i in range(len(parts)):
      name = "/".join(parts[i:])
      if name in known and known[name][0] == leaf.shape:
        return known[name][1]
    return whole

  return jax.tree_util.tree_map_with_path(find, tree)


def _place(rules: Rules, name: str, leaf: Any, mesh: Mesh) -> Placement | None:
  for pattern, dims in rules:
    if not re.fullmatch(pattern, name):
      continue
    if dims and len(dims) != len(leaf.shape):
      raise ValueError(
        f"Rule ({pattern!r}, {dims}) names {len(dims)} dims, and {name} has "
        f"shape {leaf.shape}."
      )
    wanted = dims or (None,) * len(leaf.shape)
    undivided = tuple(
      i
      for i, axis in enumerate(wanted)
      if axis is not None and leaf.shape[i] % mesh.shape[axis]
    )
    kept = [None if i in undivided else axis for i, axis in enumerate(wanted)]
    ways = math.prod(mesh.shape[axis] for axis in kept if axis is not None)
    size = math.prod(leaf.shape) * leaf.dtype.itemsize
    return Placement(
      name, leaf.shape, leaf.dtype, pattern, P(*kept), size // ways, undivided
    )
  return None
