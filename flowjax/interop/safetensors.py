"""The safetensors format: a JSON header, then the bytes of every tensor.

Eight bytes hold the length of the header, little-endian; the header maps each
key to its dtype, shape and place among the bytes that follow. It holds no
code, so that a file from a stranger can do no harm.
"""

import collections.abc
import json
import math
import os
import pathlib
import struct
import threading
import weakref
from typing import Any

import ml_dtypes
import numpy as np

from flowjax import errors

DTYPES = {
  "float32": ("F32", np.dtype(np.float32)),
  "bfloat16": ("BF16", np.dtype(ml_dtypes.bfloat16)),
  "float16": ("F16", np.dtype(np.float16)),
}
_BY_CODE = dict(DTYPES.values())
_METADATA = "__metadata__"
_own = threading.local()
# Of each map: the path of its file, and what tells that from another.
_files: Any = weakref.WeakKeyDictionary()
# How the files end that PyTorch's `save` writes.
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


def write(
  path: pathlib.Path,
  shapes: collections.abc.Mapping[str, tuple[int, ...]],
  tensors: collections.abc.Iterable[tuple[str, np.ndarray]],
  *,
  dtype: str,
  metadata: collections.abc.Mapping[str, str] | None = None,
):
  """Writes the tensors, each as it comes, in the order of `shapes`.

  `metadata` are entries of the header that describe them.
  """
  code, numpy_dtype = DTYPES[dtype]
  # PyTorch's own reader asks for this entry.
  header: dict = {_METADATA: {"format": "pt", **(metadata or {})}}
  end = 0
  for key, shape in shapes.items():
    start, end = end, end + math.prod(shape) * numpy_dtype.itemsize
    header[key] = {
      "dtype": code,
      "shape": list(shape),
      "data_offsets": [start, end],
    }
  text = json.dumps(header, separators=(",", ":")).encode()
  # Padded, so that every tensor is aligned in a file mapped to memory.
  text += b" " * (-len(text) % 8)
  with open(path, "wb") as file:
    file.write(struct.pack("<Q", len(text)) + text)
    expected = iter(shapes)
    for key, tensor in tensors:
      assert key == next(expected) and tensor.shape == shapes[key]
      whole = np.ascontiguousarray(_cast(key, tensor, numpy_dtype))
      file.write(whole.reshape(-1).view(np.uint8).data)
      del tensor, whole  # Not to be held while the next is fetched.
    assert next(expected, None) is None


def _cast(key: str, tensor: np.ndarray, dtype: np.dtype) -> np.ndarray:
  try:
    with np.errstate(over="raise"):
      return tensor.astype(dtype, copy=False)
  except FloatingPointError:
    raise errors.UserError(
      f"{key} holds {np.abs(tensor).max():.3g}, beyond the range of {dtype}. "
      "Export with dtype float32 or bfloat16."
    ) from None


def metadata(path: pathlib.Path) -> dict[str, str]:
  """Returns what the header of a file says beside its tensors."""
  entries = _read_all(path)[0].get(_METADATA)
  return entries if isinstance(entries, dict) else {}


def keys(path: pathlib.Path) -> list[str]:
  """Returns the keys of a file, in the order of its header."""
  return list(_read_header(path)[0])


def read(
  path: pathlib.Path,
  wanted: collections.abc.Callable[[str], bool] = lambda key: True,
) -> dict[str, np.ndarray]:
  """Returns the tensors, mapped to memory and read from disk when touched.

  Raises CheckpointError, which names the key, if the header does not describe
  the bytes of the file, of which each is to belong to one tensor, or if a
  tensor that is `wanted` has a type that weights do not have.
  """
  header, start = _read_header(path)
  with open(path, "rb", buffering=0) as file:
    whole = np.memmap(file, np.uint8, "r")
    _files[whole._mmap] = path, _identity(file)  # type: ignore[attr-defined]
  data = whole[start:]
  for key, entry in header.items():
    _check_entry(path, key, entry, len(data))
  _check_places(path, header, len(data))
  tensors = {}
  for key in filter(wanted, header):
    first, last = header[key]["data_offsets"]
    dtype = _BY_CODE.get(header[key]["dtype"])
    if dtype is None:
      raise errors.CheckpointError(
        f"{path}: {key} is of type {header[key]['dtype']}; weights are "
        f"{', '.join(_BY_CODE)}. Save them in one of these."
      )
    tensors[key] = data[first:last].view(dtype).reshape(header[key]["shape"])
  return tensors


def touch(tensor: np.ndarray) -> np.ndarray:
  """Returns a part of a tensor: if `read` found it in a file, read at once.

  Through the map it would come page by page. What is between its rows is read
  as well. What is returned is the calling thread's until its next call.
  """
  mapped = getattr(tensor, "_mmap", None)
  if mapped not in _files or not tensor.size:
    return tensor
  path, identity = _files[mapped]
  start, size = _place(tensor)
  room = kept("read", (size,), np.uint8)
  try:
    # Threads that share a descriptor read ahead of each other, and slowly.
    with open(path, "rb", buffering=0) as file:
      if _identity(file) != identity:
        raise errors.CheckpointError(
          f"{path} was replaced while it was read: import it again."
        )
      _fill(room, file, start)
  except OSError as error:
    raise errors.CheckpointError(f"{path} cannot be read: {error}.") from error
  return np.ndarray(
    tensor.shape, tensor.dtype, room.data, strides=tensor.strides
  )


