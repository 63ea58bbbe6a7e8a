"""The same run on one device and on eight: most meshes of DiT, some of others.

Tiny networks in float32: losses over twenty steps agree to 1e-5, and the
gradients of the first to 1e-5 of the largest of their parameter.
"""

import collections
import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import open_gates
import pytest

from flowjax.data import config as data_config
from flowjax.models import dit, flux, mmdit
from flowjax.parallel import mesh as meshes
from flowjax.parallel import placing
from flowjax.train import experiment, loop, manifest, optim, parts

COMMON = dict(image_size=(8, 8), channels=1, heads=8, num_classes=10)
TEXT = dict(text_width=16, pooled_width=16, label_tokens=8)
# One line for each body of attention, and each kind of model.
MODELS = {
  "dit": dit.DiTConfig(width=32, depth=2, attention="xla", **COMMON),
  "mmdit": mmdit.MMDiTConfig(
    depth=2, head_size=4, position_table=8, attention="xla", **COMMON, **TEXT
  ),
  "flux": flux.FluxConfig(
    width=48,
    double_depth=1,
    single_depth=1,
    rope_axes=(2, 2, 2),
    attention="xla",
    **COMMON,
    **TEXT,
  ),
}
COPIES, PARTS = dict(data=8), dict(data=1, fsdp=8)
MIXED = dict(data=1, fsdp=2, tensor=2, context=2)
# Every axis, alone and beside others, for one model. What trains is one for
# all: of the last two, copies alone are FLUX's turn and parts alone MM-DiT's.
# What some other meshes make of their values and gradients is seen in
# tests/models/test_*_on_a_mesh.py.
CASES = [
  ("dit", COPIES),
  ("dit", PARTS),
  ("dit", dict(data=1, tensor=8)),
  ("dit", dict(data=1, context=8)),
  ("dit", dict(data=2, fsdp=4)),
  ("dit", dict(data=1, fsdp=4, tensor=2)),
  ("dit", dict(data=1, fsdp=4, context=2)),
  ("dit", MIXED),
  ("mmdit", PARTS),
  ("mmdit", MIXED),
  ("flux", COPIES),
  ("flux", MIXED),
]
STEPS = 20


def _experiment(name, mesh, count=8, **options):
  return experiment.Experiment(
    model=MODELS[name],
    data=data_config.DataConfig(batch_size=count),
    mesh=meshes.MeshConfig(**mesh),
    # The first moment after the first step is then the gradient, halved.
    optim=optim.OptimConfig(learning_rate=1e-3, beta1=0.5, **options),
  )


def _batch(step, count):
  rng = np.random.default_rng(step)
  return {
    "image": rng.standard_normal((count, 8, 8, 1), np.float32),
    "label": rng.integers(10, size=count, dtype=np.int32),
  }


@functools.cache
def _first(name):
  run = parts.build(_experiment(name, {}), jax.devices()[:1])
  return open_gates.first_state(run)


def _run(name, mesh, devices, **options):
  """Returns the losses, the first gradients by name, and the last state."""
  run = parts.build(_experiment(name, mesh, **options), devices)
  state = jax.device_put(_first(name), parts.shardings_of(run.abstract))
  losses, gradients = [], {}
  with meshes.use(run.mesh):
    step, put = loop.jit_step(run), placing.put_whole(run.mesh)
    for i in range(STEPS):
      batch = put(_batch(i, run.experiment.data.batch_size))
      state, values = step(state, batch)
      losses.append(float(values["loss"]))
      if not gradients:
        moments = manifest.named_leaves(state.opt_state[1].mu)
        gradients = jax.device_get(moments)
  return losses, gradients, manifest.named_leaves(state)


@functools.cache
def _alone(name, **options):
  return _run(name, {}, jax.devices()[:1], **options)


def _same(found, wanted):
  np.testing.assert_allclose(found[0], wanted[0], rtol=1e-5)
  assert len(set(found[0])) == STEPS
  assert found[1].keys() == wanted[1].keys()
  for name, gradient in found[1].items():
    atol = 1e-5 * np.abs(wanted[1][name]).max()
    np.testing.assert_allclose(
      gradient, wanted[1][name], rtol=0, atol=atol, err_msg=name
    )


