"""Plans: what is counted is exact, what is modelled behaves, and a compiler
agrees where libtpu is installed."""

import collections
import dataclasses
import json
import math

import jax
import pytest

from flowjax import __main__ as door
from flowjax import errors
from flowjax.parallel import collectives as moves
from flowjax.parallel import mesh as meshes
from flowjax.parallel import topology
from flowjax.train import experiment, memory, parts, plan, search

pytestmark = pytest.mark.usefixtures("traced_once")

POD = topology.parse("v5p:2x2x2")
KEYS = {
  "fits", "bytes_per_device", "hbm_bytes", "collectives", "flops_per_step",
  "step_seconds", "mfu", "bound_by", "source",
}  # fmt: skip


def tiny(batch=16, remat="none", accumulate=1, **mesh):
  config = experiment.defaults("dit")
  size = dict(image_size=(8, 8), channels=4)
  config.model.update(
    width=64, depth=3, heads=4, num_classes=10, dtype="bfloat16", remat=remat
  )
  config.model.update(size)
  config.data.update(source="folder:/none", batch_size=batch, **size)
  config.optim.accumulate = accumulate
  config.mesh.update(**mesh)
  return experiment.build(config)


def bytes_of(plan_, *kinds):
  return sum(plan_.memory[kind] for kind in kinds)


@pytest.mark.slow(1)
@pytest.mark.parametrize(
  "mesh", [dict(data=8), dict(data=1, fsdp=8), dict(fsdp=2, tensor=2)]
)
def test_the_state_is_the_sum_over_its_leaves(mesh):
  config = tiny(**mesh)
  abstract = parts.build(config, jax.devices()).abstract

  def here(leaf):
    shape = leaf.sharding.shard_shape(leaf.shape)
    return math.prod(shape) * leaf.dtype.itemsize

  found = plan.modelled(config, POD).memory
  for kind, tree in (
    ("parameters", abstract.params),
    ("average", abstract.ema),
    ("optimizer", abstract.opt_state),
  ):
    assert found[kind] == sum(map(here, jax.tree.leaves(tree))), kind


@pytest.mark.slow(2)
def test_memory_follows_the_config():
  def kept(**changes):
    return plan.modelled(tiny(**changes), POD).memory["kept activations"]

  by_remat = [kept(remat=remat) for remat in search.REMATS]
  assert by_remat == sorted(by_remat, reverse=True) and by_remat[-1] > 0
  none = by_remat[0]
  assert kept(batch=32) == 2 * none == 2 * kept(batch=32, accumulate=2)
  # The residual stream is whole on each device of a tensor axis.
  assert none < kept(data=4, tensor=2) < 2 * none
  assert kept(data=4, context=2) < 1.2 * none


@pytest.mark.slow(1)
def test_flops_are_the_formulas_and_what_is_remade():
  none, full = (plan.modelled(tiny(remat=r), POD) for r in ("none", "full"))
  forward = none.flops_per_step / 3 / 16
  assert none.flops_per_step == full.flops_per_step
  assert forward == memory.outline(tiny()).built.network.flops
  assert 1.0 < none.flops_done / none.flops_per_step < 1.1
  assert 1.2 < full.flops_done / full.flops_per_step < 1.5


@pytest.mark.slow(1)
def test_twice_the_devices_with_twice_the_batch_take_as_long():
  """Where only sums of gradients go between them, and these are hidden."""
  small = plan.modelled(tiny(batch=4096), POD)
  large = plan.modelled(tiny(batch=8192), topology.parse("v5p:2x2x4"))
  assert large.step.compute == pytest.approx(small.step.compute)
  assert large.step.memory == pytest.approx(small.step.memory)
  assert large.mfu == pytest.approx(small.mfu, rel=0.1)


def sent(config):
  """Returns the bytes of a step by kind, dtype, axes, and in the layers."""
  found, step = {}, plan.modelled(config, POD)
  for row in moves.table(step.moved, step.layer_depth):
    key = row["kind"], row["dtype"], row["axis"], row["in_layer_loop"]
    found[key] = row["bytes_per_step"]
  return found


