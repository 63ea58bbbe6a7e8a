"""A run that is stopped or killed ends where the straight run ends."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest

from flowjax import errors, schema
from flowjax.data import config as data_config
from flowjax.data import sources
from flowjax.models import dit
from flowjax.parallel import room
from flowjax.train import checkpoint, experiment, loop, optim, parts

pytestmark = [pytest.mark.usefixtures("traced_once"), pytest.mark.slow(1)]

TINY = experiment.Experiment(
  steps=7,
  model=dit.DiTConfig(
    image_size=(8, 8),
    channels=1,
    patch_size=4,
    width=16,
    depth=1,
    heads=2,
    num_classes=10,
  ),
  data=data_config.DataConfig(batch_size=16),
  optim=optim.OptimConfig(learning_rate=1e-2, warmup_steps=2, max_skipped=2),
  checkpoint=checkpoint.CheckpointConfig(every=2),
  log=experiment.LogConfig(metrics_every=1, tensorboard=False),
)

# With which TINY may go on after its last step, if that is allowed.
LONGER = dataclasses.replace(TINY, steps=8)
OTHER = dataclasses.replace(
  TINY, steps=9, data=dataclasses.replace(TINY.data, batch_size=8)
)

# A run of TINY that kills itself after step N.
SCRIPT = """
import json, os, pathlib, signal, sys
from flowjax.train import experiment, loop
config, directory, at = sys.argv[1:]
def act(state):
  if int(state.step) == int(at):
    os.kill(os.getpid(), signal.SIGKILL)
  return {}, {}
loop.train(
  experiment.build(json.loads(config)), pathlib.Path(directory),
  evaluators=lambda run: [loop.Evaluator(1, act)])
"""


def _train(config, directory, look=None, **options):
  found = [] if look is None else [loop.Evaluator(1, look)]
  return loop.train(
    config, directory, evaluators=lambda run: found, **options
  ).state


def _train_and_kill(config, directory, at):
  text = json.dumps(schema.to_dict(config))
  words = [sys.executable, "-c", SCRIPT, text, str(directory), str(at)]
  return subprocess.run(words, capture_output=True, text=True)


def _of_each_step(directory, name):
  lines = (directory / "metrics.jsonl").read_text().splitlines()
  rows = [json.loads(line) for line in lines]
  return {row["step"]: row[name] for row in rows if name in row}


def _losses(directory):
  return _of_each_step(directory, "loss")


def _assert_same(a, b):
  for (path, x), y in zip(
    jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True
  ):
    name = jax.tree_util.keystr(path)
    np.testing.assert_array_equal(np.asarray(x), np.asarray(y), name)


@pytest.fixture(autouse=True, scope="module")
def _no_curves():
  """Leaves out the picture at the end of each run: a command's test has it."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(loop.curves, "draw", lambda *unused, **unused_too: None)
    yield


@pytest.fixture(name="straight", scope="module")
def _straight(tmp_path_factory):
  directory = tmp_path_factory.mktemp("straight")
  state = _train(TINY, directory)
  waits = _of_each_step(directory, "data_wait_seconds")
  return state, _losses(directory), waits, directory


@pytest.fixture(name="done")
def _done(straight, tmp_path):
  """The folder of the straight run, a copy for this test alone."""
  return shutil.copytree(straight[3], tmp_path / "done")


@pytest.mark.slow(3)
def test_how_long_steps_wait_for_data_is_written(straight):
  assert set(straight[2]) == set(range(2, 8))  # Not before there is a rate.
  # Two steps that are noted at once may have none between them.
  assert all(0.0 <= seconds < 60.0 for seconds in straight[2].values())
  assert straight[2][7] > 0.0


@pytest.mark.slow(3)
def test_the_loss_is_written_for_every_step(straight):
  assert sorted(straight[1]) == list(range(1, 8))


@pytest.mark.slow(5)
def test_kill_9_then_the_same_command_is_the_straight_run(straight, tmp_path):
  """The kill may come while the checkpoint of step 4 is written."""
  done = _train_and_kill(TINY, tmp_path, at=5)
  assert done.returncode == -signal.SIGKILL, done.stderr
  state = _train(TINY, tmp_path)
  _assert_same(state, straight[0])
  assert _losses(tmp_path) == straight[1]


def test_sigterm_saves_says_so_and_has_its_own_code(straight, tmp_path):
  def act(state):
    if int(state.step) == 3:
      os.kill(os.getpid(), signal.SIGTERM)
    return {}, {}

  before = signal.getsignal(signal.SIGTERM)
  with pytest.raises(errors.Preempted, match="saved at step 3") as caught:
    _train(TINY, tmp_path, act)
  assert caught.value.exit_code == 42
  assert signal.getsignal(signal.SIGTERM) is before
  _assert_same(_train(TINY, tmp_path), straight[0])
  assert _losses(tmp_path) == straight[1]


