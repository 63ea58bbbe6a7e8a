"""A source whose records say of their images something else than they did."""

# Shape suffixes: B positions or records.

import dataclasses
from typing import Any

import numpy as np

from flowjax.data import sources


@dataclasses.dataclass(frozen=True)
class Retold:
  """What stays of a source whose records are told in another way: the rest.

  A class of these has `__getitem__` and `blank`; one without classes says so by
  fields of its own.
  """

  source: Any

  @property
  def name(self) -> str:
    return self.source.name

  @property
  def shape(self) -> tuple[int, int, int]:
    return self.source.shape

  @property
  def class_names(self) -> tuple[str, ...]:
    return self.source.class_names

  @property
  def num_classes(self) -> int:
    return self.source.num_classes

  def __len__(self) -> int:
    return len(self.source)

  def draw(self, seed: int, position_B: np.ndarray) -> np.ndarray:
    """Returns the record that the source has at each position."""
    return sources.draw(self.source, seed, position_B)

  def fingerprint(self) -> dict[str, Any]:
    """Returns what the order of the records hangs on, as JSON can hold it."""
    return self.source.fingerprint()
