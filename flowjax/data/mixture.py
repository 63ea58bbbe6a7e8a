"""Several sources as one, each with its share of every stretch of positions."""

# Shape suffixes: B positions, K sources, M slots of a cycle.

import dataclasses
import fractions
import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from flowjax import errors
from flowjax.data import buckets, order, sources
from flowjax.data import config as config_lib

MOST_SLOTS = 2**20


@dataclasses.dataclass(frozen=True)
class Mixture:
  """Sources, and how many slots of each cycle of positions are whose.

  Slots of a cycle are dealt out as evenly as they go, so that any stretch of
  positions holds each source by its weight, to within about half as many
  records as there are sources. Each source sees positions 0, 1, 2, ... of its
  own: it has its own order, epochs, and no repeats within one.
  """

  parts: tuple[sources.Source, ...]
  slots: tuple[int, ...]

  @property
  def name(self) -> str:
    return " + ".join(part.name for part in self.parts)

  @property
  def class_names(self) -> tuple[str, ...]:
    return self.parts[0].class_names

  @property
  def num_classes(self) -> int:
    return self.parts[0].num_classes

  @property
  def shape(self) -> tuple[int, int, int]:
    return self.parts[0].shape

  @property
  def blank(self) -> sources.Record:
    """A record of zeros."""
    return sources.blank(self.parts[0])

  @functools.cached_property
  def _ends(self) -> np.ndarray:
    return np.cumsum([len(part) for part in self.parts])

  @functools.cached_property
  def _cycle(self) -> tuple[np.ndarray, np.ndarray]:
    """Returns the source of each slot, and which of its slots that is."""
    owner_M = np.repeat(np.arange(len(self.slots)), self.slots)
    rank_M = np.concatenate([np.arange(count) for count in self.slots])
    middle_M = (rank_M + 0.5) / np.asarray(self.slots)[owner_M]
    turn_M = np.argsort(middle_M, kind="stable")
    return owner_M[turn_M], rank_M[turn_M]

  def __len__(self) -> int:
    return int(self._ends[-1])

  def __getitem__(self, i: int) -> sources.Record:
    variant, i = divmod(i, len(self))
    k = int(np.searchsorted(self._ends, i, side="right"))
    part = self.parts[k]
    inner = i - int(self._ends[k]) + len(part)
    return part[inner + variant * len(part)]

  def draw(self, seed: int, position_B: np.ndarray) -> np.ndarray:
    """Returns the record of each position: a source, and a record of it."""
    owner_M, rank_M = self._cycle
    # Each seed begins elsewhere in the cycle, at position 0 of every source.
    begin = int(order.choices(seed, len(owner_M), np.zeros(1, np.int64))[0])
    cycle_B, slot_B = np.divmod(position_B + begin, len(owner_M))
    owner_B, rank_B = owner_M[slot_B], rank_M[slot_B]
    record_B = np.zeros(len(position_B), np.int64)
    for k, part in enumerate(self.parts):
      mine_B = owner_B == k
      before = int((owner_M[:begin] == k).sum())
      own = cycle_B[mine_B] * self.slots[k] + rank_B[mine_B] - before
      drawn = sources.draw(part, order.apart(seed, k), own)
      variant, inner = np.divmod(drawn, len(part))
      start = int(self._ends[k]) - len(part)
      record_B[mine_B] = start + inner + variant * len(self)
    return record_B

  def fingerprint(self) -> dict[str, Any]:
    """Returns what the order of the records hangs on, as JSON can hold it."""
    rows = {
      f"{k} {part.name}": {"slots": slots, **part.fingerprint()}
      for k, (part, slots) in enumerate(
        zip(self.parts, self.slots, strict=True)
      )
    }
    return {"records": len(self), "sources": rows}


def open(
  config: config_lib.DataConfig, split: str
) -> Mixture | buckets.Bucketed:
  """Opens the sources of `config.mixture`, which must be alike.

  Of aspect buckets, each is a mixture of what the sources have in it.
  """
  names = [name for name, _ in config.mixture]
  for name in names:
    if name == "mixture" or names.count(name) > 1:
      raise errors.UserError(
        f"config.data.mixture names {name!r} "
        + ("within itself" if name == "mixture" else "twice")
        + ": each source once, with its whole weight."
      )
  slots = slots_of(tuple(weight for _, weight in config.mixture))
  parts = []
  for name in names:
    alone = dataclasses.replace(
      config, source=name, mixture=(), tokenizer=None, words=()
    )
    with errors.naming(f"config.data.mixture, {name!r}"):
      parts.append(sources.open(alone, split))
  _check_alike(parts)
  return (
    _by_bucket(parts, slots) if config.buckets else Mixture(tuple(parts), slots)
  )


def _by_bucket(parts: Any, slots: tuple[int, ...]) -> buckets.Bucketed:
  """Returns mixtures, one for each bucket, by the weights of the whole.

  A source of N records, of which n are in the bucket, has n / N of its weight
  there; the bucket has what its sources have in it.
  """
  found: dict[tuple, list] = {}
  for whole, weight in zip(parts, slots, strict=True):
    for part in whole.parts:
      share = fractions.Fraction(weight * len(part), len(whole))
      found.setdefault(part.shape, []).append((part, share))
  mixed: list[Mixture] = []
  weights: list[fractions.Fraction] = []
  for each in found.values():
    some = tuple(part for part, _ in each)
    shares = [share for _, share in each]
    mixed.append(Mixture(some, order.shares(_whole(shares))))
    weights.append(sum(shares, fractions.Fraction()))
  name = " + ".join(whole.name for whole in parts)
  return buckets.Bucketed(
    name, tuple(mixed), parts[0].shape, order.shares(_whole(weights))
  )


def slots_of(weights: tuple[float, ...]) -> tuple[int, ...]:
  """Returns the smallest whole numbers that are as these weights.

  Weights are taken as they are written: 0.3 is three tenths.
  """
  for weight in weights:
    if not weight > 0:
      raise errors.UserError(
        f"config.data.mixture has the weight {weight}, which must be above 0: "
        "leave out a source that is not to be read."
      )
  counts = _whole([fractions.Fraction(repr(weight)) for weight in weights])
  if sum(counts) > MOST_SLOTS:
    raise errors.UserError(
      f"config.data.mixture: the weights {weights} are as {counts}, which only "
      f"{sum(counts):,} positions could hold exactly; {MOST_SLOTS:,} is the "
      "most. Give them fewer digits, or as ratios: 1 and 2, not 0.333 and "
      "0.667."
    )
  return tuple(counts)


def _whole(exact: Sequence[fractions.Fraction]) -> list[int]:
  """Returns the smallest whole numbers that are as these."""
  common = math.lcm(*(number.denominator for number in exact))
  counts = [int(number * common) for number in exact]
  return [count // math.gcd(*counts) for count in counts]


def _check_alike(parts: list[sources.Source]) -> None:
  first = parts[0]
  for part in parts[1:]:
    same = sources.blank(part).keys() == sources.blank(first).keys()
    if not same or part.class_names != first.class_names:
      raise errors.DataError(
        f"{_told(first)} and {_told(part)} do not mix: all need the same "
        "classes, or captions, or embedded texts. "
        "config.data.templates=('a photo of a {}',) makes captions of labels."
      )


def _told(source: sources.Source) -> str:
  if not source.num_classes:
    return f"{source.name} ({', '.join(sources.blank(source))})"
  return f"{source.name} ({source.num_classes} classes)"