def test_sigterm_before_the_first_step_takes_none(tmp_path, monkeypatch):
  real = loop._restore_or_begin

  def begin(*given):
    os.kill(os.getpid(), signal.SIGTERM)
    return real(*given)

  monkeypatch.setattr(loop, "_restore_or_begin", begin)
  with pytest.raises(errors.Preempted, match="no step was taken after 0"):
    _train(TINY, tmp_path)
  assert _steps_on_disk(tmp_path) == []


def test_a_finished_run_is_left_as_it_is(straight, done):
  _assert_same(_train(TINY, done), straight[0])
  assert _losses(done) == straight[1]


def test_another_config_is_refused_with_the_difference(done):
  with pytest.raises(errors.UserError, match="batch_size: 16 -> 8"):
    _train(OTHER, done)
  state = _train(OTHER, done, allow_config_change=True)
  assert int(state.step) == 9
  kept = json.loads((done / "config.0.json").read_text())
  assert kept["data"]["batch_size"] == 16


def test_training_that_is_never_finite_stops_with_the_last_good_state(
  tmp_path,
):
  config = dataclasses.replace(
    TINY,
    steps=40,
    optim=dataclasses.replace(
      TINY.optim, learning_rate=1e30, warmup_steps=0, max_skipped=3
    ),
  )
  with pytest.raises(errors.NumericError, match="learning_rate") as caught:
    _train(config, tmp_path)
  assert caught.value.exit_code == 5
  run = parts.build(config)
  saved = checkpoint.Checkpoints(
    tmp_path / "checkpoints", config.checkpoint, read_only=True
  )
  restored = saved.restore(run.abstract)
  saved.close()
  assert int(restored.state.skipped) >= 3
  _assert_same(restored.state.params, run.initial_state().params)


def _steps_on_disk(directory):
  saved = checkpoint.Checkpoints(directory / "checkpoints", read_only=True)
  saved.close()
  return saved.steps()


def _poison(monkeypatch, bad):
  """Makes the batches of some steps not finite."""
  real = loop.compiled

  def compiled(*arguments):
    step = real(*arguments)

    def poisoned(state, batch):
      if int(state.step) + 1 in bad:
        batch = {**batch, "image": batch["image"] * np.nan}
      return step(state, batch)

    return poisoned

  monkeypatch.setattr(loop, "compiled", compiled)


def test_a_stop_is_for_updates_that_were_the_last(tmp_path, monkeypatch):
  with monkeypatch.context() as patch:
    _poison(patch, {3, 4})  # What step 4 did is known when 5 was taken.
    state = _train(TINY, tmp_path / "through")
  assert (int(state.step), int(state.skipped)) == (7, 2)

  _poison(monkeypatch, {3, 4, 5, 6, 7})
  with pytest.raises(errors.NumericError, match="The last 3 .* at step 5"):
    _train(TINY, tmp_path / "stopped")
  assert _steps_on_disk(tmp_path / "stopped")[-1] == 5


def test_a_stop_at_the_last_step_is_a_stop(tmp_path, monkeypatch):
  _poison(monkeypatch, {6, 7})
  with pytest.raises(errors.NumericError, match="The last 2 .* at step 7"):
    _train(TINY, tmp_path)


def test_a_disk_that_takes_no_picture_does_not_end_training(
  straight, tmp_path, monkeypatch, caplog
):
  def look(*unused):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(loop.curves, "draw", look)
  state = _train(TINY, tmp_path, look)
  _assert_same(state, straight[0])
  assert _steps_on_disk(tmp_path)[-1] == 7
  for said in ("AN EVALUATION AT STEP 3 FAILED", "THE CURVES", "No space left"):
    assert said in caplog.text


def test_an_evaluator_that_breaks_costs_no_checkpoint(tmp_path):
  def look(state):
    if int(state.step) == 4:
      raise RuntimeError("a defect of the evaluator")
    return {}, {}

  with pytest.raises(RuntimeError, match="a defect"):
    _train(TINY, tmp_path, look)
  assert _steps_on_disk(tmp_path) == [2, 4]


class _Killed(BaseException):
  pass


def test_new_data_that_was_allowed_may_be_killed_before_its_first_save(
  done, monkeypatch
):
  """config.json names the new data then, and no checkpoint does."""

  def kill(*unused, **also_unused):
    raise _Killed

  with monkeypatch.context() as patch:
    patch.setattr(loop.metrics, "Writer", kill)
    with pytest.raises(_Killed):
      _train(OTHER, done, allow_config_change=True)
  assert json.loads((done / "config.json").read_text())["steps"] == 9
  assert int(_train(OTHER, done).step) == 9


def test_data_that_changed_unasked_is_refused(done, monkeypatch):
  opened = sources.open(TINY.data, "train")
  changed = dataclasses.replace(opened, hash="of other pixels")
  monkeypatch.setattr(sources, "open", lambda config, split: changed)
  with pytest.raises(errors.DataError, match="of other pixels"):
    _train(LONGER, done, allow_config_change=True)


