"""Many names in little memory: one run of bytes, and where each begins."""

# Shape suffixes: N names, M of them, K bytes.

import hashlib
from array import array
from collections.abc import Iterable, Iterator

import numpy as np

_CHUNK = 2**18


class Names:
  """A sequence of strings; ten million file names take about 400 MB.

  Names that are no UTF-8, which a disk may hold, come through unchanged.
  """

  def __init__(self, byte_K: np.ndarray, start_N: np.ndarray):
    # One more start than names; a line feed ends each name.
    self.byte_K, self.start_N = byte_K, start_N

  def __len__(self) -> int:
    return len(self.start_N) - 1

  def __getitem__(self, i: int) -> str:
    start, stop = int(self.start_N[i]), int(self.start_N[i + 1]) - 1
    return self.byte_K[start:stop].tobytes().decode(errors="surrogateescape")

  def __iter__(self) -> Iterator[str]:
    return (self[i] for i in range(len(self)))

  def hash(self, row_M: np.ndarray) -> str:
    """Returns a hash of the names of these rows, which ascend."""
    content = hashlib.blake2b(digest_size=8)
    for first in range(0, len(row_M), _CHUNK):
      rows = row_M[first : first + _CHUNK]
      low, high = int(rows[0]), int(rows[-1]) + 1
      start, stop = int(self.start_N[low]), int(self.start_N[high])
      chosen = np.zeros(high - low, bool)
      chosen[rows - low] = True
      length = np.diff(self.start_N[low : high + 1])
      content.update(self.byte_K[start:stop][np.repeat(chosen, length)].data)
    return content.hexdigest()


class Builder:
  """Takes names one run after the other."""

  def __init__(self):
    self._bytes, self._starts = bytearray(), array("q", [0])

  def extend(self, names: Iterable[str]) -> None:
    for name in names:
      self._bytes += name.encode(errors="surrogateescape")
      self._bytes += b"\n"
      self._starts.append(len(self._bytes))

  def done(self) -> Names:
    return Names(
      np.frombuffer(self._bytes, np.uint8), np.frombuffer(self._starts, "<i8")
    )
