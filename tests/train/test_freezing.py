"""What is frozen costs nothing but itself, and stays what it is to the bit."""

import dataclasses
import os
import re
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowjax import errors
from flowjax.data import config as data_config
from flowjax.models import dit, lora
from flowjax.parallel import mesh as meshes
from flowjax.parallel import placing, rules
from flowjax.train import (
  checkpoint,
  ema,
  experiment,
  freezing,
  loop,
  optim,
  parts,
)
from flowjax.train import state as states
from flowjax.train import step as steps

pytestmark = pytest.mark.usefixtures("traced_once")

EXPERIMENT = experiment.Experiment(
  steps=3,
  model=dit.DiTConfig(
    image_size=(8, 8),
    channels=1,
    patch_size=4,
    width=16,
    depth=2,
    heads=2,
    num_classes=10,
  ),
  data=data_config.DataConfig(batch_size=16),
  optim=optim.OptimConfig(learning_rate=1e-2, clip_norm=0.05, weight_decay=0.1),
  checkpoint=checkpoint.CheckpointConfig(every=2),
  log=experiment.LogConfig(metrics_every=1, tensorboard=False),
)
ADAPTED = dataclasses.replace(EXPERIMENT, lora=lora.LoraConfig(rank=4))
ONE = jax.devices()[:1]


def tuned(config, **changes):
  return dataclasses.replace(
    config, optim=dataclasses.replace(config.optim, **changes)
  )


def names(tree):
  return {
    rules.name_of(path): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


def batch(step, size=16):
  rng = np.random.default_rng(step)
  return {
    "image": rng.standard_normal((size, 8, 8, 1), np.float32),
    "label": rng.integers(10, size=size, dtype=np.int32),
  }


def opened(state):
  """Returns the state with gates open, as after some training."""

  def draw(path, leaf):
    rng = np.random.default_rng(len(rules.name_of(path)))
    drawn = 0.1 * rng.standard_normal(leaf.shape).astype(np.float32)
    return jax.device_put(jnp.asarray(drawn), leaf.sharding)

  base = {key: state.params[key] for key in state.params if key != "lora"}
  params = state.params | jax.tree_util.tree_map_with_path(draw, base)
  return state._replace(params=params)


def take(config, devices=ONE, count=3):
  """Returns the states before and after some steps, and their metrics."""
  run = parts.build(config, devices)
  state, found = opened(run.initial_state()), []
  with meshes.use(run.mesh):
    before = jax.tree.map(np.array, state.params)
    step, put = loop.jit_step(run), placing.put_whole(run.mesh)
    for i in range(count):
      state, values = step(state, put(batch(i)))
      found.append({key: float(value) for key, value in values.items()})
  return run, before, state, found


@pytest.fixture(name="alone", scope="module")
def _alone():
  return take(ADAPTED)


@pytest.mark.slow(2)
def test_adapters_alone_are_trained(alone):
  run, before, state, metrics = alone
  after, before = names(state.params), names(before)
  moved = {n for n in after if not np.array_equal(after[n], before[n])}
  assert moved == {name for name in after if name.startswith("lora/")}
  assert names(state.ema).keys() == moved
  moments = state.opt_state[1]
  assert names(moments.mu).keys() == names(moments.nu).keys() == moved
  assert all(name.startswith("lora/") == (name not in run.frozen)
             for name in after)  # fmt: skip
  assert metrics[0]["grad_norm"] > 0
  averaged = names(states.averaged(state))
  assert averaged.keys() == after.keys()
  for name in run.frozen:
    assert averaged[name] is after[name]


def test_the_state_is_that_of_the_base_and_four_times_the_adapters():
  plain, adapted = (
    parts.build(config, ONE).abstract for config in (EXPERIMENT, ADAPTED)
  )

  def size(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))

  factors = size(adapted.params["lora"])
  assert size(adapted.params) == size(plain.params) + factors
  counters = size(plain) - 4 * size(plain.params)
  assert size(adapted) == size(plain.params) + 4 * factors + counters


@pytest.mark.parametrize("accumulate", [1, 4])
def test_it_is_ordinary_training_of_the_parameters_that_are_left(accumulate):
  """The loss of the rest alone, the others being constants of it."""
  frozen = frozenset({"b/kernel"})
  params = {
    "a": {"kernel": jnp.arange(3.0)},
    "b": {"kernel": jnp.full(3, 2.0)},
  }

  def loss(params, batch, rng):
    product = batch["x"] @ (params["a"]["kernel"] * params["b"]["kernel"])
    return jnp.mean(jnp.square(product - 1.0)), {}

  rows = ((r"a/.*", 1.0), (r".*", 0.0))
  config = optim.OptimConfig(
    learning_rate=0.1,
    clip_norm=0.5,
    weight_decay=0.1,
    weight_decay_rules=rows,
    accumulate=accumulate,
  )
  x = {"x": np.random.default_rng(0).standard_normal((8, 3), np.float32)}

  def run(loss, params, frozen):
    trained, _ = freezing.split(params, frozen)
    optimizer = optim.build(config, 10, trained)
    step = jax.jit(
      steps.build(
        loss,
        optimizer,
        seed=0,
        ema_config=ema.EmaConfig(decay=0.5),
        accumulate=accumulate,
        frozen=frozen,
      )
    )
    state = states.begin(params, optimizer, frozen)
    for _ in range(3):
      state, metrics = step(state, x)
    return state, metrics

  found, metrics = run(loss, params, frozen)
  left = {"a": params["a"]}
  wanted, expected = run(
    lambda p, *rest: loss({**p, "b": params["b"]}, *rest), left, frozenset()
  )
  assert jax.tree.all(
    jax.tree.map(np.array_equal, found.params["a"], wanted.params["a"])
  )
  assert jax.tree.all(jax.tree.map(np.array_equal, found.ema, wanted.ema))
  # Clipping looks at what is trained alone.
  assert metrics["grad_norm"] == expected["grad_norm"]
  np.testing.assert_array_equal(found.params["b"]["kernel"], 2.0)


