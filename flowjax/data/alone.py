"""Images alone: a source whose labels, captions and texts are left out."""

# Shape suffixes: B positions or records.

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from flowjax.data import retold, sources

# What a network may be told of an image by its source, and in place of nothing.
TOLD = (
  "label",
  "caption",
  "token",
  "token_mask",
  "text",
  "pooled",
  "text_mask",
  "negative",
)


@dataclasses.dataclass(frozen=True)
class Alone(retold.Retold):
  """The records of a source without what is said of them."""

  class_names: tuple[str, ...] = ()
  num_classes: int = 0

  @property
  def blank(self) -> sources.Record:
    return untold(sources.blank(self.source))

  def __getitem__(self, i: int) -> sources.Record:
    return untold(self.source[i])


@dataclasses.dataclass(frozen=True)
class _InMemory(Alone):
  """The same, of a source that gives many records at once."""

  def gather(self, records_B: np.ndarray) -> dict[str, np.ndarray]:
    return untold(self.source.gather(records_B))


def alone(source: Any) -> Alone:
  """Returns a source without labels, captions and texts."""
  kind = _InMemory if hasattr(source, "gather") else Alone
  return kind(source)


def untold(record: Mapping[str, Any]) -> dict[str, Any]:
  """Returns a record, or a batch, without what is said of its images."""
  return {key: record[key] for key in record if key not in TOLD}
