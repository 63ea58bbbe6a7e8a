# ruff: noqa: E501
"""Compiled programs are read right: groups, loops, bytes, and each but once."""

import types

import numpy as np
import pytest

from flowjax.parallel import collectives, roofline, topology


def mesh(**shape):
  return types.SimpleNamespace(
    shape=shape, size=int(np.prod(list(shape.values())))
  )


PROGRAM = """
%add (x: f32[], y: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%x, %y)
}

%fused.1 (p: bf16[4]) -> bf16[16] {
  ROOT %ag.1 = bf16[16]{0} all-gather(%p), channel_id=7, replica_groups=GROUPS, dimensions={0}
}

%all-reduce-scatter.1 (p: f32[16]) -> f32[4] {
  %ar.1 = f32[16]{0} all-reduce(%p), channel_id=8, replica_groups=[2,4]<=[8], to_apply=%add
}

%body (p: (s32[], bf16[4])) -> (s32[], bf16[4]) {
  %a = bf16[16]{0} fusion(%p), kind=kCustom, calls=%fused.1
  %b = bf16[16]{0} fusion(%p), kind=kCustom, calls=%fused.1
  %c = f32[4]{0} fusion(%p), kind=kCustom, calls=%all-reduce-scatter.1
}

%condition (p: (s32[], bf16[4])) -> pred[] {
  %n = s32[]{:T(128)} constant(28)
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (p: f32[8]) -> f32[8] {
  %loop = (s32[], bf16[4]) while(%t), condition=%condition, body=%body
  %s = ((f32[8]{0}), f32[1]{0}) reduce-scatter-start(%p), channel_id=1, replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}
  %g = (bf16[1,2]{1,0:T(8,128)(2,1)S(1)}, bf16[2,2]{1,0}) all-gather-start(%p), channel_id=2, replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_1'}, dimensions={0}
  %m = f32[6]{0} collective-permute(%p), channel_id=3, source_target_pairs={{0,4},{1,5},{2,6},{3,7},{4,0},{5,1},{6,2},{7,3}}
  %alone = f32[8]{0} all-reduce(%p), channel_id=4, replica_groups={{0},{1},{2},{3},{4},{5},{6},{7}}, to_apply=%add
  %all = (f32[2]{0}, f32[3]{0}) all-reduce(%p, %q), channel_id=5, to_apply=%add
}
"""


def test_a_program_is_read():
  text = PROGRAM.replace("GROUPS", "[4,2]<=[2,4]T(1,0)")
  found = collectives.read(text, mesh(data=2, fsdp=4))
  assert [
    (one.kind, one.dtype, one.bytes, one.axes, one.group, one.trips)
    for one in found
  ] == [
    ("all-gather", "bf16", 32, ("data",), 2, (28,)),
    ("reduce-scatter", "f32", 64, ("fsdp",), 4, (28,)),
    ("reduce-scatter", "f32", 32, ("data", "fsdp"), 8, ()),
    ("all-gather", "bf16", 8, ("fsdp?",), 2, ()),
    ("collective-permute", "f32", 24, ("data",), 2, ()),
    ("all-reduce", "f32", 20, ("data", "fsdp"), 8, ()),
  ]
  assert found[0].count == 28
  first = collectives.table(found)[0]
  assert first["bytes_per_step"] == 28 * 64
  assert first["in_layer_loop"] and first["axis"] == "fsdp"


@pytest.mark.parametrize(
  "groups, axes",
  [
    ("{{0,1,2,3},{4,5,6,7}}", ("fsdp", "tensor")),
    ("{{0,4},{1,5},{2,6},{3,7}}", ("data",)),
    ("[4,2]<=[8]", ("tensor",)),
    ("[2,4]<=[2,2,2]T(1,0,2)", ("data", "tensor")),
    ("[4,2]<=[2,2,2]T(0,2,1)", ("fsdp",)),
    ("mesh['a'=8] {'a'}", ("data", "fsdp", "tensor")),
    ("mesh['a'=8] {'a':(2)2}", ("fsdp",)),
    ("mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}", ("data", "fsdp")),
  ],
)
def test_groups_are_axes_however_they_are_written(groups, axes):
  text = PROGRAM.replace("GROUPS", groups)
  found = collectives.read(text, mesh(data=2, fsdp=2, tensor=2))
  assert found[0].axes == axes


