"""Where the factors of adapters live in the files of diffusers and PEFT.

Beside a linear `x.weight` [outputs, inputs] of a transformer they have
`transformer.x.lora_A.weight` [rank, inputs] and `transformer.x.lora_B.weight`
[outputs, rank]. How inputs and outputs lie in a kernel of ours its rule says,
and the rules of both factors follow from that one.

Where several kernels of ours are one linear of theirs, joined along its inputs,
an adapter of that linear is the sum of theirs: zeros stand for inputs that one
of them does not read, and the ranks add up.
"""

import collections
import collections.abc
import dataclasses
import re
from typing import Any

import numpy as np

from flowjax import errors
from flowjax.interop import tables
from flowjax.models import lora

PREFIX = "transformer."
A, B = ".lora_A.weight", ".lora_B.weight"

Leaves = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Linear:
  """Linears of theirs, like ones together, by the rules of our kernels."""

  rules: tuple[tables.Rule, ...]
  rank: int

  @property
  def kernels(self) -> list[str]:
    return [rule.ours for rule in self.rules]

  @property
  def pair(self) -> tuple[tables.Rule, ...]:
    """The rules of a, one for each kernel, and of b, one for all."""
    return (*map(self._rule_a, self.rules), self._rule_b(self.rules[0]))

  @property
  def axis(self) -> str:
    return f"rank{self.rank}"

  @property
  def rank_dim(self) -> int:
    """The dim of b that is the rank; of a it is the last."""
    return _groups(self.pair[-1].left).index(self.axis)

  def _rule_a(self, rule: tables.Rule) -> tables.Rule:
    lead, read, _ = _sides(rule)
    inputs = _groups(rule.right)[-1]
    return dataclasses.replace(
      rule,
      ours=f"{lora.GROUP}/{rule.ours}/a",
      theirs=PREFIX + rule.theirs.removesuffix(".weight") + A,
      pattern=f"{lead} {read} {self.axis} -> "
      f"{' '.join(rule.stacks)} {self.axis} {inputs}",
      flip="",
    )

  def _rule_b(self, rule: tables.Rule) -> tables.Rule:
    lead, _, given = _sides(rule)
    outputs = _groups(rule.right)[-2]
    return dataclasses.replace(
      rule,
      ours=f"{lora.GROUP}/{rule.ours}/b",
      theirs=PREFIX + rule.theirs.removesuffix(".weight") + B,
      pattern=f"{lead} {self.axis} {given} -> "
      f"{' '.join(rule.stacks)} {outputs} {self.axis}",
    )


def _linears(theirs: tables.Table) -> list[Linear]:
  """Returns every linear of their class that an adapter can be for."""
  groups: dict[Any, list[tables.Rule]] = {}
  for rule in theirs.rules:
    if rule.ours.endswith("/kernel") and not _reason(rule):
      key = rule.theirs, tuple(rule.names.items())
      groups.setdefault(key, []).append(rule)
  return [Linear(tuple(rules), 1) for rules in groups.values()]


def _reason(rule: tables.Rule) -> str:
  """Says why a kernel can have no adapter of theirs, if it cannot."""
  if len(_groups(rule.right)) != len(rule.stacks) + 2:
    return "is a convolution there"
  if rule.copies:
    return "is held once per block there"
  return ""


def chosen(theirs: tables.Table, names: list[str], rank: int) -> list[Linear]:
  """Returns the linears of some kernels, with the rank of their adapters."""
  reasons = {rule.ours: _reason(rule) for rule in theirs.rules}
  faults = [f"{name} {reasons[name]}" for name in names if reasons[name]]
  if faults:
    raise errors.UserError(
      f"diffusers has no adapter for {len(faults)} of the targets: "
      f"{'; '.join(faults)}. --format=diffusers holds the weights with all "
      "adapters merged."
    )
  counts = [
    (linear, len(set(linear.kernels) & set(names)))
    for linear in _linears(theirs)
  ]
  return [
    dataclasses.replace(linear, rank=rank * count)
    for linear, count in counts
    if count
  ]


