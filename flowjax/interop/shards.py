"""Weights over one safetensors file or several, with an index of them.

`stem.safetensors`; or `stem-00001-of-00003.safetensors` and so on beside
`stem.safetensors.index.json`, which maps each key to its file, as PyTorch's
libraries have it.
"""

import collections.abc
import itertools
import json
import math
import pathlib

import numpy as np

from flowjax import errors
from flowjax.interop import safetensors

Shapes = collections.abc.Mapping[str, tuple[int, ...]]
INDEX = ".safetensors.index.json"


def write(
  folder: pathlib.Path,
  stem: str,
  shapes: Shapes,
  tensors: collections.abc.Iterable[tuple[str, np.ndarray]],
  *,
  dtype: str,
  max_bytes: int | None = None,
) -> None:
  """Writes the tensors, each as it comes, into files of at most `max_bytes`.

  A tensor that is larger has a file of its own.
  """
  item = safetensors.DTYPES[dtype][1].itemsize
  parts = _divide(shapes, item, max_bytes)
  coming = iter(tensors)
  where: dict[str, str] = {}
  for i, part in enumerate(parts):
    name = f"{stem}-{i + 1:05d}-of-{len(parts):05d}.safetensors"
    if len(parts) == 1:
      name = f"{stem}.safetensors"
    mine = itertools.islice(coming, len(part))
    safetensors.write(folder / name, part, mine, dtype=dtype)
    where |= dict.fromkeys(part, name)
  assert next(coming, None) is None, "more tensors than shapes"
  if len(parts) > 1:
    size = sum(item * math.prod(shape) for shape in shapes.values())
    index = {"metadata": {"total_size": size}, "weight_map": where}
    text = json.dumps(index, indent=2) + "\n"
    (folder / f"{stem}{INDEX}").write_text(text)


def read(
  path: pathlib.Path,
  wanted: collections.abc.Callable[[str], bool] = lambda key: True,
) -> dict[str, np.ndarray]:
  """Returns the tensors of a file, or of all files that an index names.

  They are mapped to memory, and read when touched. Raises CheckpointError,
  which names the file and the key, for an index that is not true; what is not
  `wanted` may be anything.
  """
  if not path.name.endswith(INDEX):
    return safetensors.read(path, wanted)
  where = _read_index(path)
  tensors: dict[str, np.ndarray] = {}
  for name in sorted(set(where.values())):
    file = path.parent / name
    if pathlib.PurePath(name).name != name:
      raise errors.CheckpointError(
        f"{path} names the file {name!r}, which is not beside it."
      )
    if not file.is_file():
      raise errors.CheckpointError(
        f"{path} names {name}, which is missing: copy it, or all files, again."
      )
    found = safetensors.read(file, wanted)
    named = {key for key in where if where[key] == name and wanted(key)}
    if found.keys() != named:
      key = min(found.keys() ^ named)
      holder = "the index alone" if key in named else "the file alone"
      raise errors.CheckpointError(
        f"{file} is not what {path.name} says: {key} is in {holder}. The two "
        "are of different exports; copy all files again."
      )
    tensors |= found
  return tensors


def _divide(shapes: Shapes, item: int, limit: int | None) -> list[Shapes]:
  """Returns the shapes in parts of at most `limit` bytes, in their order."""
  parts: list[dict[str, tuple[int, ...]]] = [{}]
  room = math.inf if limit is None else limit
  left = room
  for key, shape in shapes.items():
    size = item * math.prod(shape)
    if size > left and parts[-1]:
      parts.append({})
      left = room
    parts[-1][key] = shape
    left -= size
  return list(parts)


def _read_index(path: pathlib.Path) -> dict[str, str]:
  try:
    where = json.loads(path.read_text())["weight_map"]
    if not all(isinstance(name, str) for name in where.values()):
      raise ValueError("a file is no name")
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise errors.CheckpointError(
      f"{path} is no index of safetensors files: {error!r}."
    ) from error
  return where
