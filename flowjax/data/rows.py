"""Some records of a source, cut to a size of their own."""

# Shape suffixes: B positions, N records.

import dataclasses
import functools
import hashlib
from typing import Any

import numpy as np

from flowjax.data import sources


@dataclasses.dataclass(frozen=True)
class Rows:
  """Some records of a source, cut to one size.

  The source can be `cut(image_size)`, which gives the same records cut so.
  """

  whole: Any
  image_size: tuple[int, int]
  row_N: np.ndarray  # Ascending, in 32 bits: each worker has its own.

  @functools.cached_property
  def source(self) -> Any:
    return self.whole.cut(self.image_size)

  @property
  def name(self) -> str:
    return self.whole.name

  @property
  def class_names(self) -> tuple[str, ...]:
    return self.whole.class_names

  @property
  def num_classes(self) -> int:
    return self.whole.num_classes

  @property
  def shape(self) -> tuple[int, int, int]:
    return self.source.shape

  @property
  def blank(self) -> sources.Record:
    return sources.blank(self.source)

  def __len__(self) -> int:
    return len(self.row_N)

  def __getitem__(self, i: int) -> sources.Record:
    return self.source[int(self.row_N[i])]

  def fingerprint(self) -> dict[str, Any]:
    """Returns what the order of the records hangs on, as JSON can hold it."""
    rows = hashlib.blake2b(np.ascontiguousarray(self.row_N, "<u4").data,
      digest_size=8).hexdigest()  # fmt: skip
    return {"of": self.whole.fingerprint(), "records": len(self), "rows": rows}


@dataclasses.dataclass(frozen=True)
class _Gathered(Rows):
  """The same, of a source that gives many records at once."""

  def gather(self, records_B: np.ndarray) -> dict[str, np.ndarray]:
    return self.source.gather(self.row_N[records_B].astype(np.int64))


@dataclasses.dataclass(frozen=True)
class _Windowed(Rows):
  """The same, of a source whose records are dealt out in windows of groups."""

  @functools.cached_property
  def _windows(self) -> Any:
    return self.whole.windows.within(self.row_N)

  def draw(self, seed: int, position_B: np.ndarray) -> np.ndarray:
    return self._windows.draw(seed, position_B)


def of(whole: Any, image_size: tuple[int, int], row_N: np.ndarray) -> Rows:
  """Returns these records of a source, which come as the source's do."""
  kind = Rows
  if hasattr(whole, "gather"):
    kind = _Gathered
  elif hasattr(whole, "windows"):
    kind = _Windowed
  return kind(whole, image_size, row_N)
