"""Files of arrays that many processes map: what is known about a data set.

An index is one file, a JSON header and the arrays after it. It is mapped, not
read: all processes of a host share its pages, and one that is sent to a worker
travels as its path.
"""

import json
import os
import pathlib
import tempfile
from collections.abc import Mapping
from typing import Any

import numpy as np

from flowjax import errors

FORMAT = "flowjax-index-1"
_ALIGN = 64


class Index:
  """A header and named arrays, from a file or, without one, in memory."""

  def __init__(
    self,
    header: Mapping[str, Any],
    arrays: Mapping[str, np.ndarray],
    path: str | None = None,
  ):
    self.header, self.arrays, self.path = header, arrays, path

  def __getitem__(self, name: str) -> np.ndarray:
    return self.arrays[name]

  def __reduce__(self):
    if self.path is not None:
      return _again, (self.path,)
    return Index, (self.header, self.arrays)


def save(
  path: str, header: Mapping[str, Any], arrays: Mapping[str, np.ndarray]
) -> Index:
  """Writes an index at once or not at all, and returns it mapped."""
  offset, places = 0, dict[str, tuple[str, int, int]]()
  for name, array in arrays.items():
    offset = -(-offset // _ALIGN) * _ALIGN
    places[name] = (array.dtype.str, len(array), offset)
    offset += array.nbytes
  content = {"format": FORMAT, "header": dict(header), "arrays": places}
  line = json.dumps(content).encode() + b"\n"
  line = line.rjust(-(-len(line) // _ALIGN) * _ALIGN)
  folder = os.path.dirname(path) or "."
  try:
    os.makedirs(folder, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=folder, prefix=".index-")
    try:
      with open(handle, "wb") as file:
        file.write(line)
        for name, array in arrays.items():
          file.seek(len(line) + places[name][2])
          file.write(np.ascontiguousarray(array).data)
        file.truncate(len(line) + offset)
      os.chmod(temporary, 0o644)
      os.replace(temporary, path)
    except BaseException:
      os.unlink(temporary)
      raise
  except OSError as error:
    raise errors.DataError(
      f"The index {path} cannot be written: {error}. "
      "config.data.index_dir=DIR keeps it elsewhere."
    ) from error
  return _again(path)


def load(path: str, header: Mapping[str, Any]) -> Index | None:
  """Maps an index if it is there, sound, and its header begins as this one."""
  try:
    found = _map(path)
  except (OSError, ValueError, KeyError, TypeError):
    return None
  same = all(found.header.get(key) == value for key, value in header.items())
  return found if same else None


def _again(path: str) -> Index:
  try:
    return _map(path)
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise errors.DataError(f"The index {path} is gone: {error}.") from error


def _map(path: str) -> Index:
  with pathlib.Path(path).open("rb") as file:
    line = file.readline()
    content = json.loads(line)
    if content["format"] != FORMAT:
      raise ValueError(f"its format is {content['format']!r}")
    size = os.fstat(file.fileno()).st_size
    last = max(
      (
        offset + np.dtype(dtype).itemsize * count
        for dtype, count, offset in content["arrays"].values()
      ),
      default=0,
    )
    if size != len(line) + last:
      raise ValueError(f"it is of {size} bytes and not {len(line) + last}")
    whole = np.memmap(file, np.uint8, "r") if last else np.zeros(0, np.uint8)
  whole = np.asarray(whole)
  arrays = {}
  for name, (dtype, count, offset) in content["arrays"].items():
    start = len(line) + offset
    stop = start + np.dtype(dtype).itemsize * count
    arrays[name] = whole[start:stop].view(dtype)
  return Index(content["header"], arrays, path)
