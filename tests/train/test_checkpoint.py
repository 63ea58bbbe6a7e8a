"""Saving and restoring: what goes in comes out, bit by bit, on any mesh."""

import functools
import logging
import os
import pathlib
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from flowjax import errors, schema
from flowjax.train import checkpoint, lock, manifest, reading


class State(NamedTuple):
  step: Any
  params: Any
  ema: Any
  opt_state: Any
  key: Any


def mesh(*shape):
  devices = np.array(jax.devices()[: np.prod(shape)]).reshape(shape)
  return jax.sharding.Mesh(
    devices, ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2
  )


@functools.cache
def maker(on, width):
  """Returns a jitted init of a state as the trainer has it."""

  def init(seed):
    w = jax.random.normal(jax.random.key(seed), (width, 24))
    b = jnp.arange(24, dtype=jnp.bfloat16)
    params = {"blocks": {"kernel": w, "bias": b}, "out": {"kernel": w.T}}
    opt = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    ema = jax.tree.map(lambda x: x + 1, params)
    return State(seed, params, ema, opt.init(params), jax.random.key(seed))

  def sharding(leaf):
    spec = ("data", "fsdp") if len(leaf.shape) == 2 else ()
    return NamedSharding(on, PartitionSpec(*spec))

  shapes = jax.eval_shape(init, jnp.int32(0))
  return jax.jit(init, out_shardings=jax.tree.map(sharding, shapes))


def make(seed=0, on=None, width=16):
  return maker(on or mesh(4, 2), width)(jnp.int32(seed))


def abstract(state, on=None):
  def stand_in(leaf):
    sharding = leaf.sharding
    if on is not None:
      sharding = NamedSharding(on, sharding.spec)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

  return jax.tree.map(stand_in, state)


def bits(tree):
  return {
    path: np.asarray(
      jax.random.key_data(x) if "key" in str(x.dtype) else x
    ).tobytes()
    for path, x in manifest.named_leaves(tree).items()
  }


@pytest.fixture
def store(tmp_path):
  opened = checkpoint.Checkpoints(tmp_path / "checkpoints")
  yield opened
  opened.close()


def keep(tmp_path, **config):
  return checkpoint.Checkpoints(
    tmp_path / "checkpoints", checkpoint.CheckpointConfig(**config)
  )


@pytest.mark.slow
def test_what_goes_in_comes_out(store):
  state, extra = make(3), {"data": {"seed": 5, "sizes": [1, 2]}, "config": {}}
  assert store.restore(abstract(state)) is None
  assert store.save(3, state, extra) and store.wait()
  restored = store.restore(abstract(state))
  assert (restored.step, restored.extra) == (3, extra)
  assert restored.passed_over == {}
  assert isinstance(restored.state, State)
  assert jax.tree.structure(restored.state) == jax.tree.structure(state)
  assert bits(restored.state) == bits(state)
  for new, old in zip(
    jax.tree.leaves(restored.state), jax.tree.leaves(state), strict=True
  ):
    assert (new.dtype, new.sharding) == (old.dtype, old.sharding)


@pytest.mark.slow
def test_onto_other_meshes_and_back(store):
  state = make()
  store.save(1, state, {})
  for number, on in enumerate([mesh(1, 1), mesh(2, 4), mesh(1, 2), mesh(4, 2)]):
    restored = store.restore(abstract(state, on)).state
    assert bits(restored) == bits(state)
    assert restored.params["out"]["kernel"].sharding.mesh == on
    store.save(number + 2, restored, {})
  listings = [
    (store.directory / str(step) / "manifest" / "metadata").read_text()
    for step in store.steps()
  ]
  leaves = [
    text.partition('"leaves"')[2].partition("}}")[0] for text in listings
  ]
  assert len(leaves) == 3 and len(set(leaves)) == 1


