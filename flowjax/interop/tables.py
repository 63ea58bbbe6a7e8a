"""Key tables between two names of the same weights.

A rule says where a leaf of our tree lives in their state dict, and an einops
pattern says how its axes move. Everything else follows: the shapes on both
sides, the way there and, by turning the pattern round, the way back. A table
is complete: what it does not name on either side is an error that lists it.
"""

import collections.abc
import dataclasses
import functools
import math
import re
from typing import Any

import einops
import numpy as np

from flowjax import errors

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Rule:
  """One leaf of ours and the tensors it becomes.

  An axis in braces in their key, as in `blocks.{L}.mlp.weight`, is unstacked:
  one tensor per index. Such axes lead the right side of the pattern:

      Rule("blocks/mlp/kernel", "blocks.{L}.mlp.weight", "L D F -> L F D")
  """

  ours: str
  theirs: str
  pattern: str

  @property
  def stacks(self) -> list[str]:
    return re.findall(r"\{(\w+)\}", self.theirs)

  @property
  def reverse(self) -> str:
    left, right = self.pattern.split(" -> ")
    return f"{right} -> {left}"


def linear(ours: str, theirs: str, axes: str) -> tuple[Rule, Rule]:
  """Returns the rules of a linear layer, `axes` being `inputs -> outputs`.

  Ours multiplies from the right with `kernel [inputs, outputs]`, each of
  which may be several axes; theirs is `weight [(outputs), (inputs)]`.
  """
  inputs, outputs = axes.split(" -> ")
  stacks = "".join(f"{axis} " for axis in re.findall(r"\{(\w+)\}", theirs))
  return (
    Rule(
      f"{ours}/kernel",
      f"{theirs}.weight",
      f"{stacks}{inputs} {outputs} -> {stacks}({outputs}) ({inputs})",
    ),
    Rule(
      f"{ours}/bias",
      f"{theirs}.bias",
      f"{stacks}{outputs} -> {stacks}({outputs})",
    ),
  )


@dataclasses.dataclass(frozen=True)
class Table:
  """Rules and the sizes of the axes that their patterns speak of."""

  rules: tuple[Rule, ...]
  sizes: dict[str, int]

  @functools.cached_property
  def paths(self) -> dict[str, Shape]:
    """The shape of each leaf of ours, by path."""
    return {
      rule.ours: self._shape(rule.pattern.split(" -> ")[0])
      for rule in self.rules
    }

  @functools.cached_property
  def keys(self) -> dict[str, Shape]:
    """The shape of each tensor of theirs, by key, in the order of export."""
    return {
      key: self._full_shape(rule)[len(rule.stacks) :]
      for rule in self.rules
      for key in self._keys_of(rule)
    }

  def to_theirs(
    self, params: dict
  ) -> collections.abc.Iterator[tuple[str, np.ndarray]]:
    """Yields (key, tensor) in the order of `keys`.

    One leaf of ours at a time is fetched to the host, so that the memory in
    use is that of the largest leaf.
    """
    leaves = flatten(params)
    _require(leaves, self.paths, "parameters")
    for rule in self.rules:
      tensor = einops.rearrange(np.asarray(leaves[rule.ours]), rule.pattern)
      for key, index in self._keys_of(rule).items():
        yield key, tensor[index]

  def to_ours(self, tensors: collections.abc.Mapping[str, np.ndarray]) -> dict:
    """Returns our nested tree of the tensors that bear their keys."""
    _require(tensors, self.keys, "tensors")
    leaves: dict[str, np.ndarray] = {}
    for rule in self.rules:
      tensor = np.stack([tensors[key] for key in self._keys_of(rule)])
      named = re.findall(r"\w+", rule.reverse)
      leaves[rule.ours] = einops.rearrange(
        tensor.reshape(self._full_shape(rule)),
        rule.reverse,
        **{axis: self.sizes[axis] for axis in named},
      )
    return unflatten(leaves)

  def _keys_of(self, rule: Rule) -> dict[str, Shape]:
    """Maps each key of a rule to its index into the stacked axes."""
    counts = [self.sizes[axis] for axis in rule.stacks]
    return {
      rule.theirs.format(**dict(zip(rule.stacks, index, strict=True))): index
      for index in np.ndindex(*counts)
    }

  def _full_shape(self, rule: Rule) -> Shape:
    return self._shape(rule.pattern.split(" -> ")[1])

  def _shape(self, side: str) -> Shape:
    """Returns the shape of one side of a pattern: `L (P N) D` has three."""
    return tuple(
      math.prod(self.sizes[axis] for axis in re.findall(r"\w+", group))
      for group in re.findall(r"\([^)]*\)|\w+", side)
    )


def flatten(tree: dict, prefix: str = "") -> dict[str, Any]:
  """Returns the leaves of a nested dict by path, `a/b/c`."""
  leaves: dict[str, Any] = {}
  for name, value in tree.items():
    if isinstance(value, dict):
      leaves |= flatten(value, f"{prefix}{name}/")
    else:
      leaves[f"{prefix}{name}"] = value
  return leaves


def unflatten(leaves: dict[str, Any]) -> dict:
  """Returns the nested dict whose leaves have these paths."""
  tree: dict = {}
  for path, value in leaves.items():
    *parents, name = path.split("/")
    node = tree
    for parent in parents:
      node = node.setdefault(parent, {})
    node[name] = value
  return tree


def _require(
  found: collections.abc.Mapping[str, Any],
  expected: dict[str, Shape],
  what: str,
):
  """Raises an error that lists every name in which the two differ."""
  faults = [
    f"  unmapped    {name} {list(found[name].shape)}"
    for name in found
    if name not in expected
  ]
  for name, shape in expected.items():
    if name not in found:
      faults.append(f"  missing     {name} {list(shape)}")
    elif tuple(found[name].shape) != shape:
      faults.append(
        f"  mis-shaped  {name} {list(found[name].shape)}, "
        f"should be {list(shape)}"
      )
  if faults:
    raise errors.CheckpointError(
      f"{len(faults)} {what} do not fit the model:\n"
      + "\n".join(faults)
      + "\nIs the config the one that these weights were made with?"
    )
