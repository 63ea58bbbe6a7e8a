"""Leaves of our tree that are made of other people's tensors, when asked for.

What they hold in many tensors, transposed, is copied once, straight to where
it will stay.
"""

import collections.abc
import concurrent.futures
import dataclasses
import functools
import math
import os
from typing import Any

import numpy as np

from flowjax.interop import safetensors

Shape = tuple[int, ...]

_THREADS = min(8, 2 * (os.cpu_count() or 1))  # Some of them wait for a disk.
_LINE = 64  # bytes that a cache fetches at a time
_PART = 2**20  # numbers that are one thread's to read and copy at a time
_TILE = 256  # of its rows and columns, as many as a core's cache holds twice


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
  index in the mapping stands for. Of a part no more is read than the rows of
  theirs that it is in, unless two axes of theirs are one of ours.
  """

  shape: Shape
  axes: Shape  # the shape, with the axes of theirs apart
  order: tuple[int, ...]
  flip: tuple[int, ...]
  tensors: collections.abc.Mapping[Shape, np.ndarray]
  kind: Any = None  # the dtype that it is to have, if not that of theirs

  @property
  def dtype(self) -> np.dtype:
    return np.dtype(self.kind or next(iter(self.tensors.values())).dtype)

  def astype(self, dtype: Any) -> "Leaf":
    """Returns the leaf as one of this dtype; nothing is read."""
    return dataclasses.replace(self, kind=dtype)

  def __array__(self, dtype=None, copy=None) -> np.ndarray:
    leaf = self if dtype is None else self.astype(dtype)
    return leaf.begin((slice(None),) * len(self.shape)).result()[0]

  def begin(self, index: tuple[slice, ...]) -> "Reading":
    """Begins to read the part that slices, one an axis, cut out."""
    if self.axes != self.shape:
      whole = self._begin([(0, size) for size in self.axes])
      return dataclasses.replace(whole, shape=self.shape, index=index)
    spans = zip(index, self.shape, strict=True)
    return self._begin([part.indices(size)[:2] for part, size in spans])

  def _begin(self, spans: list[tuple[int, int]]) -> "Reading":
    """Begins to read what lies from first to last in each of the axes."""
    shape = tuple(last - first for first, last in spans)
    out = _empty(shape, self.dtype)
    turned = np.flip(out, self.flip).transpose(self.order)
    # Theirs begins where ours ends, in an axis that runs the other way.
    there = [
      (self.axes[axis] - spans[axis][1], self.axes[axis] - spans[axis][0])
      if axis in self.flip
      else spans[axis]
      for axis in self.order
    ]
    copied = []
    for index, tensor in self.tensors.items():
      stacked, inner = there[: len(index)], there[len(index) :]
      place = tuple(np.subtract(index, [first for first, _ in stacked]))
      counts = turned.shape[: len(index)]
      if all(0 <= i < n for i, n in zip(place, counts, strict=True)):
        wanted = tensor[tuple(slice(*span) for span in inner)]
        for part in _divided(*_merged(turned[place], wanted)):
          copied.append(_pool().submit(_copy, *part))
    return Reading(out, shape, tuple(slice(None) for _ in shape), copied)


def whole(array: np.ndarray) -> Leaf:
  """Returns an array that is a leaf of ours as it is."""
  shape = array.shape
  return Leaf(shape, shape, tuple(range(array.ndim)), (), {(): array})


@dataclasses.dataclass(frozen=True, eq=False)
class Reading:
  """A part of a leaf that is being read."""

  out: np.ndarray
  shape: Shape
  index: tuple[slice, ...]
  copied: list[concurrent.futures.Future]

  def result(self) -> tuple[np.ndarray, bool]:
    """Returns the part, and whether all its numbers are finite."""
    finite = all([part.result() for part in self.copied])
    return self.out.reshape(self.shape)[self.index], finite


Leaves = collections.abc.Iterator[tuple[str, Leaf]]


@functools.cache
def _pool() -> concurrent.futures.ThreadPoolExecutor:
  """Returns the threads that read and copy, each with memory that it keeps."""
  return concurrent.futures.ThreadPoolExecutor(_THREADS, "weights")


def _empty(shape: Shape, dtype: np.dtype) -> np.ndarray:
  """Returns an array that JAX need not copy on a CPU: at 64 bytes' multiple."""
  size = math.prod(shape) * dtype.itemsize
  memory = np.empty(size + _LINE, np.uint8)
  start = -memory.ctypes.data % _LINE
  return memory[start : start + size].view(dtype).reshape(shape)


def _copy(out: np.ndarray, tensor: np.ndarray) -> bool:
  """Copies a tensor, with its axes in the order in which they lie in memory.

  Returns whether all its numbers are finite.

  Where those of `out` lie otherwise, tile by tile: each is read along the rows
  of theirs and written along those of ours, and meets both in the cache. Its
  own rows are an odd number of lines apart, so that they do not meet in one
  place there.
  """
  tensor = safetensors.touch(tensor)
  if out.strides[-1] == out.itemsize:
    out[...] = tensor
    return _is_finite(out)
  width = min(tensor.shape[-1], _TILE)
  lines = -(-width * out.itemsize // _LINE) | 1
  shape = (*tensor.shape[:-1], lines * _LINE // out.itemsize)
  tile = safetensors.kept("tile", shape, out.dtype)
  finite = True
  for i in range(0, tensor.shape[-1], width):
    wanted = tensor[..., i : i + width]
    held = tile[..., : wanted.shape[-1]]
    held[...] = wanted
    out[..., i : i + width] = held
    finite = finite and _is_finite(held)
  return finite


def _is_finite(array: np.ndarray) -> bool:
  # A sum is quickly made, and finite only if each term is.
  with np.errstate(over="ignore", invalid="ignore"):
    total = array.sum(dtype=np.float32)
  return bool(np.isfinite(total) or np.isfinite(array).all())


def _divided(
  out: np.ndarray, tensor: np.ndarray
) -> collections.abc.Iterator[tuple[np.ndarray, np.ndarray]]:
  """Yields parts of both of a size to read and copy, each rows of theirs."""
  row = tensor.strides[0] // tensor.itemsize  # With what is between two.
  if len(tensor) * row <= _PART:
    yield out, tensor
    return
  count = _PART // row
  if not count and tensor.ndim > 1:
    for ours, theirs in zip(out, tensor, strict=True):
      yield from _divided(ours, theirs)
    return
  line = _LINE // out.itemsize  # No line of ours is written by two threads.
  count = max(count // line * line, min(count, line), 1)
  for i in range(0, len(tensor), count):
    yield out[i : i + count], tensor[i : i + count]


def _merged(
  out: np.ndarray, tensor: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """Returns the same with few axes, in the order in which theirs lie."""
  order = sorted(range(out.ndim), key=lambda i: -tensor.strides[i])
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
