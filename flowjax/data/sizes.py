"""Heights and widths of images, which are read once and kept in an index.

Only headers are read. Of an image whose header is broken both are 0: it goes to
the bucket of the reference, and is passed over when it is read.
"""

# Shape suffixes: N images, M of a file that holds several.

import dataclasses
import logging
import os
import time
from collections.abc import Callable

import numpy as np

from flowjax import errors
from flowjax.data import index, reading

Measure = Callable[[int], tuple[int, int] | None]
_CHUNK = 2**14
_SECONDS = 10.0  # Between two words about how far it is.

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Sizes:
  """The heights and widths of N images; of some they are `unknown`, and 0."""

  height_N: np.ndarray
  width_N: np.ndarray
  unknown: int = 0  # How many.
  first: str = ""  # The name of the first of them.

  def of(self, row_M: np.ndarray) -> np.ndarray:
    """Returns the height and width of some of the images, [M, 2]."""
    return np.stack([self.height_N[row_M], self.width_N[row_M]], axis=1)

  def note(self, place: str) -> str:
    """Says how many are unknown, and what becomes of them."""
    return (
      f"{self.unknown} images of {place} have no size that can be read, the "
      f"first is {self.first}: they go to the bucket config.data.image_size."
    )

  def warn(self, place: str) -> None:
    """Logs the note, if any is unknown."""
    if self.unknown:
      log.warning("%s", self.note(place))


def measure(count: int, size_of: Measure, name_of: Callable[[int], str]):
  """Measures `count` images in threads."""
  size_N2 = np.zeros((count, 2), np.uint32)
  told = time.monotonic()
  for start in range(0, count, _CHUNK):
    rows = range(start, min(start + _CHUNK, count))
    found = reading.mapped(size_of, rows)
    size_N2[start : rows.stop] = [size or (0, 0) for size in found]
    if time.monotonic() - told > _SECONDS:
      told = time.monotonic()
      log.info("Read the size of %d of %d images.", rows.stop, count)
  unknown = np.flatnonzero(size_N2[:, 0] == 0)
  first = name_of(int(unknown[0])) if len(unknown) else ""
  return Sizes(size_N2[:, 0], size_N2[:, 1], len(unknown), first)


def kept(path: str, place: str, make: Callable[[], Sizes]) -> Sizes:
  """Returns the sizes in a file, from their index at `place` or made anew."""
  try:
    found = os.stat(path)
  except OSError as error:
    raise errors.DataError(f"{path} cannot be read: {error}.") from error
  header = {
    "sizes": os.path.basename(path),
    "size": found.st_size,
    "changed": found.st_mtime_ns,
  }
  arrays = index.load(place, header)
  if arrays is None:
    made = make()
    arrays = index.save(
      place,
      header | {"unknown": made.unknown, "first": made.first},
      {"heights": made.height_N, "widths": made.width_N},
    )
  told = arrays.header
  return Sizes(
    arrays["heights"], arrays["widths"], told["unknown"], told["first"]
  )


def joined(parts: list[Sizes]) -> Sizes:
  """Returns the sizes of several groups of images as one."""
  return Sizes(
    np.concatenate([part.height_N for part in parts]),
    np.concatenate([part.width_N for part in parts]),
    sum(part.unknown for part in parts),
    next((part.first for part in parts if part.unknown), ""),
  )