@pytest.mark.slow
def test_freezing_needs_no_adapters():
  frozen = tuned(EXPERIMENT, freeze=(r"blocks/.*", r"label_embed/embedding"))
  run, before, state, _ = take(frozen, count=1)
  after, before = names(state.params), names(before)
  assert run.frozen == {n for n in after if re.match("blocks|label_embed", n)}
  for name in after:
    same = np.array_equal(after[name], before[name])
    assert same == (name in run.frozen), name


def test_of_what_is_frozen_no_gradient_is_counted():
  run = parts.build(EXPERIMENT, ONE)
  forward = run.network.flops
  assert run.flops == 3 * forward
  sizes = {name: leaf.size for name, leaf in names(run.abstract.params).items()}
  kernels = sum(n for name, n in sizes.items() if name.endswith("kernel"))
  mlp = sum(n for name, n in sizes.items() if re.search("mlp/.*kernel", name))
  frozen = parts.build(tuned(EXPERIMENT, freeze=(r"blocks/mlp/.*",)), ONE)
  # Tables and stacked biases count a little.
  assert abs(frozen.flops / forward - (3 - mlp / kernels)) < 0.02

  adapted = parts.build(ADAPTED, ONE)
  factors = sum(
    x.size for x in jax.tree.leaves(adapted.abstract.params["lora"])
  )
  assert abs(adapted.flops / forward - (2 + 3 * factors / kernels)) < 0.02


@pytest.mark.slow(1)
def test_the_old_state_is_given_away(alone):
  run, *_ = alone
  old = run.initial_state()
  with meshes.use(run.mesh):
    loop.jit_step(run)(old, placing.put_whole(run.mesh)(batch(0)))
  for tree in (old.params["lora"], old.params["blocks"], old.ema):
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(tree))


@pytest.mark.slow
@pytest.mark.parametrize(
  "mesh",
  [dict(data=2, fsdp=2, tensor=2)],
  ids=str,
)
def test_one_device_is_eight(alone, mesh):
  _, _, wanted, expected = alone
  config = dataclasses.replace(ADAPTED, mesh=meshes.MeshConfig(**mesh))
  _, _, state, metrics = take(config, jax.devices())
  for ours, theirs in zip(metrics, expected, strict=True):
    np.testing.assert_allclose(ours["loss"], theirs["loss"], rtol=1e-5)
  for name, leaf in names(wanted.params["lora"]).items():
    found = names(state.params["lora"])[name]
    np.testing.assert_allclose(found, leaf, atol=2e-3, err_msg=name)
  # A factor is divided as the dims are that it has of its kernel.
  factors = state.params["lora"]["blocks"]["attention"]["qkv"]["kernel"]
  a, b = factors["a"], factors["b"]
  assert a.addressable_shards[0].data.size * mesh["fsdp"] == a.size
  assert b.addressable_shards[0].data.size * mesh.get("tensor", 1) == b.size
  moments = state.opt_state[1].mu["lora"]["blocks"]["attention"]["qkv"]
  assert moments["kernel"]["a"].sharding == a.sharding
  assert state.ema["lora"]["blocks"]["attention"]["qkv"]["kernel"][
    "b"
  ].sharding.is_equivalent_to(b.sharding, b.ndim)


@pytest.mark.slow
def test_a_stopped_run_is_the_straight_run(tmp_path):
  def stop(state):
    if int(state.step) == 2:
      os.kill(os.getpid(), signal.SIGTERM)
    return {}, {}

  def train(name, *looks):
    looks = [loop.Evaluator(1, look) for look in looks]
    directory = tmp_path / name
    return loop.train(ADAPTED, directory, evaluators=lambda run: looks).state

  straight = train("straight")
  with pytest.raises(errors.Preempted, match="saved at step 2"):
    train("stopped", stop)
  resumed = train("stopped")
  for name, leaf in names(straight).items():
    np.testing.assert_array_equal(names(resumed)[name], leaf, name)


def test_what_makes_no_sense_is_refused():
  for pattern, message in (
    ("blocks/nothing", "'blocks/nothing' matches no parameter. There are"),
    (".*", "nothing is left to train"),
  ):
    with pytest.raises(errors.UserError, match=message) as error:
      parts.build(tuned(EXPERIMENT, freeze=(pattern,)), ONE)
    assert "config.optim.freeze" in str(error.value)
  missing = lora.LoraConfig(rank=2, targets=("nothing",))
  with pytest.raises(errors.UserError, match="config.lora: .*'nothing'"):
    parts.build(dataclasses.replace(EXPERIMENT, lora=missing), ONE)
  with pytest.raises(ValueError, match="no regular expression"):
    optim.OptimConfig(freeze=("(",))


def test_trees_come_apart_and_together():
  tree = {"a": {"x": 1, "y": 2}, "b": {"z": 3}}
  trained, rest = freezing.split(tree, {"a/y", "b/z"})
  assert (trained, rest) == ({"a": {"x": 1}}, {"a": {"y": 2}, "b": {"z": 3}})
  assert freezing.overlaid(rest, trained) == tree
  assert freezing.split(tree, freezing.NONE) == (tree, {})
  assert freezing.overlaid(tree, {"a": {"x": 9}})["a"] == {"x": 9, "y": 2}
