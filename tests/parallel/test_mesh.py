"""The mesh fits the devices, or says which would."""

import itertools
import math

import jax
import numpy as np
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


def test_of_shapes_as_near_the_plainest_are_named():
  with pytest.raises(ValueError, match="8 devices") as caught:
    meshes.build(meshes.MeshConfig(data=2, fsdp=2))
  first, second, _ = str(caught.value).split("Nearest that do: ")[1].split("; ")
  assert "data=4 --config.mesh.fsdp=2 --config.mesh.tensor=1" in first
  assert "data=2 --config.mesh.fsdp=4 --config.mesh.tensor=1" in second


@pytest.mark.parametrize("sizes", [{"data": 0}, {"data": -1, "fsdp": -1}])
def test_sizes_that_mean_nothing_are_refused(sizes):
  with pytest.raises(ValueError, match="mesh axis"):
    meshes.MeshConfig(**sizes)


def test_a_batch_that_does_not_divide_names_those_that_do():
  mesh = meshes.build(meshes.MeshConfig(data=2, fsdp=4))
  meshes.check_batch(16, mesh, "batch_size")
  with pytest.raises(ValueError, match="Sizes that are: 8, 16"):
    meshes.check_batch(12, mesh, "batch_size")


def _slices_of(mesh, per_slice):
  """Returns which slice each place of the mesh lies in."""
  number = {device: i // per_slice for i, device in enumerate(jax.devices())}
  return np.vectorize(number.get)(mesh.devices)


@pytest.mark.parametrize("slices", [2, 4])
def test_data_lies_across_slices_and_all_else_inside(slices):
  mesh = meshes.build(meshes.MeshConfig(fsdp=2, slices=slices))
  where = _slices_of(mesh, 8 // slices)
  # One slice per share of data, and every slice.
  assert (where == where[:, :1]).all()
  assert sorted(set(where.ravel())) == list(range(slices))
  assert [*where[:, 0, 0, 0]] == sorted(where[:, 0, 0, 0])


def test_an_axis_across_slices_is_refused_with_the_nearest_that_is_not():
  with pytest.raises(ValueError, match="2 slices of 4 devices") as caught:
    meshes.build(meshes.MeshConfig(data=1, fsdp=8, slices=2))
  message = str(caught.value)
  assert "--config.mesh.data=2 --config.mesh.fsdp=4" in message
  assert "--config.mesh.slices=1" in message
  with pytest.raises(ValueError, match="slices = 3.*8 devices"):
    meshes.build(meshes.MeshConfig(slices=3))


class _Chip:
  """A device that says in which slice it is."""

  platform, device_kind = "cpu", "chip"

  def __init__(self, slice_index):
    self.slice_index = slice_index


def _grid(devices, **config):
  """Returns the slice of each place of the mesh of `devices`."""
  config = meshes.MeshConfig(**config)
  slices = meshes._slices(devices) if config.slices == -1 else [devices]
  grid = meshes._layout(slices, config.shape(len(devices), len(slices)))
  return np.vectorize(lambda chip: chip.slice_index)(grid)


def test_slices_are_found_whatever_the_order_of_the_devices():
  chips = [_Chip(i % 2) for i in range(8)]
  assert meshes.slice_count(chips) == 2
  where = _grid(chips, data=2, fsdp=4)
  assert (where == np.arange(2).reshape(2, 1, 1, 1, 1)).all()
  with pytest.raises(ValueError, match="2 slices of 4 devices"):
    _grid(chips, data=1, fsdp=8)
  with pytest.raises(ValueError, match="of one size"):
    _grid(chips[:3])


@pytest.mark.parametrize(
  ("sizes", "axis"),
  [
    (dict(data=1, fsdp=4, tensor=2), 1),
    (dict(data=1, tensor=4, context=2), 3),
    (dict(data=1, tensor=8), 2),
  ],
)
def test_where_any_axis_may_lie_across_the_least_talkative_does(sizes, axis):
  where = _grid([_Chip(i % 2) for i in range(8)], slices=1, **sizes)
  halves = np.split(where, 2, axis)
  assert (halves[0] == 0).all() and (halves[1] == 1).all()


def test_shapes_are_all_that_multiply_to_the_devices():
  every = itertools.product((1, 2, 3, 4, 6, 12), repeat=5)
  assert list(meshes._shapes(12, 5)) == [
    shape for shape in every if math.prod(shape) == 12
  ]
  # Its 36 divisors make 60 million tuples of five.
  assert len(list(meshes._shapes(1440, 5))) == 126 * 15 * 5
