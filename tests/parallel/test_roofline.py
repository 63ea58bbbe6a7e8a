"""The model of time: wires by hand, and what hides behind what."""

import dataclasses

import pytest

from flowjax.parallel import chips, collectives, roofline, topology

V5P, H100 = chips.CHIPS["v5p"], chips.CHIPS["h100"]


def moved(kind, size, axes, group, trips=()):
  return collectives.Collective(kind, "bf16", size, (), axes, group, trips, "")


def layout(name, slices=1, **shape):
  axes = ("data", "fsdp", "tensor", "context")
  sizes = {axis: shape.get(axis, 1) for axis in axes}
  return roofline.layout(sizes, topology.parse(name, slices))


def test_the_last_axes_fill_a_domain_first():
  wires = layout("h100:16x8", data=4, fsdp=16, tensor=2)
  assert (wires["tensor"].inner, wires["tensor"].outer) == (2, 1)
  assert (wires["fsdp"].inner, wires["fsdp"].outer) == (4, 4)
  assert (wires["data"].inner, wires["data"].outer) == (1, 4)


def test_an_axis_takes_sides_of_the_torus():
  wires = layout("v5p:8x8x8", fsdp=512)
  assert (wires["fsdp"].rings, wires["fsdp"].closed) == (3, True)
  wires = layout("v5p:8x8x8", data=16, fsdp=8, tensor=4)
  assert not wires["tensor"].closed  # Half of a side: no way around.
  slices = layout("v6e:16x16", 4, data=4, fsdp=256)
  assert (slices["fsdp"].inner, slices["fsdp"].rings) == (256, 2)
  assert slices["data"].outer == 4


def test_gathering_by_hand():
  """Of B bytes 7/8 arrive, over three rings; a sum takes that twice."""
  wires = layout("v5p:2x2x2", fsdp=8)
  size = 10**9
  link = 3 * 0.5 * V5P.link * roofline.LINK_EFFICIENCY  # Sides of 2: open.
  gather = moved("all-gather", size, ("fsdp",), 8)
  seconds = roofline.wire_seconds(gather, wires, V5P)
  assert seconds == pytest.approx(7 / 8 * size / link, rel=1e-2)
  summed = dataclasses.replace(gather, kind="all-reduce")
  assert roofline.wire_seconds(summed, wires, V5P) == pytest.approx(2 * seconds)


def test_across_nodes_every_device_carries_its_part():
  wires = layout("h100:4x8", data=4, fsdp=8)
  size = 10**9
  network = H100.network * roofline.LINK_EFFICIENCY
  one = moved("all-reduce", size, ("data",), 4)
  seconds = roofline.wire_seconds(one, wires, H100)
  assert seconds == pytest.approx(2 * 3 / 4 * size / network, rel=1e-2)
  both = moved("all-reduce", size, ("data", "fsdp"), 32)
  near = 7 / 8 * size / (H100.link * roofline.LINK_EFFICIENCY)
  far = 3 / 4 * size / 8 / network
  assert roofline.wire_seconds(both, wires, H100) == pytest.approx(
    2 * (near + far), rel=2e-2
  )


def test_parameters_hide_behind_compute_and_activations_do_not():
  wires = layout("v5p:2x2x2", data=1, fsdp=4, tensor=2)

  def step(*found, flops=1e15):
    return roofline.step(found, wires, V5P, flops=flops, hbm_bytes=0.0)

  gather = moved("all-gather", 10**8, ("fsdp",), 4, (28,))
  assert step(gather).exposed == 0.0
  assert step(gather, flops=0.0).exposed == step(gather).wires > 0
  assert step(dataclasses.replace(gather, trips=())).exposed > 0
  sums = moved("all-reduce", 10**8, ("tensor",), 2, (28,))
  assert step(sums).exposed == step(sums).wires > 0
  wires["context"] = wires["tensor"]
  for kind, axes, hides in (
    ("all-reduce", ("data", "context"), True),
    ("all-reduce", ("context",), True),
    ("all-to-all", ("context",), False),
  ):
    one = moved(kind, 10**6, axes, 2, (28,))
    assert (step(one).exposed == 0.0) == hides
  assert step(flops=1e15).bound_by == "compute"
  assert step(sums, flops=1e9).bound_by == "communication"