class _Rotten:
  """The digits, read one by one, of which every fifth is corrupt."""

  def __init__(self, sound):
    self.sound = sound
    for name in ("name", "class_names", "num_classes", "shape", "fingerprint"):
      setattr(self, name, getattr(sound, name))

  def __len__(self):
    return len(self.sound)

  def __getitem__(self, i):
    if i % 5 == 0:
      raise sources.Corrupt(f"Record {i} is corrupt.")
    return self.sound[i]


def _corrupt_by_step(directory):
  rows = (directory / "metrics.jsonl").read_text().splitlines()
  found = [json.loads(row) for row in rows]
  return {
    row["step"]: row["corrupt_records"]
    for row in found
    if "corrupt_records" in row
  }


def test_corrupt_records_are_counted_as_in_the_straight_run(
  tmp_path, monkeypatch
):
  rotten = _Rotten(sources.open(TINY.data, "train"))
  monkeypatch.setattr(sources, "open", lambda config, split: rotten)

  def train(name, look=None):
    looks = [] if look is None else [loop.Evaluator(1, look)]
    return loop.train(TINY, tmp_path / name, evaluators=lambda run: looks)

  def stop(state):
    if int(state.step) in (3, 5):
      os.kill(os.getpid(), signal.SIGTERM)
    return {}, {}

  straight = train("straight").corrupt
  for _ in range(2):
    with pytest.raises(errors.Preempted):
      train("resumed", stop)
  assert train("resumed").corrupt == straight > 7
  by_step = _corrupt_by_step(tmp_path / "straight")
  assert _corrupt_by_step(tmp_path / "resumed") == by_step
  assert by_step[7] == straight > by_step[3] > 0


def test_a_change_that_cannot_be_restored_leaves_the_config(done):
  before = (done / "config.json").read_bytes()
  wider = dataclasses.replace(
    LONGER, model=dataclasses.replace(TINY.model, width=32)
  )
  with pytest.raises(errors.CheckpointError):
    _train(wider, done, allow_config_change=True)
  assert (done / "config.json").read_bytes() == before


def test_how_a_model_is_computed_may_change(done):
  other = dataclasses.replace(
    TINY, model=dataclasses.replace(TINY.model, remat="full")
  )
  assert int(_train(other, done).step) == 7


def test_no_sound_checkpoint_stops_and_never_starts_over(done):
  files = [
    path
    for path in (done / "checkpoints").rglob("*")
    if path.is_file() and "/d/" in str(path)
  ]
  assert files
  for path in files:
    path.write_bytes(b"")
  with pytest.raises(errors.CheckpointError):
    _train(TINY, done)


def test_a_data_set_of_other_sizes_is_refused_before_any_work(tmp_path):
  config = dataclasses.replace(
    TINY, model=dataclasses.replace(TINY.model, num_classes=9)
  )
  with pytest.raises(errors.DataError, match="num_classes=10"):
    _train(config, tmp_path / "run")
  assert not (tmp_path / "run").exists()


def test_the_seconds_of_training_are_those_that_were_saved(tmp_path):
  first = loop.train(TINY, tmp_path, evaluators=lambda run: [])
  extra = _saved_extra(tmp_path)
  assert first.seconds == extra["train_seconds"] > 0.0
  again = loop.train(TINY, tmp_path, evaluators=lambda run: [])
  assert again.seconds == first.seconds


def _saved_extra(directory):
  saved = checkpoint.Checkpoints(directory / "checkpoints", read_only=True)
  restored = saved.restore_subtree({"step": jax.ShapeDtypeStruct((), np.int32)})
  saved.close()
  return restored.extra


@pytest.mark.parametrize("gone", ["checkpoints", "checkpoints/*"])
def test_a_run_whose_checkpoints_are_gone_does_not_start_over(done, gone):
  measured = (done / "metrics.jsonl").read_bytes()
  for path in done.glob(gone):
    shutil.rmtree(path)
  for _ in range(2):
    with pytest.raises(errors.CheckpointError, match="last of step 7:"):
      _train(TINY, done)
  assert (done / "metrics.jsonl").read_bytes() == measured
  assert _steps_on_disk(done) == []


def test_out_of_memory_says_what_to_turn_down():
  with pytest.raises(errors.UserError, match="batch_size"):
    with loop.out_of_memory_advice():
      raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 12 GiB")
  with pytest.raises(jax.errors.JaxRuntimeError):
    with loop.out_of_memory_advice():
      raise jax.errors.JaxRuntimeError("INTERNAL: other")


def test_a_run_that_is_too_large_for_this_machine_is_not_begun(
  tmp_path, monkeypatch
):
  monkeypatch.setattr(room, "of_machine", lambda: 10**5)
  with pytest.raises(errors.UserError, match="(?s)0.0 GB.*batch_size"):
    _train(TINY, tmp_path / "run")
  assert not (tmp_path / "run" / "config.json").exists()
