"""Leaves of our tree that are made of other people's tensors, when asked for.

What they hold in many tensors, transposed, is copied once, straight to where
it will stay.
"""

import collections.abc
import concurrent.futures
import dataclasses
import itertools
import math

import numpy as np

Shape = tuple[int, ...]

_THREADS = 8
_ROWS = 16  # of float32 in a line of a cache
_PART = 2**20  # numbers that are one thread's to copy at a time


@dataclasses.dataclass(frozen=True, eq=False)
class Array:
  """What becomes an array when it is asked for."""

  shape: Shape
  make: collections.abc.Callable[[], np.ndarray]

  def __array__(self, dtype=None, copy=None) -> np.ndarray:
    return np.asarray(self.make(), dtype)


@dataclasses.dataclass(frozen=True, eq=False)
class Leaf:
  """A leaf of ours in tensors of theirs, which are read when it is asked for.

  `tensors` have the axes `order` of ours, but for the leading axes that their
  index in the mapping stands for.
  """

  shape: Shape
  axes: Shape  # the shape, with the axes of theirs apart
  order: tuple[int, ...]
  flip: tuple[int, ...]
  tensors: collections.abc.Mapping[Shape, np.ndarray]

  @property
  def dtype(self) -> np.dtype:
    return next(iter(self.tensors.values())).dtype

  def __array__(self, dtype=None, copy=None) -> np.ndarray:
    out = _empty(self.shape, np.dtype(dtype or self.dtype))
    turned = np.flip(out.reshape(self.axes), self.flip).transpose(self.order)
    parts = itertools.chain.from_iterable(
      _divided(*_merged(turned[index], tensor))
      for index, tensor in self.tensors.items()
    )
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
      list(pool.map(_copy, *zip(*parts, strict=True)))
    return out


Leaves = collections.abc.Iterator[tuple[str, Leaf]]


def _empty(shape: Shape, dtype: np.dtype) -> np.ndarray:
  """Returns an array that JAX need not copy on a CPU: at 64 bytes' multiple."""
  size = math.prod(shape) * dtype.itemsize
  memory = np.empty(size + 64, np.uint8)
  start = -memory.ctypes.data % 64
  return memory[start : start + size].view(dtype).reshape(shape)


def _copy(out: np.ndarray, tensor: np.ndarray) -> None:
  """Copies a tensor whose axes may lie in memory in another order.

  As many of its rows at a time as there are numbers in a line of a cache, so
  that each line is read, and written, once.
  """
  if tensor.strides[-1] == tensor.itemsize:  # Their rows are rows of ours.
    out[...] = tensor
    return
  for i in range(0, out.shape[-1], _ROWS):
    rows = tensor[..., i : i + _ROWS]
    out[..., i : i + _ROWS] = rows.astype(out.dtype, copy=False)


def _divided(
  out: np.ndarray, tensor: np.ndarray
) -> collections.abc.Iterator[tuple[np.ndarray, np.ndarray]]:
  """Yields parts of both, cut across the rows of theirs, of a size to copy."""
  axis = 0 if tensor.strides[-1] == tensor.itemsize else -1
  out, tensor = np.moveaxis(out, axis, 0), np.moveaxis(tensor, axis, 0)
  rows = math.ceil(_PART * len(out) / out.size / _ROWS) * _ROWS
  for i in range(0, len(out), rows):
    yield (
      np.moveaxis(out[i : i + rows], 0, axis),
      np.moveaxis(tensor[i : i + rows], 0, axis),
    )


def _merged(
  out: np.ndarray, tensor: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """Returns the same with few axes, in the order in which those of out lie."""
  order = sorted(range(out.ndim), key=lambda i: -abs(out.strides[i]))
  pair = [np.squeeze(array.transpose(order)) for array in (out, tensor)]
  shape: list[int] = []
  for i, size in enumerate(pair[0].shape):
    if i and all(a.strides[i - 1] == size * a.strides[i] for a in pair):
      shape[-1] *= size
    else:
      shape.append(size)
  merged = [array.reshape(shape or 1) for array in pair]
  assert np.may_share_memory(merged[0], out)
  return merged[0], merged[1]
