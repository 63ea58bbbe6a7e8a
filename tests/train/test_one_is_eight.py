"""The same run on one device and on eight, for every model and mesh.

Tiny networks in float32: losses over ten steps agree to 1e-5, and the gradients
of the first to 1e-5 of the largest of their parameter.
"""

import functools

import jax
import numpy as np
import pytest

from flowjax.data import config as data_config
from flowjax.models import dit, flux, mmdit
from flowjax.parallel import mesh as meshes
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
MESHES = [
  dict(data=8),
  dict(data=1, fsdp=8),
  dict(data=1, tensor=8),
  dict(data=1, context=8),
  dict(data=2, fsdp=4),
  dict(data=1, fsdp=4, tensor=2),
  dict(data=1, fsdp=4, context=2),
  dict(data=1, fsdp=2, tensor=2, context=2),
]
STEPS = 10


def _experiment(name, mesh, **options):
  return experiment.Experiment(
    model=MODELS[name],
    data=data_config.DataConfig(batch_size=32),
    mesh=meshes.MeshConfig(**mesh),
    # The first moment after the first step is then the gradient, halved.
    optim=optim.OptimConfig(learning_rate=1e-3, beta1=0.5, **options),
  )


def _batch(step):
  rng = np.random.default_rng(step)
  return {
    "image": rng.standard_normal((32, 8, 8, 1), np.float32),
    "label": rng.integers(10, size=32, dtype=np.int32),
  }


def _run(config, devices):
  """Returns the losses, the first gradients by name, and the last state."""
  run = parts.build(config, devices)
  state, losses, gradients = run.initial_state(), [], None
  with meshes.use(run.mesh):
    step, put = loop.jit_step(run), loop.put_batch(run.mesh)
    for i in range(STEPS):
      state, values = step(state, put(_batch(i)))
      losses.append(float(values["loss"]))
      if gradients is None:
        gradients = jax.device_get(manifest.named_leaves(state.opt_state[1].mu))
  return losses, gradients, state


@functools.lru_cache
def _alone(name, **options):
  return _run(_experiment(name, {}, **options), jax.devices()[:1])


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
@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_eight_devices_train_as_one_does(name, mesh):
  config = _experiment(name, mesh)
  found = _run(config, jax.devices())
  _same(found, _alone(name))
  # It was really shared out, all that the optimizer and the average hold too.
  ways = mesh.get("fsdp", 1) * mesh.get("tensor", 1)
  state = found[2]
  largest = max(jax.tree.leaves(state.params), key=lambda leaf: leaf.size)
  copies = [
    leaf
    for leaf in jax.tree.leaves((state.params, state.ema, state.opt_state))
    if leaf.shape == largest.shape
  ]
  assert len(copies) >= 4
  for leaf in copies:
    assert leaf.addressable_shards[0].data.size * ways == leaf.size


@pytest.mark.slow
@pytest.mark.parametrize(
  "mesh", [dict(data=8), dict(data=2, fsdp=2, tensor=2)], ids=str
)
def test_an_accumulated_batch_trains_as_on_one_device(mesh):
  found = _run(_experiment("dit", mesh, accumulate=4), jax.devices())
  _same(found, _alone("dit", accumulate=4))


@pytest.mark.slow
def test_moments_in_the_memory_of_the_host_change_nothing():
  options = dict(data=2, fsdp=4)
  losses, gradients, state = _run(
    _experiment("dit", options, offload=True), jax.devices()
  )
  _same((losses, gradients), _alone("dit"))
  moments = manifest.named_leaves(
    (state.opt_state[1].mu, state.opt_state[1].nu)
  )
  assert {leaf.sharding.memory_kind for leaf in moments.values()} == {
    "pinned_host"
  }
  assert state.params["final"]["out"]["kernel"].sharding.memory_kind == "device"
