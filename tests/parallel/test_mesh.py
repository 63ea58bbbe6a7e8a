"""The mesh fits the devices, or says which would."""

import jax
import pytest

from flowjax.parallel import mesh as meshes


@pytest.mark.parametrize(
  ("config", "shape"),
  [
    ({}, (8, 1, 1, 1, 1)),
    ({"fsdp": 2}, (4, 2, 1, 1, 1)),
    ({"data": 1, "fsdp": -1}, (1, 8, 1, 1, 1)),
    ({"data": 2, "fsdp": 2, "tensor": 2}, (2, 2, 2, 1, 1)),
    ({"context": 2, "ulysses": 2}, (2, 1, 1, 2, 2)),
  ],
)
def test_minus_one_is_what_the_others_leave(config, shape):
  mesh = meshes.build(meshes.MeshConfig(**config))
  assert tuple(mesh.shape.values()) == shape
  assert tuple(mesh.shape) == meshes.AXES


def test_a_mesh_may_take_some_of_the_devices():
  mesh = meshes.build(meshes.MeshConfig(), jax.devices()[:1])
  assert mesh.size == 1


def test_an_impossible_mesh_names_the_nearest():
  with pytest.raises(ValueError, match="8 devices") as caught:
    meshes.build(meshes.MeshConfig(data=1, fsdp=16))
  assert (
    "--config.mesh.data=1 --config.mesh.fsdp=8 --config.mesh.tensor=1"
    in str(caught.value)
  )
  with pytest.raises(ValueError, match="data=-1"):
    meshes.build(meshes.MeshConfig(data=-1, fsdp=3))


@pytest.mark.parametrize("sizes", [{"data": 0}, {"data": -1, "fsdp": -1}])
def test_sizes_that_mean_nothing_are_refused(sizes):
  with pytest.raises(ValueError, match="mesh axis"):
    meshes.MeshConfig(**sizes)


def test_a_batch_that_does_not_divide_names_those_that_do():
  mesh = meshes.build(meshes.MeshConfig(data=2, fsdp=4))
  meshes.check_batch(16, mesh, "batch_size")
  with pytest.raises(ValueError, match="Sizes that are: 8, 16"):
    meshes.check_batch(12, mesh, "batch_size")
