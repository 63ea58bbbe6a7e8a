"""What is placed on a mesh comes back, from rows or from the whole."""

import types
import weakref

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from flowjax.parallel import mesh as meshes
from flowjax.parallel import placing

MESHES = [
  meshes.MeshConfig(),
  meshes.MeshConfig(data=2, fsdp=4),
  meshes.MeshConfig(data=2, fsdp=1, tensor=2, context=2),
]


@pytest.fixture(name="batch")
def _batch():
  rng = np.random.default_rng(0)
  return {"image": rng.standard_normal((16, 2, 2, 1)), "label": np.arange(16)}


@pytest.mark.parametrize("config", MESHES)
def test_rows_and_whole_batches_lie_alike(config, batch):
  mesh = meshes.build(config)
  mine = placing.rows(mesh, 16)
  np.testing.assert_array_equal(mine, np.arange(16))  # Of one process: all.
  parts = placing.put_part(mesh, 16)(batch)
  whole = placing.put_whole(mesh)(batch)
  for key in batch:
    assert parts[key].sharding == whole[key].sharding
    assert parts[key].sharding == meshes.batch_sharding(mesh)
    np.testing.assert_array_equal(placing.fetch(parts[key]), whole[key])


class Half:
  """A mesh of which this process has the later half of the devices."""

  def __init__(self, sharding, monkeypatch):
    own = type(sharding).addressable_devices_indices_map

    def later(self, shape):
      found = own(self, shape)
      return {d: i for d, i in found.items() if d.id >= 4}

    monkeypatch.setattr(
      type(sharding), "addressable_devices_indices_map", later, raising=True
    )


@pytest.mark.parametrize(
  ("config", "rows"),
  [
    (MESHES[0], range(8, 16)),
    (MESHES[1], range(8, 16)),
    # Where the batch is not divided between the halves, each needs it all.
    (meshes.MeshConfig(data=1, tensor=2, context=4), range(16)),
  ],
)
def test_a_process_reads_the_rows_of_its_devices(config, rows, monkeypatch):
  mesh = meshes.build(config)
  Half(meshes.batch_sharding(mesh), monkeypatch)
  np.testing.assert_array_equal(placing.rows(mesh, 16), np.array(rows))


class Leaf:
  """Notes of which part it was read."""

  def __init__(self, array):
    self.array, self.asked = array, []

  def astype(self, dtype):
    self.array = self.array.astype(dtype)
    return self

  def begin(self, index):
    self.asked.append(index)
    part = self.array[index]
    return types.SimpleNamespace(
      result=lambda: (part, bool(np.isfinite(part).all()))
    )


@pytest.mark.parametrize("spec", [P(), P("fsdp", "data"), P(None, "fsdp")])
def test_leaves_come_whole_with_the_dtype_of_their_place(spec, caplog):
  mesh = meshes.build(MESHES[1])
  sharding = jax.sharding.NamedSharding(mesh, spec)
  place = jax.ShapeDtypeStruct((8, 4), np.float16, sharding=sharding)
  whole, broken = Leaf(np.arange(32.0).reshape(8, 4)), Leaf(np.full(8, np.nan))
  flat = jax.ShapeDtypeStruct(
    (8,), np.float32, sharding=jax.sharding.NamedSharding(mesh, P("data"))
  )
  leaves = [("a", whole), ("b", broken)]
  placed = placing.put_leaves(leaves, {"a": place, "b": flat})
  assert placed["a"].sharding == sharding and placed["a"].dtype == np.float16
  np.testing.assert_array_equal(
    placed["a"], np.arange(32).reshape(8, 4).astype(np.float16)
  )
  assert "b is not finite" in caplog.text and "a is" not in caplog.text


def test_a_process_reads_what_its_devices_hold(monkeypatch):
  """Of the later half of eight: two rows of four parts, all columns."""
  mesh = meshes.build(meshes.MeshConfig(data=1, fsdp=4, tensor=2))
  sharding = jax.sharding.NamedSharding(mesh, P("fsdp", "tensor"))
  place = jax.ShapeDtypeStruct((8, 4), np.float32, sharding=sharding)
  Half(sharding, monkeypatch)
  placed = []

  def make(shape, sharding, of_device):
    indices = sharding.addressable_devices_indices_map(shape)
    placed.extend((i, of_device(i)) for i in indices.values())
    return types.SimpleNamespace(block_until_ready=lambda: None)

  # The other half places the rest, which jax would miss here.
  monkeypatch.setattr(jax, "make_array_from_callback", make)
  whole = np.arange(32, dtype=np.float32).reshape(8, 4)
  leaf = Leaf(whole)
  placing.put_leaves([("a", leaf)], {"a": place})
  assert leaf.asked == [(slice(4, 8), slice(0, 4))]
  assert len(placed) == 4
  for index, part in placed:
    np.testing.assert_array_equal(part, whole[index])


@pytest.mark.parametrize(("room", "most"), [(8 * 4 * 3, 2), (8 * 4 * 2 - 1, 1)])
def test_two_small_leaves_are_held_at_once_and_one_large(
  monkeypatch, room, most
):
  monkeypatch.setattr(placing, "_AHEAD", room)
  sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  place = jax.ShapeDtypeStruct((8,), np.float32, sharding=sharding)
  live, seen = weakref.WeakSet(), []

  class Reading:
    """Holds its part as long as it lives."""

    def result(self):
      return np.zeros(8, np.float32), True

  class Counted(Leaf):
    def begin(self, index):
      reading = Reading()
      live.add(reading)
      seen.append(len(live))
      return reading

  names = "abcde"
  leaves = ((name, Counted(np.zeros(8))) for name in names)
  placed = placing.put_leaves(leaves, dict.fromkeys(names, place))
  assert list(placed) == list(names)
  assert max(seen) == most and not live


def test_one_process_does_its_work_with_the_arrays_themselves():
  mesh = meshes.build(MESHES[1])
  sharding = jax.sharding.NamedSharding(mesh, P("fsdp"))
  tree = {"a": jax.device_put(np.arange(8.0), sharding)}
  seen = []
  placing.on_first(tree, seen.append)
  assert seen == [tree]