@pytest.mark.slow(1)
def test_sums_of_gradients_have_the_dtype_and_place_of_the_config():
  whole = sent(tiny(data=2, fsdp=4))
  scattered = whole["reduce-scatter", "f32", "fsdp", True]
  gathered = whole["all-gather", "bf16", "fsdp", True]
  assert scattered == gathered  # Twice two bytes, and once four.
  assert whole["all-reduce", "f32", "data", True] == scattered // 4

  half = tiny(data=2, fsdp=4)
  optim = dataclasses.replace(half.optim, reduce_dtype="bfloat16")
  half = sent(dataclasses.replace(half, optim=optim))
  assert half["reduce-scatter", "bf16", "fsdp", True] == scattered // 2

  parts = sent(tiny(data=2, fsdp=4, accumulate=2))
  assert parts["reduce-scatter", "f32", "fsdp", True] == 2 * scattered
  assert not any(key[2:] == ("data", True) for key in parts)
  once = whole["all-reduce", "f32", "data", True]
  assert once < parts["all-reduce", "f32", "data", False] < 3 * once


@pytest.mark.slow(1)
def test_where_tokens_are_split_the_body_says_what_they_send():
  """4 heads of 16 tokens: each device has 2 or 1 of them."""

  def count(attention="auto", **mesh):
    config = tiny(data=2, **mesh)
    model = dataclasses.replace(config.model, attention=attention)
    moved = plan.modelled(dataclasses.replace(config, model=model), POD).moved
    found = collections.Counter()
    for one in moved:
      if "gradients" not in one.source:
        found[one.kind, one.axes] += one.count
    return dict(found)

  one, both = dict(context=4), dict(context=2, ulysses=2)
  assert count(**one) == {("all-to-all", ("context",)): 3 * 8}
  # There, there and back; and sums of gradients, a step behind.
  ring = {("collective-permute", ("context",)): 3 * (3 + 3 + 4)}
  assert count("ring", **one) == ring
  assert count(**both) == {
    ("all-to-all", ("ulysses",)): 3 * 8,
    ("collective-permute", ("context",)): 3 * (1 + 1 + 2),
  }
  tokens = ("context", "ulysses")
  assert count("xla", **both) == {
    ("all-gather", tokens): 3 * 2, ("reduce-scatter", tokens): 3,
  }  # fmt: skip


@pytest.mark.parametrize(
  "changes, said",
  [
    (dict(batch=12), "Sizes that are: 8, 16"),
    (dict(batch=24, accumulate=2), "Sizes that are: 16, 32"),
    (dict(data=1, tensor=8), "does not divide the model's heads = 4"),
    (dict(data=1, fsdp=16), "Nearest that do"),
  ],
)
def test_what_does_not_divide_says_what_would(changes, said):
  with pytest.raises(errors.UserError) as caught:
    plan.modelled(tiny(**changes), POD)
  assert said in str(caught.value)


@pytest.mark.slow(1)
def test_an_axis_across_nodes_of_gpus_is_to_be_asked_for():
  """As a run on them is, whose devices say in which node they are."""
  nodes, across = topology.parse("h100:2x8"), tiny(data=1, fsdp=16, batch=16)
  with pytest.raises(errors.UserError, match="2 slices of 8 devices"):
    plan.modelled(across, nodes)
  mesh = dataclasses.replace(across.mesh, slices=1)
  found = plan.modelled(dataclasses.replace(across, mesh=mesh), nodes)
  assert found.shape["fsdp"] == 16


@pytest.mark.slow(4)
def test_search_finds_what_fits_the_fastest_first(monkeypatch):
  monkeypatch.setattr(search, "REMATS", ("none", "full"))
  lines = []
  found = search.run(tiny(batch=4096), POD, compiles=0, told=lines.append)
  rates = [one.batch_size / one.step.seconds for one in found]
  assert rates == sorted(rates, reverse=True) and found[0].fits
  assert len({str(one.shape) for one in found}) > 1
  huge = tiny(batch=16)
  model = dataclasses.replace(huge.model, width=64 * 1024)
  with pytest.raises(errors.UserError, match="Nothing fits"):
    search.run(dataclasses.replace(huge, model=model), POD, compiles=0)


def test_search_knows_every_kind_of_remat():
  from flowjax.models import blocks

  assert set(search.REMATS) == set(blocks.REMAT) - set(blocks.OFFLOADING)
  shapes = search.shapes(tiny(), POD)
  assert {math.prod(shape.values()) for shape in shapes} == {8}
  assert all(set(shape) == set(meshes.AXES) for shape in shapes)