def test_a_loop_without_a_known_end_is_an_error():
  text = PROGRAM.replace("constant(28)", "parameter(1)")
  with pytest.raises(ValueError, match="number of trips"):
    collectives.read(text, mesh(data=2, fsdp=4))


def test_a_loop_may_say_its_trips():
  known = 'body=%body, backend_config={"known_trip_count":{"n":"5"}}'
  text = PROGRAM.replace("constant(28)", "parameter(1)").replace(
    "body=%body", known
  )
  found = collectives.read(
    text.replace("GROUPS", "[2,4]<=[8]"), mesh(data=2, fsdp=4)
  )
  assert found[0].trips == (5,)


EXCHANGED = """
%body (p: bf16[4]) -> bf16[4] {
  %q = bf16[4]{0} all-to-all(%p), channel_id=1, replica_groups=[1,4]<=[4], metadata={op_name="f/shard_map/all_to_all"}
  %k = bf16[4]{0} all-to-all(%q), channel_id=1, replica_groups=[1,4]<=[4], metadata={op_name="f/shard_map/all_to_all"}
}

%condition (p: bf16[4]) -> pred[] {
  %n = s32[] constant(28)
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (p: bf16[4]) -> bf16[4] {
  %forward = bf16[4] while(%p), condition=%condition, body=%body
  %back = bf16[4] while(%p), condition=%condition, body=%body.2
}
"""


def test_what_shard_map_sends_is_counted_each_time():
  """Though it all has one channel, in both loops."""
  body = EXCHANGED[: EXCHANGED.index("%condition")]
  text = body.replace("%body", "%body.2") + EXCHANGED
  found = collectives.read(text, mesh(context=4))
  assert len(found) == 4 and sum(one.count for one in found) == 4 * 28


ACROSS = """
ENTRY %main (p: f32[8]) -> f32[8] {
  %send = (f32[5,8,128]{2,1,0:T(8,128)}, u32[], token[]) send(%p, %t), channel_id=2, is_host_transfer=true, frontend_attributes={_xla_host_transfer_rendezvous="all-reduce.94_0",_xla_megascale_transfer_type="ALL_REDUCE"}
  %recv = (f32[5,8,128]{2,1,0:T(8,128)}, u32[], token[]) recv(%t), channel_id=1, is_host_transfer=true, frontend_attributes={_xla_megascale_transfer_type="ALL_REDUCE"}
}
"""


@pytest.mark.parametrize("data, axes", [(2, ("data",)), (4, ("data?",))])
def test_what_goes_between_slices_is_seen(data, axes):
  """There a TPU's program sends to its host, and has no collective."""
  where = mesh(data=data, fsdp=4)
  numbers = np.arange(4 * data).reshape(data, 4) // (2 * data)
  where.devices = np.vectorize(
    lambda i: types.SimpleNamespace(slice_index=i), otypes=[object]
  )(numbers)
  (one,) = collectives.read(ACROSS, where)
  assert (one.kind, one.dtype, one.axes) == ("all-reduce", "f32", axes)
  assert (one.bytes, one.group, one.across) == (4 * 5 * 8 * 128, 2, True)
  slices = topology.parse("v5e:2x2", 2)
  if data == 2:
    wires = roofline.layout(where.shape, slices)
    assert roofline.wire_seconds(one, wires, slices.chip) == pytest.approx(
      one.bytes / (slices.chip.network * roofline.LINK_EFFICIENCY)
      + 2 * roofline.NETWORK_HOP
    )
