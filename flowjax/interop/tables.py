"""Key tables between two names of the same weights.

A rule says where a leaf of our tree lives in their state dict, and an einops
pattern says how its axes move. Everything else follows: the shapes on both
sides, the way there and, by turning the pattern round, the way back. A table
is complete: what it does not name on either side is an error that lists it.
"""

import collections.abc
import dataclasses
import functools
import itertools
import math
import re
from typing import Any

import einops
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from flowjax import errors
from flowjax.interop import lazy

Shape = lazy.Shape
Tensors = collections.abc.Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Rule:
  """One leaf of ours and the tensors it becomes.

  An axis in braces in their key, as in `blocks.{L}.mlp.weight`, is unstacked:
  one tensor per index. Such axes lead the right side of the pattern:

      Rule("blocks/mlp/kernel", "blocks.{L}.mlp.weight", "L D F -> L F D")

  `names` says what stands in their key for each index of such an axis, where
  that is not 0, 1, ...: {"P": ("to_q", "to_k", "to_v")}. One that our side does
  not have is a tensor that they hold several times. The axes in `flip` run the
  other way on their side. Rules of one key are joined along its dim `along`,
  in their order.
  """

  ours: str
  theirs: str
  pattern: str
  names: collections.abc.Mapping[str, tuple[str, ...]] = dataclasses.field(
    default_factory=dict
  )
  flip: str = ""
  along: int = 0

  @property
  def stacks(self) -> list[str]:
    return re.findall(r"\{(\w+)\}", self.theirs)

  @property
  def left(self) -> str:
    return self.pattern.split(" -> ")[0]

  @property
  def right(self) -> str:
    return self.pattern.split(" -> ")[1]

  @property
  def copies(self) -> list[str]:
    """The axes that only their side has."""
    own = re.findall(r"\w+", self.left)
    return [axis for axis in re.findall(r"\w+", self.right) if axis not in own]


def linear(
  ours: str, theirs: str, axes: str, *, bias: bool = True, **options: Any
) -> tuple[Rule, ...]:
  """Returns the rules of a linear layer, `axes` being `inputs -> outputs`.

  Ours multiplies from the right with `kernel [inputs, outputs]`, each of
  which may be several axes; theirs is `weight [(outputs), (inputs)]`. An axis
  in braces of theirs that is among the outputs is a part with a name of its
  own, as the query of a fused map; any other is one of layers. `options` are
  those of `Rule`.
  """
  inputs, outputs = axes.split(" -> ")
  stacks = re.findall(r"\{(\w+)\}", theirs)
  layers = "".join(f"{s} " for s in stacks if s not in outputs.split())
  lead = "".join(f"{s} " for s in stacks)
  rest = " ".join(axis for axis in outputs.split() if axis not in stacks)
  kernel = Rule(
    f"{ours}/kernel",
    f"{theirs}.weight",
    f"{layers}{inputs} {outputs} -> {lead}({rest}) ({inputs})",
    **options,
  )
  if not bias:
    return (kernel,)
  one = Rule(
    f"{ours}/bias",
    f"{theirs}.bias",
    f"{layers}{outputs} -> {lead}({rest})",
    **options,
  )
  return kernel, one


