"""What is placed on a mesh comes back, from rows or from the whole."""

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


def test_one_process_does_its_work_with_the_arrays_themselves():
  mesh = meshes.build(MESHES[1])
  sharding = jax.sharding.NamedSharding(mesh, P("fsdp"))
  tree = {"a": jax.device_put(np.arange(8.0), sharding)}
  seen = []
  placing.on_first(tree, seen.append)
  assert seen == [tree]