@pytest.mark.slow
@pytest.mark.parametrize(("name", "mesh"), CASES, ids=str)
def test_eight_devices_train_as_one_does(name, mesh):
  found = _run(name, mesh, jax.devices())
  _same(found, _alone(name))
  # It was really shared out, all that the optimizer and the average hold too.
  ways = mesh.get("fsdp", 1) * mesh.get("tensor", 1)
  copies = [
    leaf for name, leaf in found[2].items() if name.endswith("mlp/in/kernel")
  ]
  assert len(copies) >= 4
  for leaf in copies:
    assert leaf.addressable_shards[0].data.size * ways == leaf.size


# Deep enough for one layer to be little of the whole.
DEEP = {
  "dit": dict(width=128, depth=8),
  "mmdit": dict(head_size=16, depth=9),
  "flux": dict(width=128, rope_axes=(4, 6, 6), double_depth=8, single_depth=8),
}


@pytest.mark.slow(1)
@pytest.mark.parametrize("name", MODELS)
def test_a_state_is_born_divided(name):
  """Each device holds its share, and draws one layer of a kernel at most."""
  config = _experiment(name, dict(data=1, fsdp=8))
  model = dataclasses.replace(config.model, **DEEP[name])
  run = parts.build(dataclasses.replace(config, model=model))
  share, layer = 0, 0
  for path, leaf in manifest.named_leaves(run.abstract).items():
    size = leaf.dtype.itemsize * leaf.size
    share += leaf.dtype.itemsize * math.prod(
      leaf.sharding.shard_shape(leaf.shape)
    )
    if leaf.ndim:
      layers = leaf.shape[0] if "blocks/" in path else 1
      layer = max(layer, size // layers)
  memory = run.lower_initial().compile().memory_analysis()
  assert memory.output_size_in_bytes < 1.01 * share
  assert memory.temp_size_in_bytes <= layer
  whole = sum(4 * leaf.size for leaf in jax.tree.leaves(run.abstract))
  assert share + layer < whole / 6


def _draws(mesh, devices):
  """Returns what training draws for each example, seen by a network of zeros.

  Times, the loss, which is that of the noise, and the labels that are left.
  """
  config = _experiment("dit", mesh, count=32)
  run = parts.build(config, devices)
  seen = {}

  def apply(params, x_BHWC, t_B, cond, rng):
    seen["label"] = run.network.dropped(cond, rng)["label"]
    return jnp.zeros_like(x_BHWC)

  loss = config.flow.loss(dataclasses.replace(run.network, apply=apply))

  def draw(batch):
    metrics = loss({}, batch, jax.random.key(0))[1]
    return metrics["t"], seen.pop("label"), metrics["loss_by_example"]

  with meshes.use(run.mesh):
    batch = placing.put_whole(run.mesh)(_batch(0, 32))
    return jax.device_get(jax.jit(draw)(batch))


@pytest.fixture(name="drawn_alone", scope="module")
def _drawn_alone():
  return _draws({}, jax.devices()[:1])


@pytest.mark.slow(1)
@pytest.mark.parametrize(
  "mesh",
  [
    dict(data=2, tensor=2),
    dict(data=1, fsdp=2, context=2),
    dict(data=8),
  ],
  ids=str,
)
def test_what_is_drawn_for_an_example_does_not_depend_on_the_mesh(
  mesh, drawn_alone
):
  time, label, loss = _draws(mesh, jax.devices()[: math.prod(mesh.values())])
  np.testing.assert_array_equal(time, drawn_alone[0])
  np.testing.assert_array_equal(label, drawn_alone[1])
  np.testing.assert_allclose(loss, drawn_alone[2], rtol=1e-6)
  assert (label == 10).any() and len(set(time)) == 32


@pytest.mark.slow
def test_an_accumulated_batch_trains_as_on_one_device():
  """Its sums over data are put off; those over fsdp are not."""
  mesh, options = dict(data=2, fsdp=2, tensor=2), dict(count=32, accumulate=4)
  found = _run("dit", mesh, jax.devices(), **options)
  _same(found, _alone("dit", **options))


@pytest.mark.slow
def test_moments_in_the_memory_of_the_host_change_nothing():
  mesh = dict(data=2, fsdp=4)
  found = _run("dit", mesh, jax.devices(), offload=True)
  _same(found, _alone("dit"))
  kinds = collections.defaultdict(set)
  for name, leaf in found[2].items():
    if leaf.ndim:
      kinds[name.partition("/")[0]].add(leaf.sharding.memory_kind)
  assert kinds.pop("opt_state") == {"pinned_host"}
  assert set(map(frozenset, kinds.values())) == {frozenset({"device"})}