@dataclasses.dataclass(frozen=True, eq=False)
class Table:
  """Rules and the sizes of the axes that their patterns speak of.

  `constants` are tensors of theirs that the config determines, such as a table
  of positions: they are written, and what is read must be equal to them. Large
  ones are `lazy.Array`.
  """

  rules: tuple[Rule, ...]
  sizes: dict[str, int]
  constants: collections.abc.Mapping[str, np.ndarray | lazy.Array] = (
    dataclasses.field(default_factory=dict)
  )

  @functools.cached_property
  def paths(self) -> dict[str, Shape]:
    """The shape of each leaf of ours, by path."""
    return {rule.ours: self._shape(rule.left) for rule in self.rules}

  @functools.cached_property
  def keys(self) -> dict[str, Shape]:
    """The shape of each tensor of theirs, by key, in the order of export."""
    shapes = {key: value.shape for key, value in self.constants.items()}
    for rules in self._groups:
      shape = list(self._inner_shape(rules[0]))
      if len(rules) > 1:
        along = rules[0].along
        shape[along] = sum(self._inner_shape(rule)[along] for rule in rules)
      shapes |= {key: tuple(shape) for key in self._keys_of(rules[0])}
    return shapes

  def to_theirs(
    self, params: dict
  ) -> collections.abc.Iterator[tuple[str, np.ndarray]]:
    """Yields (key, tensor) in the order of `keys`.

    The leaves of one key at a time are fetched to the host, and let go with the
    last tensor of that key, which is not to be kept.
    """
    leaves = flatten(params)
    _require(leaves, self.paths, "parameters")
    for key, constant in self.constants.items():
      yield key, np.asarray(constant)
    for rules in self._groups:
      parts = [
        self._turned(rule, _fetched(leaves[rule.ours])) for rule in rules
      ]
      for key, index in self._keys_of(rules[0]).items():
        yield key, _joined([part[index] for part in parts], rules[0].along)
      del parts

  def to_ours(self, tensors: Tensors) -> dict:
    """Returns our nested tree of the tensors that bear their keys."""
    leaves = self.leaves_of_ours(tensors)
    return unflatten({path: np.asarray(leaf) for path, leaf in leaves})

  def leaves_of_ours(self, tensors: Tensors) -> lazy.Leaves:
    """Yields (path, leaf) of our tree; a leaf is read when it is asked for.

    Raises CheckpointError before the first, unless keys and shapes are those of
    the table, and the constants are equal.
    """
    _require(tensors, self.keys, "tensors")
    for key, constant in self.constants.items():
      _require_equal(key, tensors[key], np.asarray(constant))
    return itertools.chain.from_iterable(
      self._split(rules, tensors) for rules in self._groups
    )

  def _split(self, rules: tuple[Rule, ...], tensors: Any) -> lazy.Leaves:
    along, start = rules[0].along, 0
    for rule in rules:
      size = self._inner_shape(rule)[along] if len(rules) > 1 else None
      part: Any = slice(None)
      if size is not None:
        part = (slice(None),) * along + (slice(start, start + size),)
        start += size
      yield (
        rule.ours,
        self._turned_back(
          rule, {key: tensors[key][part] for key in self._keys_of(rule)}
        ),
      )

  @functools.cached_property
  def _groups(self) -> list[tuple[Rule, ...]]:
    """The rules, those of one key together."""
    groups: dict[Any, list[Rule]] = {}
    for rule in self.rules:
      keys = rule.theirs, tuple(rule.names.items())
      groups.setdefault(keys, []).append(rule)
    return [tuple(rules) for rules in groups.values()]

  def _turned(self, rule: Rule, leaf: np.ndarray) -> np.ndarray:
    named = set(re.findall(r"\w+", rule.pattern))
    tensor = _flipped(leaf, rule.left, rule.flip)
    sizes = {axis: self.sizes[axis] for axis in named}
    return einops.repeat(tensor, rule.pattern, **sizes)

  def _turned_back(
    self, rule: Rule, tensors: dict[str, np.ndarray]
  ) -> lazy.Leaf:
    if rule.copies:
      tensors = _one_of(tensors)
    ours, theirs = (re.findall(r"\w+", x) for x in (rule.left, rule.right))
    theirs = [axis for axis in theirs if axis not in rule.copies]
    stacks = [axis for axis in rule.stacks if axis not in rule.copies]
    inner = [self.sizes[axis] for axis in theirs[len(stacks) :]]
    indices = np.ndindex(*(self.sizes[axis] for axis in stacks))
    return lazy.Leaf(
      self._shape(rule.left),
      tuple(self.sizes[axis] for axis in ours),
      tuple(ours.index(axis) for axis in theirs),
      tuple(ours.index(axis) for axis in rule.flip.split()),
      {
        index: tensor.reshape(inner)
        for index, tensor in zip(indices, tensors.values(), strict=True)
      },
    )

  def _keys_of(self, rule: Rule) -> dict[str, Shape]:
    """Maps each key of a rule to its index into the stacked axes."""
    counts = [self.sizes[axis] for axis in rule.stacks]
    return {
      rule.theirs.format(
        **{
          axis: rule.names[axis][i] if axis in rule.names else i
          for axis, i in zip(rule.stacks, index, strict=True)
        }
      ): index
      for index in np.ndindex(*counts)
    }

  def _inner_shape(self, rule: Rule) -> Shape:
    """Returns the shape of one of the tensors of a rule."""
    return self._shape(rule.right)[len(rule.stacks) :]

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


def _fetched(leaf: Any) -> np.ndarray:
  """Returns a leaf on the host, where nothing else will remember it."""
  # A jax.Array would remember its copy: that of its own copy goes with it.
  return np.asarray(jnp.copy(leaf) if isinstance(leaf, jax.Array) else leaf)


def _flipped(leaf: np.ndarray, axes: str, flip: str) -> np.ndarray:
  """Returns the leaf with the axes in `flip` running the other way."""
  dims = re.findall(r"\([^)]*\)|\w+", axes)
  return np.flip(leaf, tuple(dims.index(axis) for axis in flip.split()))


def _joined(parts: list[np.ndarray], along: int) -> np.ndarray:
  return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=along)


def _one_of(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Returns the first of tensors that are to be copies of one."""
  first, *others = tensors
  for key in others:
    if not np.array_equal(tensors[first], tensors[key]):
      raise errors.CheckpointError(
        f"{key} is not {first}: the network holds these weights once, and "
        "cannot be two that were trained apart."
      )
  return {first: tensors[first]}


def tolerance(dtype: Any) -> float:
  """Returns by how much a constant may differ that was stored in a dtype."""
  return 1e-5 + float(ml_dtypes.finfo(dtype).eps)


def _require_equal(key: str, found: np.ndarray, constant: np.ndarray):
  # Row by row, as a table of positions may be as large as a network.
  rows, wanted = (x.reshape(-1, x.shape[-1]) for x in (found, constant))
  differences = [
    np.abs(rows[i].astype(np.float32) - wanted[i]).max()
    for i in range(len(rows))
  ]
  error = np.max(differences)
  # Written so that nan is refused too.
  if not error <= tolerance(found.dtype):
    raise errors.CheckpointError(
      f"{key} differs by {error:.3g} from what the config makes it, and is not "
      "learned: is the config (its positions, its sizes) that of the weights?"
    )


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
      f"{len(faults)} of the {what} do not fit the model:\n"
      + "\n".join(faults)
      + "\nIs the config the one that these weights were made with?"
    )
