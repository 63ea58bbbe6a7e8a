"""Images alone: a source whose labels, captions and texts are left out."""

# Shape suffixes: B positions or records.

import dataclasses
from typing import Any

import numpy as np

from flowjax.data import sources

# What a network may be told of an image.
TOLD = (
  "label",
  "caption",
  "token",
  "token_mask",
  "text",
  "pooled",
  "text_mask",
)


@dataclasses.dataclass(frozen=True)
class Alone:
  """The records of a source without what is said of them."""

  source: Any
  class_names: tuple[str, ...] = ()
  num_classes: int = 0

  @property
  def name(self) -> str:
    return self.source.name

  @property
  def shape(self) -> tuple[int, int, int]:
    return self.source.shape

  @property
  def blank(self) -> sources.Record:
    return untold(sources.blank(self.source))

  def __len__(self) -> int:
    return len(self.source)

  def __getitem__(self, i: int) -> sources.Record:
    return untold(self.source[i])

  def draw(self, seed: int, position_B: np.ndarray) -> np.ndarray:
    """Returns the record that the source has at each position."""
    return sources.draw(self.source, seed, position_B)

  def fingerprint(self) -> dict[str, Any]:
    """Returns what the order of the records hangs on, as JSON can hold it."""
    return self.source.fingerprint()


@dataclasses.dataclass(frozen=True)
class _InMemory(Alone):
  """The same, of a source that gives many records at once."""

  def gather(self, records_B: np.ndarray) -> dict[str, np.ndarray]:
    return untold(self.source.gather(records_B))


def alone(source: Any) -> Alone:
  """Returns a source without labels, captions and texts."""
  kind = _InMemory if hasattr(source, "gather") else Alone
  return kind(source)


def untold(record: dict[str, Any]) -> dict[str, Any]:
  """Returns a record, or a batch, without what is said of its images."""
  return {key: record[key] for key in record if key not in TOLD}
