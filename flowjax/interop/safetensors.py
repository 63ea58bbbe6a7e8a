"""The safetensors format: a JSON header, then the bytes of every tensor.

Eight bytes hold the length of the header, little-endian; the header maps each
key to its dtype, shape and place among the bytes that follow. It holds no
code, so that a file from a stranger can do no harm.
"""

import collections.abc
import json
import math
import pathlib
import struct

import ml_dtypes
import numpy as np

from flowjax import errors

DTYPES = {
  "float32": ("F32", np.dtype(np.float32)),
  "bfloat16": ("BF16", np.dtype(ml_dtypes.bfloat16)),
  "float16": ("F16", np.dtype(np.float16)),
}
_BY_CODE = dict(DTYPES.values())


def write(
  path: pathlib.Path,
  shapes: collections.abc.Mapping[str, tuple[int, ...]],
  tensors: collections.abc.Iterable[tuple[str, np.ndarray]],
  *,
  dtype: str,
):
  """Writes the tensors, each as it comes, in the order of `shapes`."""
  code, numpy_dtype = DTYPES[dtype]
  # PyTorch's own reader asks for this entry.
  header: dict = {"__metadata__": {"format": "pt"}}
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
    for (key, tensor), expected in zip(tensors, shapes, strict=True):
      assert key == expected and tensor.shape == shapes[key]
      file.write(_cast(key, tensor, numpy_dtype).tobytes())


def _cast(key: str, tensor: np.ndarray, dtype: np.dtype) -> np.ndarray:
  try:
    with np.errstate(over="raise"):
      return tensor.astype(dtype)
  except FloatingPointError:
    raise errors.UserError(
      f"{key} holds {np.abs(tensor).max():.3g}, beyond the range of {dtype}. "
      "Export with dtype float32 or bfloat16."
    ) from None


def read(path: pathlib.Path) -> dict[str, np.ndarray]:
  """Returns the tensors, mapped to memory and read from disk when touched.

  Raises CheckpointError, which names the key, if the header does not describe
  the bytes of the file.
  """
  header, start = _read_header(path)
  data = np.memmap(path, np.uint8, "r")[start:]
  tensors = {}
  for key, entry in header.items():
    dtype = _BY_CODE.get(entry["dtype"])
    if dtype is None:
      raise errors.CheckpointError(
        f"{path}: {key} is of type {entry['dtype']}; weights are "
        f"{', '.join(_BY_CODE)}."
      )
    first, last = entry["data_offsets"]
    size = math.prod(entry["shape"]) * dtype.itemsize
    if not 0 <= first <= last <= len(data) or last - first != size:
      raise errors.CheckpointError(
        f"{path}: {key} should hold {size} bytes ({entry['dtype']} "
        f"{entry['shape']}) and is said to lie at {first}..{last} of "
        f"{len(data)}. The file is cut short or damaged; copy it again."
      )
    tensors[key] = data[first:last].view(dtype).reshape(entry["shape"])
  return tensors


def _read_header(path: pathlib.Path) -> tuple[dict, int]:
  """Returns the entries by key and where the bytes of the tensors begin."""
  with open(path, "rb") as file:
    prefix = file.read(8)
    try:
      (length,) = struct.unpack("<Q", prefix)
      if length > path.stat().st_size:
        raise ValueError("its header is longer than the file")
      header = json.loads(file.read(length))
    except (struct.error, ValueError) as error:
      raise errors.CheckpointError(
        f"{path} is not a safetensors file: {error}."
      ) from None
  header.pop("__metadata__", None)
  return header, 8 + length
