"""Low-rank adapters beside the kernels of a network (LoRA, arXiv:2106.09685).

A kernel W, with inputs and outputs, acts as W + (alpha / rank) a b, where a has
the inputs and b the outputs, and b is zero at first. Those of the kernel
"blocks/mlp/in/kernel" are "lora/blocks/mlp/in/kernel/a" and ".../b". A fused
kernel of queries, keys and values has a pair for each of the three, as if they
were three kernels.
"""

import dataclasses
import math
import re
from typing import Any

import jax
import jax.numpy as jnp

from flowjax import schema
from flowjax.models import layers

Params = dict[str, Any]
# The dims of a kernel that a factor has, in its order; None is the rank.
Dims = tuple[int | None, ...]

GROUP = "lora"
_RANK = 20  # as a dim of einsum, after all those of a kernel


@dataclasses.dataclass(frozen=True)
class LoraConfig:
  """Adapters of a rank, which are trained in place of all else; 0: none.

  `alpha` is the rank unless given. `targets` are regexes over the names of
  kernels; each must match one.
  """

  rank: int = 0
  alpha: float | None = None
  targets: tuple[str, ...] = (r".*/attention2?/(qkv|out)/kernel",)

  def __post_init__(self):
    schema.require_patterns("targets", self.targets)
    if self.rank < 0:
      raise ValueError(f"rank = {self.rank} is below 0; 0: no adapters.")
    if self.alpha is not None and not self.alpha > 0:
      raise ValueError(f"alpha = {self.alpha} must be above 0, or None.")

  @property
  def scale(self) -> float:
    """What the product of two factors is multiplied by."""
    return 1.0 if self.alpha is None else self.alpha / self.rank


def dims(kernel: str, count: int) -> tuple[Dims, Dims]:
  """Returns which dims of a kernel of `count` dims its a and its b have.

  Stacked blocks lead with their layer, and so do their factors.
  """
  layer = 1 if re.match(r"(\w+_)?blocks/", kernel) else 0
  inputs = 2 if re.search(r"attention2?/out/kernel$", kernel) else 1
  parts = 1 if kernel.endswith("/qkv/kernel") else 0
  ends = [layer, layer + inputs, layer + inputs + parts, count]
  read = tuple(range(ends[0], ends[1]))
  lead = (*range(layer), *range(ends[1], ends[2]))
  return (*lead, *read, None), (*lead, None, *range(ends[2], ends[3]))


def kernels(params: Params) -> dict[str, Any]:
  """Returns what can have an adapter, by name: arrays, or their shapes."""
  return {
    name: leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    if (name := _name(path)).endswith("/kernel")
  }


def adapted(config: LoraConfig, params: Params) -> dict[str, Any]:
  """Returns the kernels that have adapters, by name.

  Raises ValueError for a target that matches none.
  """
  able, chosen = kernels(params), set()
  for pattern in config.targets:
    matched = [name for name in able if re.fullmatch(pattern, name)]
    if not matched:
      raise ValueError(
        f"The target {pattern!r} matches no kernel of this network. It has "
        f"{', '.join(able)}."
      )
    chosen.update(matched)
  if not chosen:
    raise ValueError(f"rank = {config.rank} without targets: name some.")
  return {name: able[name] for name in able if name in chosen}


def factors(config: LoraConfig, params: Params) -> dict[str, tuple[str, Dims]]:
  """Returns for each factor, by name, its kernel and the dims it has of it."""
  found = {}
  for name, leaf in adapted(config, params).items():
    for factor, has in zip("ab", dims(name, len(leaf.shape)), strict=True):
      found[f"{GROUP}/{name}/{factor}"] = (name, has)
  return found


def init(config: LoraConfig, params: Params, rng: jax.Array) -> Params:
  """Draws a from U(-1 / sqrt(inputs), 1 / sqrt(inputs)); b is zero.

  That is Kaiming's law for a gain of sqrt(1 / 3), as PEFT draws it.
  """
  able, tree = adapted(config, params), Params()
  for key, (name, kernel) in zip(
    jax.random.split(rng, len(able)), able.items(), strict=True
  ):
    dims_a, dims_b = dims(name, len(kernel.shape))
    read = [i for i in dims_a if i is not None and i not in dims_b]
    limit = 1.0 / math.sqrt(math.prod(kernel.shape[i] for i in read))
    shape_a, shape_b = (
      tuple(config.rank if i is None else kernel.shape[i] for i in has)
      for has in (dims_a, dims_b)
    )
    node = tree
    for part in name.split("/"):
      node = node.setdefault(part, {})
    node["a"] = jax.random.uniform(key, shape_a, jnp.float32, -limit, limit)
    node["b"] = jnp.zeros(shape_b, jnp.float32)
  return tree


def beside(config: LoraConfig, params: Params) -> Params:
  """Returns the base with the factors of each kernel at its side.

  There `layers.Dense` finds them, in blocks that are stacked as well.
  """
  a, b = layers.FACTORS

  def put(name, node, pair):
    return {**node, a: pair["a"], b: config.scale * pair["b"]}

  return _with_pairs(put, *_apart(params))


def merged(config: LoraConfig, params: Params) -> Params:
  """Returns the base alone, each kernel with its adapter added to it.

  Parameters without adapters come back as they are.
  """

  def add(name, node, pair):
    dims_a, dims_b = dims(name, node["kernel"].ndim)
    product = jnp.einsum(
      pair["a"],
      _letters(dims_a),
      pair["b"],
      _letters(dims_b),
      list(range(node["kernel"].ndim)),
      precision="highest",
    )
    return {**node, "kernel": node["kernel"] + config.scale * product}

  return _with_pairs(add, *_apart(params))


def _apart(params: Params) -> tuple[Params, Params]:
  """Returns the base, and the factors."""
  base = {key: params[key] for key in params if key != GROUP}
  return base, params.get(GROUP, {})


def _with_pairs(change: Any, node: Params, pairs: Params, at: str = ""):
  """Returns a tree whose nodes with adapters are `change(name, node, pair)`."""
  found = dict(node)
  for key, below in pairs.items():
    if key == "kernel":
      found = change(f"{at}{key}", found, below)
    else:
      found[key] = _with_pairs(change, node[key], below, f"{at}{key}/")
  return found


def _letters(has: Dims) -> list[int]:
  """Returns the dims as einsum takes them, the rank after all others."""
  return [_RANK if i is None else i for i in has]


def _name(path: tuple) -> str:
  return jax.tree_util.keystr(path, simple=True, separator="/")