def _fill(room: np.ndarray, file: Any, start: int) -> None:
  """Fills memory with the bytes of a file, which may come in pieces."""
  done = 0
  while done < len(room):
    more = os.preadv(file.fileno(), [room[done:].data], start + done)
    if not more:
      raise errors.CheckpointError(
        f"{file.name} was cut short while it was read. Copy it again."
      )
    done += more


def _identity(file: Any) -> tuple[int, int]:
  """Returns what tells a file from another that takes its name."""
  found = os.fstat(file.fileno())
  return found.st_dev, found.st_ino


def kept(name: str, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
  """Returns memory of the calling thread, the same each time."""
  size = math.prod(shape) * np.dtype(dtype).itemsize
  if getattr(_own, name, np.empty(0)).nbytes < size:
    setattr(_own, name, np.empty(size, np.uint8))
  return getattr(_own, name)[:size].view(dtype).reshape(shape)


def _place(tensor: np.ndarray) -> tuple[int, int]:
  """Returns where in its file a tensor begins, and how many bytes it spans."""
  whole = np.frombuffer(tensor._mmap, np.uint8)  # type: ignore[attr-defined]
  first, last = np.lib.array_utils.byte_bounds(tensor)
  return first - whole.ctypes.data, last - first


def _check_entry(path: pathlib.Path, key: str, entry: Any, available: int):
  """Refuses an entry of the header that makes no sense by itself."""
  try:
    code, shape = entry["dtype"], entry["shape"]
    first, last = entry["data_offsets"]
    whole = all(type(n) is int and n >= 0 for n in (*shape, first, last))
    if not whole or type(code) is not str:
      raise ValueError
  except (TypeError, KeyError, ValueError):
    raise errors.CheckpointError(
      f"{path}: {key} is described by {entry!r}, which is no dtype, shape and "
      "data_offsets. The file is damaged; copy it again."
    ) from None
  size = last - first
  if code in _BY_CODE:
    size = math.prod(shape) * _BY_CODE[code].itemsize
  if not first <= last <= available or last - first != size:
    raise errors.CheckpointError(
      f"{path}: {key} should hold {size} bytes ({code} {shape}) and is said to "
      f"lie at {first}..{last} of {available}. The file is cut short or "
      "damaged; copy it again."
    )


def _check_places(path: pathlib.Path, header: dict, available: int):
  """Refuses tensors that overlap, and bytes that belong to none."""
  places = sorted((entry["data_offsets"], key) for key, entry in header.items())
  before, end = "the header", 0
  for (first, last), key in [*places, ([available, available], "the end")]:
    if first != end:
      what = "overlap" if first < end else "leave bytes that belong to none"
      raise errors.CheckpointError(
        f"{path}: {before} and {key} {what}: one ends at {end}, the next "
        f"begins at {first}. The file is damaged; copy it again."
      )
    before, end = key, last


def _read_header(path: pathlib.Path) -> tuple[dict, int]:
  """Returns the entries by key and where the bytes of the tensors begin."""
  header, start = _read_all(path)
  header.pop(_METADATA, None)
  return header, start


def refuse_pickle(path: pathlib.Path) -> None:
  """Raises UserError for a file of PyTorch's `save`, by its name or start."""
  with open(path, "rb") as file:
    start = file.read(9)
  # A zip of PyTorch, or a pickle of protocol 2 or later. The length with which
  # a safetensors file begins may be the same bytes; its header comes then.
  looks_so = start[:4] == b"PK\x03\x04" or start[:1] == b"\x80"
  if path.suffix in PICKLES or (looks_so and start[8:] != b"{"):
    # The name by which the folder that it lies in is read.
    stem = "model" if path.stem == "pytorch_model" else path.stem
    # What is called so already is not to be written over.
    stem += "_converted" * (path.suffix == ".safetensors")
    raise errors.UserError(
      f"{path} is a pickle, and is not read: loading one runs whatever code is "
      "in it. Where you trust it, convert it once, with torch:\n"
      f'  tensors = torch.load("{path.name}", weights_only=True)\n'
      f'  safetensors.torch.save_file(tensors, "{stem}.safetensors")\n'
      "(of a training checkpoint, the entry with the weights), and import that."
    )


def _read_all(path: pathlib.Path) -> tuple[dict, int]:
  try:
    refuse_pickle(path)
    with open(path, "rb") as file:
      prefix = file.read(8)
      if len(prefix) < 8:
        raise ValueError(f"it ends after {len(prefix)} bytes")
      (length,) = struct.unpack("<Q", prefix)
      if length > (size := path.stat().st_size):
        raise ValueError(
          f"its header would have {length:,} bytes, and it has {size:,}"
        )
      header = json.loads(file.read(length))
      if not isinstance(header, dict):
        raise ValueError("its header is not one of names")
  except errors.UserError:
    raise
  except (ValueError, RecursionError) as error:
    raise errors.CheckpointError(
      f"{path} is not a safetensors file, or not all of it: {error}. Copy or "
      "download it again."
    ) from None
  except OSError as error:
    raise errors.CheckpointError(f"{path} cannot be read: {error}.") from error
  return header, 8 + length
