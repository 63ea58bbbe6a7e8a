"""Between the arrays of hosts and the arrays of a mesh, whoever holds what.

Where several processes share a mesh, a host can give only the rows that its own
devices hold, and can read only these. Which rows they are follows from the
mesh: with `tensor` or `context` across processes, several need the same ones.
"""

# Shape suffixes: B rows of a batch.

import collections.abc
import logging
import math
from typing import Any, Protocol

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from flowjax.parallel import mesh as meshes

Shape = tuple[int, ...]
Box = tuple[slice, ...]
# Bytes of two leaves that a host holds at once; of larger ones it holds one.
_AHEAD = 2**30

Put = collections.abc.Callable[[dict[str, Any]], dict[str, Any]]


def rows(mesh: Mesh, count: int) -> np.ndarray:
  """Returns which rows of a batch of `count` this process's devices hold."""
  sharding = meshes.batch_sharding(mesh)
  parts = sharding.addressable_devices_indices_map((count,)).values()
  held_B = np.zeros(count, bool)
  for (part,) in parts:  # type: ignore[misc]
    held_B[part] = True
  return np.flatnonzero(held_B)


def put_part(mesh: Mesh, count: int) -> Put:
  """Returns what places the `rows` of a batch that this process has read."""
  sharding, mine_B = meshes.batch_sharding(mesh), rows(mesh, count)

  def place(leaf: np.ndarray) -> jax.Array:
    def part(index):
      start, stop, _ = index[0].indices(count)
      first = int(np.searchsorted(mine_B, start))
      return leaf[first : first + stop - start]

    assert len(leaf) == len(mine_B), (len(leaf), len(mine_B))
    shape = (count, *leaf.shape[1:])
    return jax.make_array_from_callback(shape, sharding, part)

  return lambda batch: jax.tree.map(place, batch)


def put_whole(mesh: Mesh) -> Put:
  """Returns what places a batch of which every process has all rows."""
  sharding = meshes.batch_sharding(mesh)

  def place(leaf: Any) -> jax.Array:
    leaf = np.asarray(leaf)
    return jax.make_array_from_callback(leaf.shape, sharding, leaf.__getitem__)

  return lambda batch: jax.tree.map(place, batch)


class Leaf(Protocol):
  """An array of which a part is read when it is asked for."""

  def astype(self, dtype: Any) -> "Leaf":
    """Returns the same with another dtype; nothing is read."""

  def begin(self, index: Box) -> Any:
    """Begins to read a part.

    The `result()` of that is the part, and whether all of it is finite.
    """


Leaves = collections.abc.Iterable[tuple[str, Leaf]]


def put_leaves(
  leaves: Leaves,
  places: collections.abc.Mapping[str, Any],
) -> dict[str, jax.Array]:
  """Places leaves as they come, each with the dtype and sharding of its place.

  The host holds of one at a time what its devices hold. It reads the next
  before the last is placed where both are small.
  """
  placed: dict[str, jax.Array] = {}

  def finish(path: str, box: Box, reading: Any) -> None:
    part, finite = reading.result()
    if not finite:
      logging.warning("%s is not finite: these weights are broken.", path)
    placed[path] = _put(part, box, places[path])
    # The copies to devices read from `part`, which ends here.
    placed[path].block_until_ready()

  begun: list[tuple[str, Box, Any]] = []  # What ends in it is let go.
  size_before = 0
  for path, leaf in leaves:
    box, dtype = _held(places[path]), np.dtype(places[path].dtype)
    size = math.prod(part.stop - part.start for part in box) * dtype.itemsize
    if begun and size_before + size > _AHEAD:
      finish(*begun.pop())
    begun.append((path, box, leaf.astype(dtype).begin(box)))
    if len(begun) > 1:
      finish(*begun.pop(0))
    size_before = size
  for last in begun:
    finish(*last)
  return placed


def _held(place: Any) -> Box:
  """Returns the least part with all that this process's devices hold."""
  found = place.sharding.addressable_devices_indices_map(place.shape).values()
  spans = [
    [
      part.indices(size)[:2]
      for part, size in zip(index, place.shape, strict=True)
    ]
    for index in found
  ]
  return tuple(
    slice(min(first for first, _ in axis), max(last for _, last in axis))
    for axis in zip(*spans, strict=True)
  )


def _put(part: np.ndarray, box: Box, place: Any) -> jax.Array:
  """Places an array of which this process has the part in a box."""

  def of_device(index: Any) -> np.ndarray:
    inner = []
    for held, wanted, size in zip(box, index, place.shape, strict=True):
      first, last, _ = wanted.indices(size)
      inner.append(slice(first - held.start, last - held.start))
    return part[tuple(inner)]

  return jax.make_array_from_callback(place.shape, place.sharding, of_device)


def fetch(array: Any) -> np.ndarray:
  """Returns an array whole, on every process; all of them must ask for it."""
  if not isinstance(array, jax.Array) or _is_here(array):
    return np.asarray(array)
  return multihost_utils.process_allgather(array, tiled=True)


def on_first(tree: Any, work: collections.abc.Callable[[Any], None]) -> None:
  """Lets process 0 do `work(tree)`; the others only give it their parts.

  What `work` finds in the tree has a shape and becomes an array when numpy asks
  for it, one leaf at a time, in whatever order.
  """
  if jax.process_count() == 1:
    work(tree)
    return
  leaves, structure = jax.tree.flatten(tree)
  if jax.process_index() == 0:
    lazy = [_Gathered(i, leaf) for i, leaf in enumerate(leaves)]
    work(jax.tree.unflatten(structure, lazy))
    _next(_END)
    return
  while (index := _next(_END)) != _END:
    fetch(leaves[index])


def of_first(value: float) -> float:
  """Returns the value that process 0 has; all of them must ask for it."""
  if jax.process_count() == 1:
    return value
  return float(multihost_utils.broadcast_one_to_all(np.float32(value)))


# Asked for by process 0 when it needs no more.
_END = -1


class _Gathered:
  """A leaf that all processes bring together when process 0 asks for it."""

  def __init__(self, index: int, leaf: jax.Array):
    self._index, self._leaf = index, leaf
    self.shape, self.dtype, self.ndim = leaf.shape, leaf.dtype, leaf.ndim
    self.size = leaf.size

  def __array__(self, dtype=None, copy=None) -> np.ndarray:
    _next(self._index)
    return np.asarray(fetch(self._leaf), dtype)


def _next(index: int) -> int:
  """Returns the index that process 0 says."""
  return int(multihost_utils.broadcast_one_to_all(np.int32(index)))


def _is_here(array: jax.Array) -> bool:
  return array.is_fully_addressable or array.is_fully_replicated