def test_buffers_may_be_donated_at_once(store):
  state = make(width=1024)
  overwrite = jax.jit(
    lambda state: jax.tree.map(lambda x: x * 0, state), donate_argnums=0
  )
  plain = state._replace(key=jax.random.key_data(state.key))
  expected, template = bits(plain), abstract(plain)
  assert store.save(1, plain, {})
  newer = overwrite(plain)
  for leaf in jax.tree.leaves(plain):
    leaf.delete()
  jax.block_until_ready(newer)
  assert store.wait()
  assert bits(store.restore(template).state) == expected


def test_a_subtree_reads_nothing_else(store, monkeypatch):
  state = make()
  store.save(1, state, {"a": 1})
  asked = []
  original = store._reader._read

  def read(number, **arguments):
    if "state" in arguments:
      asked.extend(manifest.named_leaves(arguments["state"].item))
    return original(number, **arguments)

  monkeypatch.setattr(store._reader, "_read", read)
  restored = store.restore_subtree({"ema": abstract(state).ema})
  assert bits(restored.state) == bits({"ema": state.ema})
  assert restored.extra == {"a": 1}
  assert asked and all(path.startswith("ema/") for path in asked)


def test_a_template_without_sharding_lands_on_one_device(store):
  state = make()
  store.save(1, state, {})
  shapes = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), {"params": state.params}
  )
  params = store.restore_subtree(shapes).state
  assert bits(params) == bits({"params": state.params})
  assert len(jax.tree.leaves(params)[0].sharding.device_set) == 1


def changed(state, change):
  stand_in = abstract(state)
  params = {**stand_in.params, "out": dict(stand_in.params["out"])}
  change(params["out"])
  return stand_in._replace(params=params)


@pytest.mark.parametrize(
  ("change", "said"),
  [
    (
      lambda p: p.update(kernel=jax.ShapeDtypeStruct((24, 16), jnp.bfloat16)),
      "params/out/kernel: float32[24,16] was saved, bfloat16[24,16] is wanted",
    ),
    (
      lambda p: p.update(kernel=jax.ShapeDtypeStruct((24, 8), jnp.float32)),
      "params/out/kernel: float32[24,16] was saved, float32[24,8] is wanted",
    ),
    (
      lambda p: p.update(bias=jax.ShapeDtypeStruct((24,), jnp.float32)),
      "params/out/bias: nothing was saved, float32[24] is wanted",
    ),
    (
      lambda p: p.pop("kernel"),
      "params/out/kernel: float32[24,16] was saved, nothing is wanted",
    ),
  ],
)
def test_another_template_is_refused_before_reading(
  store, monkeypatch, change, said
):
  state = make()
  store.save(1, state, {})
  store.save(2, state, {})
  store.wait()
  monkeypatch.setattr(store._reader, "_load", None)
  with pytest.raises(errors.CheckpointError) as error:
    store.restore(changed(state, change))
  assert said in str(error.value) and "Checkpoint 2" in str(error.value)


def test_a_given_step(store):
  for step in (1, 2):
    store.save(step, make(step), {})
  assert store.restore(abstract(make()), step=1).step == 1
  with pytest.raises(
    errors.CheckpointError, match="no checkpoint of step 7.*1, 2"
  ):
    store.restore(abstract(make()), step=7)


def test_an_existing_step_is_left_alone(store):
  store.save(1, make(1), {"of": 1})
  assert store.save(1, make(2), {"of": 2}) and store.wait()
  restored = store.restore(abstract(make()))
  assert bits(restored.state) == bits(make(1)) and restored.extra == {"of": 1}


@pytest.mark.slow(1)
def test_keep_last_and_keep_every(tmp_path):
  store = keep(tmp_path, keep_last=2, keep_every=4)
  for step in range(1, 10):
    store.save(step, make(), {})
  store.close()
  assert store.steps() == [4, 8, 9]


def test_an_old_step_goes_only_when_the_new_one_is_there(tmp_path, monkeypatch):
  store = keep(tmp_path, keep_last=1)
  store.save(1, make(), {})
  store.wait()
  seen, commit = [], os.rename

  def rename(source, target, **how):
    seen.append(store.steps())
    commit(source, target, **how)

  monkeypatch.setattr(os, "rename", rename)
  store.save(2, make(), {})
  store.close()
  assert seen and all(steps == [1] for steps in seen)
  assert store.steps() == [2]


