"""The log that is always there: one JSON object a line, step by step.

Each line is {"step": ..., "wall": ..., name: value}. JSON has no NaN and no
infinity: a value that is not finite is null, so that every line is valid JSON
and a column of numbers stays one.
"""

import collections.abc
import json
import logging
import math
import os
import pathlib
import time
from typing import Any

import numpy as np


class JsonLines:
  """Appends lines to a file, each with one write, so that a kill cuts one.

  A disk that is full loses nothing: the lines wait in memory until a write
  succeeds again.
  """

  def __init__(self, path: pathlib.Path, resume_step: int | None = None):
    path.parent.mkdir(parents=True, exist_ok=True)
    repair(path, resume_step)
    self.path = path
    self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    self._waiting = b""
    self._warned = False

  def write(self, step: int, values: collections.abc.Mapping) -> None:
    """Writes one line."""
    row = {"step": int(step), "wall": round(time.time(), 3)}
    row |= {name: _plain(value) for name, value in values.items()}
    line = json.dumps(row, allow_nan=False) + "\n"
    self._waiting += line.encode()
    self.flush()

  def flush(self) -> None:
    """Hands all lines to the operating system."""
    try:
      while self._waiting:
        done = os.write(self._file, self._waiting)
        # A disk may take half a line: the rest of it is then first in turn.
        self._waiting = self._waiting[done:]
      self._warned = False
    except OSError as error:
      if not self._warned:
        logging.warning(
          "%s: %s. Training goes on; the lines wait in memory until they can "
          "be written.",
          self.path,
          error,
        )
      self._warned = True

  def close(self) -> None:
    """Writes what waits, and closes the file."""
    self.flush()
    os.close(self._file)


def read(path: pathlib.Path) -> list[dict[str, Any]]:
  """Reads the lines of a file, without any that are cut or damaged."""
  rows = (_parse(line) for line in path.read_bytes().splitlines())
  return [row for row in rows if row and "step" in row]


def repair(path: pathlib.Path, resume_step: int | None = None) -> None:
  """Drops a last line that was cut, and the lines after `resume_step`.

  Every other line stays as it is, to the byte. The new file replaces the old
  one at once, or not at all.
  """
  if not path.exists():
    return
  old = path.read_bytes()
  *lines, tail = old.split(b"\n")
  if _parse(tail) is not None:
    lines.append(tail)  # Only its end of line was cut.
  if resume_step is not None:
    lines = [line for line in lines if not _is_after(line, resume_step)]
  new = b"".join(line + b"\n" for line in lines)
  if new == old:
    return
  temporary = path.with_name(path.name + ".tmp")
  with open(temporary, "wb") as file:
    file.write(new)
    file.flush()
    os.fsync(file.fileno())
  os.replace(temporary, path)


def _parse(line: bytes) -> dict[str, Any] | None:
  try:
    row = json.loads(line)
  except ValueError:
    return None
  return row if isinstance(row, dict) else None


def _is_after(line: bytes, step: int) -> bool:
  found = (_parse(line) or {}).get("step")
  return isinstance(found, int) and found > step


def _plain(value: Any) -> Any:
  """Returns `value` as JSON can hold it."""
  if isinstance(value, collections.abc.Mapping):
    return {str(key): _plain(item) for key, item in value.items()}
  if isinstance(value, (tuple, list)):
    return [_plain(item) for item in value]
  if hasattr(value, "dtype"):
    return _plain(np.asarray(value).tolist())
  if isinstance(value, float) and not math.isfinite(value):
    return None
  return value