@pytest.fixture(name="compiled", scope="module")
def _compiled():
  if not topology.is_installed(POD):
    pytest.skip("libtpu is not installed (flowjax[tpu-aot])")
  topology.prepare()
  # As wide as a TPU's registers, which would pad what is narrower.
  config = tiny(batch=512, data=2, fsdp=4)
  model = dataclasses.replace(config.model, width=128, heads=1)
  config = dataclasses.replace(config, model=model)
  return config, plan.compiled(config, POD)[0]


@pytest.mark.slow
def test_a_compiler_finds_the_memory_that_is_modelled(compiled):
  config, found = compiled
  guess = plan.modelled(config, POD)
  inputs = bytes_of(found, *plan.STATE, "batch")
  assert found.source == "compiled" and found.fits
  # TPUs pad small arrays; of large ones nothing is left of that.
  assert bytes_of(guess, *plan.STATE) < inputs
  assert guess.bytes_per_device == pytest.approx(
    found.bytes_per_device, rel=0.4
  )
  assert KEYS <= set(found.to_json())
  assert found.to_json()["source"]["bytes_per_device"] == "compiled"
  kinds = {(one.kind, one.axes) for one in found.moved if one.trips}
  assert ("all-gather", ("fsdp",)) in kinds


@pytest.mark.slow
def test_what_a_compiler_has_no_room_for_is_a_result(compiled):
  """Not a crash: it says how much it would need."""
  config, _ = compiled
  data = dataclasses.replace(config.data, batch_size=8 * 2**20)
  found, program = plan.compiled(dataclasses.replace(config, data=data), POD)
  assert program is None and not found.fits
  assert found.bytes_per_device > found.hbm_bytes
  assert "found no room" in found.notes[0]


@pytest.mark.slow(1)
@pytest.mark.parametrize("installed", [True, False])
def test_a_kernel_that_is_asked_for_is_planned_where_it_can_run(
  monkeypatch, installed
):
  """What this machine could run does not matter to the cluster."""
  if installed:
    pytest.importorskip("libtpu")
  monkeypatch.setattr(topology, "is_installed", lambda _: installed)

  def asked(body, where):
    config = tiny()
    model = dataclasses.replace(config.model, attention=body)
    config = dataclasses.replace(config, model=model)
    return plan.modelled(config, topology.parse(where))

  assert asked("splash", POD.name).memory["scores of attention"] == 0
  assert asked("cudnn", "h100:1x8").memory["scores of attention"] == 0
  for body, where in (("cudnn", POD.name), ("splash", "h100:1x8")):
    with pytest.raises(errors.UserError, match=f"{body}.*{where}.*'auto'"):
      asked(body, where)


@pytest.mark.slow(1)
def test_the_command_takes_a_mesh_in_a_word(capsys):
  words = ["plan", "--config=configs/digits_dit.py", "--topology=v5e:2x4"]
  words.append("--model_only")
  assert door.main([*words, "--mesh=fsdp=4,tensor=2"]) == 0
  assert "data=1 x fsdp=4 x tensor=2" in capsys.readouterr().out
  for mesh, said in (
    ("fsdp", "'fsdp' must be axes with their sizes"),
    ("foo=2", "Unknown key config.mesh.foo"),
  ):
    assert door.main([*words, f"--mesh={mesh}"]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.slow(1)
def test_the_command_writes_what_it_prints(tmp_path, capsys):
  path = tmp_path / "plan.json"
  code = door.main(
    [
      "plan",
      "--config=configs/imagenet_dit.py:s_2",
      "--topology=h100:2x8",
      "--config.mesh.fsdp=8",
      "--batch=512",
      "--model_only",
      f"--json={path}",
    ]
  )
  printed, written = capsys.readouterr().out, json.loads(path.read_text())
  assert code == 0
  assert KEYS <= set(written) and written["batch_size"] == 512
  assert written["mesh"] == dict(data=2, fsdp=8, tensor=1, context=1, ulysses=1)
  assert set(written["source"].values()) == {"modelled", "formula"}
  assert "images per second" in printed
  assert f"{100 * written['mfu']:.1f}%" in printed
  for line in printed.splitlines():
    if line.startswith(("memory", "step", "MFU", "  compute")):
      assert line.endswith("modelled"), line