@pytest.mark.slow
def test_saves_do_not_pile_up(store, monkeypatch, caplog):
  commit, started = os.rename, time.monotonic()

  def slow(source, target, **how):
    if str(target).endswith("checkpoints/1"):
      time.sleep(max(0.0, started + 3.0 - time.monotonic()))
    commit(source, target, **how)

  monkeypatch.setattr(os, "rename", slow)
  assert store.save(1, make(), {}) and not store.steps()
  with caplog.at_level(logging.WARNING):
    assert store.save(2, make(), {})
  assert time.monotonic() - started > 3.0 and store.steps()[0] == 1
  assert "Training waited" in caplog.text and store.wait()
  assert store.steps() == [1, 2]


def test_numbers_of_a_config():
  with pytest.raises(
    errors.UserError, match="keep_last = 0 must be at least 1"
  ):
    schema.build(checkpoint.CheckpointConfig, {"keep_last": 0}, "config")


def test_temporaries_go_on_open_if_the_lock_is_ours(tmp_path):
  folder = tmp_path / "checkpoints"
  left = folder / f"12{checkpoint.TEMPORARY}" / "state"
  others = folder / f"notes{checkpoint.TEMPORARY}"
  for path in (left, others):
    path.mkdir(parents=True)
  checkpoint.Checkpoints(folder).close()
  assert left.exists()
  with lock.WorkdirLock(tmp_path):
    checkpoint.Checkpoints(folder, read_only=True).close()
    assert left.exists()
    checkpoint.Checkpoints(folder).close()
  assert not left.parent.exists() and others.exists()


def test_a_reader_changes_nothing(tmp_path):
  store = keep(tmp_path)
  store.save(1, make(), {})
  store.close()
  (tmp_path / "checkpoints" / f"2{checkpoint.TEMPORARY}").mkdir()
  before = listing(tmp_path)
  reader = checkpoint.Checkpoints(tmp_path / "checkpoints", read_only=True)
  assert reader.restore(abstract(make())).step == 1
  reader.close()
  assert listing(tmp_path) == before
  nowhere = checkpoint.Checkpoints(tmp_path / "none", read_only=True)
  assert nowhere.restore(abstract(make())) is None and nowhere.steps() == []
  assert not (tmp_path / "none").exists()


def listing(folder: pathlib.Path):
  return sorted(
    (str(path), path.stat().st_mtime_ns, path.is_file() and path.read_bytes())
    for path in folder.rglob("*")
  )


def test_nothing_is_saved_once_another_has_the_lock(tmp_path):
  store = keep(tmp_path)
  with lock.WorkdirLock(tmp_path) as held:
    assert store.save(1, make(), {})
    held.path.write_text('{"host": "elsewhere", "pid": 5}')
    with pytest.raises(errors.UserError, match="process 5 on host elsewhere"):
      store.save(2, make(), {})
    store.close()
  assert store.steps() == [1]


def test_the_marker_has_the_name_that_is_looked_for(store):
  store.save(1, make(), {})
  store.wait()
  assert (store.directory / "1" / reading.COMMITTED).is_file()


@pytest.mark.parametrize(("part", "cut"), [(checkpoint.PART, False), (1, True)])
def test_small_arrays_are_not_cut_among_their_copies(
  tmp_path, monkeypatch, part, cut
):
  """Each cut is a program of its own, compiled for one shape."""
  monkeypatch.setattr(checkpoint, "PART", part)
  cuts, slice_in_dim = [], jax.lax.slice_in_dim

  def counted(*args, **options):
    cuts.append(args)
    return slice_in_dim(*args, **options)

  state, store = make(), keep(tmp_path)
  monkeypatch.setattr(jax.lax, "slice_in_dim", counted)
  assert store.save(1, state, {}) and store.wait()
  assert bool(cuts) == cut
  assert bits(store.restore(abstract(state)).state) == bits(state)
  store.close()