def found(
  theirs: tables.Table, ranks: dict[str, int], rank: int
) -> list[Linear]:
  """Returns the linears of some modules of theirs, each with its rank."""
  linears = []
  for linear in _linears(theirs):
    keys = table(theirs, [linear]).keys
    own = [ranks[module] for module in modules(keys) if module in ranks]
    if own:
      # Of kernels that are joined the ranks may have been added up.
      wide = rank if len(linear.rules) == 1 else usual(own)
      linears.append(dataclasses.replace(linear, rank=wide))
  return linears


def table(theirs: tables.Table, linears: list[Linear]) -> tables.Table:
  """Returns the table of the factors of some linears."""
  rules = tuple(rule for linear in linears for rule in linear.pair)
  ranks = {linear.axis: linear.rank for linear in linears}
  return tables.Table(rules, {**theirs.sizes, **ranks})


def join(
  leaves: Leaves, linear: Linear, names: list[str], shapes: dict[str, Any]
) -> None:
  """Makes one adapter of those of the kernels that are one linear of theirs.

  Where a_i reads the inputs i, it is diag(a_1, a_2, ...) [b_1; b_2; ...].
  """
  if len(linear.rules) == 1:
    return
  own = [name for name in linear.kernels if name in names]
  rank = linear.rank // len(own)
  parts_b = [leaves.pop(_path(name, "b")) for name in own]
  leaves[_path(linear.kernels[0], "b")] = np.concatenate(
    parts_b, axis=linear.rank_dim
  )
  for name in linear.kernels:
    wide = np.zeros(shapes[_path(name, "a")], np.float32)
    if name in own:
      start = own.index(name) * rank
      wide[..., start : start + rank] = leaves[_path(name, "a")]
    leaves[_path(name, "a")] = wide


def part(leaves: Leaves, linear: Linear, rank: int) -> None:
  """Parts what `join` joins; an adapter made otherwise is shared by all.

  Then each kernel that it reads the inputs of has its own copy of b.
  """
  if len(linear.rules) == 1:
    return
  wide_b = leaves.pop(_path(linear.kernels[0], "b"))
  wide = {name: leaves.pop(_path(name, "a")) for name in linear.kernels}
  own = [name for name in linear.kernels if wide[name].any()]
  joined = linear.rank == rank * len(own)
  before = (slice(None),) * linear.rank_dim
  for i, name in enumerate(own):
    block = slice(i * rank, (i + 1) * rank) if joined else slice(None)
    a = wide[name][..., block]
    rest = np.count_nonzero(wide[name]) - np.count_nonzero(a)
    if a.shape[-1] != rank or rest:
      raise errors.CheckpointError(
        f"{linear.pair[0].theirs} has rank {linear.rank}, the others {rank}, "
        f"and is no sum of adapters of {' and '.join(own)}: config.lora has "
        "one rank for all."
      )
    leaves[_path(name, "a")] = a
    leaves[_path(name, "b")] = wide_b[(*before, block)]


def usual(ranks: collections.abc.Iterable[int]) -> int:
  """Returns the rank that most have."""
  return collections.Counter(ranks).most_common(1)[0][0]


def modules(keys: collections.abc.Iterable[str]) -> list[str]:
  """Returns the linears that keys are of, as the keys begin."""
  return [key.removesuffix(A) for key in keys if key.endswith(A)]


def kernels(leaves: Leaves) -> list[str]:
  """Returns the kernels of whose factors some leaves are."""
  stems = {path.rpartition("/")[0] for path in leaves}
  return sorted(stem.removeprefix(f"{lora.GROUP}/") for stem in stems)


def _path(kernel: str, factor: str) -> str:
  return f"{lora.GROUP}/{kernel}/{factor}"


def _groups(side: str) -> list[str]:
  """Returns the dims of one side of a pattern: `L (P N) D` has three."""
  return re.findall(r"\([^)]*\)|\w+", side)


def _sides(rule: tables.Rule) -> tuple[str, str, str]:
  """Returns the dims of a kernel of ours: those that lead, inputs, outputs."""
  inputs = re.findall(r"\w+", _groups(rule.right)[-1])
  lead: list[str] = []
  read: list[str] = []
  given: list[str] = []
  for group in _groups(rule.left):
    own = re.findall(r"\w+", group)
    stacked = own[0] in rule.stacks
    (lead if stacked else read if own[0] in inputs else given).append(group)
  return " ".join(lead), " ".join(read), " ".join(given)
