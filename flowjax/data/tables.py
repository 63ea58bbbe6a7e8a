"""Parquet and arrow files as groups of rows, each of which is read alone."""

# Shape suffixes: N rows of a group.

import collections
import dataclasses
import functools
import threading
from collections.abc import Callable
from typing import Any

import numpy as np

from flowjax import errors
from flowjax.data import sources

ENDINGS = (".parquet", ".arrow")


@dataclasses.dataclass(frozen=True)
class Group:
  """A row group of a parquet file, or a record batch of an arrow one."""

  rows: int
  size: int  # In bytes, decompressed; of the columns that are read.


class File:
  """One file: its schema, its groups, and their columns."""

  def __init__(self, path: str):
    self.path = path
    self._lock = threading.Lock()
    pa = library()
    if path.endswith(".parquet"):
      self._parquet = pa.parquet.ParquetFile(path, memory_map=True)
      self.schema = self._parquet.schema_arrow
      self.count = self._parquet.metadata.num_row_groups
      leaves = map(
        self._parquet.schema.column, range(len(self._parquet.schema))
      )
      self._tops = [leaf.path.partition(".")[0] for leaf in leaves]
    else:
      self._parquet, self._batches = None, _Batches(pa, path)
      self.schema = self._batches.schema
      self.count = self._batches.count

  def groups(self, columns: tuple[str, ...]) -> list[Group]:
    """Returns how large each group is."""
    if self._parquet is None:
      batches = map(self._batches.get, range(self.count))
      return [
        Group(b.num_rows, b.select(columns).get_total_buffer_size())
        for b in batches
      ]
    found = []
    for i in range(self.count):
      group = self._parquet.metadata.row_group(i)
      parts = map(group.column, self._leaves(columns))
      size = sum(part.total_uncompressed_size for part in parts)
      found.append(Group(group.num_rows, size))
    return found

  def missing(self, group: int, column: str) -> np.ndarray | None:
    """Returns which rows of a group are null, bool [N], or None if none is."""
    if self._parquet is not None:
      known = self._parquet.metadata.row_group(group)
      counted = known.column(self._leaves((column,))[0]).statistics
      if counted is not None and counted.has_null_count:
        if not counted.null_count:
          return None
    null_N = self.read(group, (column,)).column(column).is_null()
    null_N = np.asarray(null_N.to_numpy(zero_copy_only=False), bool)
    return null_N if null_N.any() else None

  def read(self, group: int, columns: tuple[str, ...]) -> Any:
    """Reads columns of a group. Raises `sources.Corrupt` for broken bytes."""
    if self._parquet is None:
      return self._batches.get(group).select(columns)
    try:
      with self._lock:  # One reader has one place in its file.
        return self._parquet.read_row_group(
          group, columns=list(columns), use_threads=False
        ).combine_chunks()
    except (ValueError, OSError) as error:
      # What has a number comes from the disk, and not from broken bytes.
      if getattr(error, "errno", None):
        raise errors.DataError(f"{self.path}: {error}.") from error
      raise sources.Corrupt(
        f"Row group {group} of {self.path} is corrupt: {error}."
      ) from error

  def _leaves(self, columns: tuple[str, ...]) -> list[int]:
    """Returns the columns as parquet counts them, by leaves of structs."""
    return [i for i, name in enumerate(self._tops) if name in columns]


class _Batches:
  """The record batches of an arrow file, mapped; a stream has no index."""

  def __init__(self, pa, path: str):
    mapped = pa.memory_map(path)
    try:
      self._file = pa.ipc.open_file(mapped)
      self.schema, self.count = self._file.schema, self._file.num_record_batches
      self.get: Callable[[int], Any] = self._file.get_batch
    except pa.ArrowInvalid:
      mapped.seek(0)
      stream = pa.ipc.open_stream(mapped)
      whole = list(stream)
      self.schema, self.count = stream.schema, len(whole)
      self.get = whole.__getitem__


@functools.lru_cache(maxsize=256)
def open(path: str) -> File:
  """Opens a file once in each process. Raises `sources.Corrupt`."""
  try:
    return File(path)
  except FileNotFoundError as error:
    raise errors.DataError(f"{path} is not there: {error}.") from error
  except (ValueError, OSError) as error:
    raise sources.Corrupt(
      f"{path} is no {path.rpartition('.')[2]} file, or cut off: {error}."
    ) from error


class Cache:
  """Keeps the latest `size` of what is made, and makes nothing twice at once.

  It travels to a worker empty.
  """

  def __init__(self, size: int):
    self._size, self._lock = size, threading.Lock()
    self._kept: collections.OrderedDict[Any, list] = collections.OrderedDict()

  def __reduce__(self):
    return Cache, (self._size,)

  def empty(self) -> "Cache":
    """Returns another one, as large, in which nothing is kept yet."""
    return Cache(self._size)

  def get(self, key: Any, make: Callable[[], Any]) -> Any:
    """Returns what `make` made of `key`."""
    with self._lock:
      entry = self._kept.setdefault(key, [threading.Lock(), None])
      self._kept.move_to_end(key)
      while len(self._kept) > self._size:
        self._kept.popitem(last=False)
    with entry[0]:
      if entry[1] is None:
        entry[1] = make()
      return entry[1]


def library():
  """Returns pyarrow, with its readers."""
  try:
    import pyarrow
    import pyarrow.ipc
    import pyarrow.parquet
  except ImportError as error:
    raise errors.UserError(
      f"The source 'hf' cannot be used ({error}): pip install -e '.[hf]'"
    ) from error
  return pyarrow
