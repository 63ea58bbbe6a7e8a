"""What can happen to a checkpoint, and what a restore makes of it.

Every fault is a real one where that is possible: processes are killed, bits are
flipped in the files, a small disk is filled.
"""

import asyncio
import contextlib
import errno
import functools
import gc
import json
import logging
import os
import pathlib
import random
import shutil
import socket
import subprocess
import sys
import threading

import jax
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from flowjax import errors
from flowjax.train import checkpoint, disk, lock, manifest, quiet, reading


@functools.cache
def mesh():
  devices = np.array(jax.devices()).reshape(4, 2)
  return jax.sharding.Mesh(
    devices, ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2
  )


def make(step):
  w = np.random.default_rng(step).normal(size=(2048, 24)).astype(np.float32)
  state = {
    "params": {"kernel": w, "bias": w[0].astype(ml_dtypes.bfloat16)},
    "ema": {"kernel": w.T},
    "step": np.int32(step),
  }

  def put(leaf):
    spec = ("data", "fsdp") if np.ndim(leaf) == 2 else ()
    return jax.device_put(leaf, NamedSharding(mesh(), PartitionSpec(*spec)))

  return jax.tree.map(put, state)


def abstract():
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
    make(0),
  )


def bits(tree):
  named = manifest.named_leaves(tree)
  return {path: np.asarray(leaf).tobytes() for path, leaf in named.items()}


@pytest.fixture(scope="module")
def three_steps(tmp_path_factory):
  """A folder with the steps 1, 2 and 3, all sound; not to be changed."""
  folder = tmp_path_factory.mktemp("sound") / "checkpoints"
  store = checkpoint.Checkpoints(folder)
  for step in (1, 2, 3):
    assert store.save(step, make(step), {"data": {"seed": step}})
  store.close()
  return folder


@pytest.fixture
def copy(three_steps, tmp_path):
  return shutil.copytree(three_steps, tmp_path / "checkpoints")


@contextlib.contextmanager
def damaged(three_steps, tmp_path, path, damage):
  """Yields a copy of three steps in which one file of step 3 is damaged."""
  folder = tmp_path / f"{random.getrandbits(64):x}"
  shutil.copytree(three_steps / "2", folder / "2")
  shutil.copytree(three_steps / "3", folder / "3")
  damage(folder / path.relative_to(three_steps))
  yield folder
  shutil.rmtree(folder)


def restore(folder, step=None):
  store = checkpoint.Checkpoints(folder, read_only=True)
  try:
    return store.restore(abstract(), step)
  finally:
    store.close()


def is_exact(restored):
  step = restored.step
  right = restored.extra == {"data": {"seed": step}}
  return right and bits(restored.state) == bits(make(step))


def files(folder):
  return sorted(path for path in folder.rglob("*") if path.is_file())


def flip(rng, path):
  raw = bytearray(path.read_bytes())
  raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
  path.write_bytes(raw)


LEAVES = ("params/kernel", "params/bias", "ema/kernel", "step")


@pytest.mark.slow(1)
def test_flipped_bits_in_arrays_are_detected_and_named(three_steps, tmp_path):
  rng, fingerprinted = random.Random(0), 0
  data = max(files(three_steps / "3" / "state"), key=lambda p: p.stat().st_size)
  for _ in range(30):
    change = functools.partial(flip, rng)
    with damaged(three_steps, tmp_path, data, change) as folder:
      restored = restore(folder)
    reason = restored.passed_over[3]
    assert restored.step == 2 and is_exact(restored)
    assert any(leaf in reason for leaf in LEAVES), reason
    fingerprinted += "bits of" in reason
  assert fingerprinted > 15  # Orbax saw nothing wrong with these.


@pytest.mark.slow(1)
def test_a_flipped_bit_anywhere_is_detected_or_harmless(three_steps, tmp_path):
  rng, seen = random.Random(1), {2: 0, 3: 0}
  for path in files(three_steps / "3"):
    for _ in range(2):
      change = functools.partial(flip, rng)
      with damaged(three_steps, tmp_path, path, change) as folder:
        restored = restore(folder)
      assert is_exact(restored), path
      seen[restored.step] += 1
  assert min(seen.values()) > 5


@pytest.mark.slow(1)
def test_a_lost_or_cut_file_is_detected_or_harmless(three_steps, tmp_path):
  def cut(path):
    os.truncate(path, path.stat().st_size // 2)

  seen = {2: 0, 3: 0}
  for path in files(three_steps / "3"):
    for change in (pathlib.Path.unlink, cut):
      with damaged(three_steps, tmp_path, path, change) as folder:
        restored = restore(folder)
      assert is_exact(restored), path
      seen[restored.step] += 1
  assert min(seen.values()) > 5


def test_what_was_never_committed_is_skipped(copy, caplog):
  (copy / "10").mkdir()
  shutil.copytree(copy / "2", copy / "11")
  (copy / "11" / reading.COMMITTED).unlink()
  shutil.copytree(copy / "2", copy / f"12{checkpoint.TEMPORARY}")
  shutil.copytree(copy / "2", copy / "13")  # Says it is step 2.
  for name in ("latest", "14.bak", "015"):
    (copy / name).mkdir()
  (copy / "16").write_text("")
  restored = restore(copy)
  assert restored.step == 3 and is_exact(restored)
  assert list(restored.passed_over) == [13, 11, 10]
  assert "belongs to step 2" in restored.passed_over[13]
  assert "never committed" in restored.passed_over[11]
  for step in (10, 11, 13):
    assert f"Checkpoint {step} is passed over" in caplog.text


def test_nothing_sound_is_an_error_and_nothing_at_all_is_none(copy, tmp_path):
  for step in (1, 2, 3):
    (copy / str(step) / "manifest" / "metadata").write_text("{}")
  before = files(copy)
  for ask in (
    restore,
    lambda folder: checkpoint.Checkpoints(folder).restore(abstract()),
  ):
    with pytest.raises(errors.CheckpointError) as error:
      ask(copy)
    assert error.value.exit_code == 4
    for step in (1, 2, 3):
      assert f"\n  {step}: the manifest is damaged" in str(error.value)
  assert files(copy) == before
  (tmp_path / "new" / f"1{checkpoint.TEMPORARY}").mkdir(parents=True)
  assert restore(tmp_path / "new") is None


def test_a_given_step_that_is_unsound_has_no_substitute(copy):
  (copy / "3" / reading.COMMITTED).unlink()
  assert restore(copy, step=2).step == 2
  with pytest.raises(errors.CheckpointError, match="3: it was never committed"):
    restore(copy, step=3)


def test_too_little_memory_is_no_damage(copy, monkeypatch):
  def read(self, number, **arguments):
    raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")

  monkeypatch.setattr(reading.Reader, "_read", read)
  with pytest.raises(jax.errors.JaxRuntimeError):
    restore(copy)


def test_an_unsound_step_is_saved_again_and_does_not_count(copy):
  flip_manifest = copy / "3" / "manifest" / "metadata"
  flip_manifest.write_text(
    flip_manifest.read_text().replace("float32", "int32")
  )
  shutil.copytree(copy / "2", copy / "5")
  config = checkpoint.CheckpointConfig(keep_last=2)
  store = checkpoint.Checkpoints(copy, config)
  restored = store.restore(abstract())
  assert restored.step == 2 and list(restored.passed_over) == [5, 3]
  assert store.save(3, make(3), {"data": {"seed": 3}}) and store.wait()
  assert store.steps() == [2, 3, 5]
  assert store.save(4, make(4), {"data": {"seed": 4}}) and store.wait()
  assert store.steps() == [3, 4, 5]
  store.save(5, make(5), {"data": {"seed": 5}})
  store.close()
  assert store.steps() == [4, 5]
  restored = restore(copy)
  assert restored.step == 5 and is_exact(restored)


@pytest.mark.parametrize(
  "text, last", [('{"last_saved": 0}', "0"), ("[]", "unknown"), ("", "unknown")]
)
def test_an_emptied_folder_is_not_a_new_one(tmp_path, text, last):
  assert restore(tmp_path / "checkpoints") is None
  (tmp_path / "checkpoints.json").write_text(text)
  with pytest.raises(errors.CheckpointError, match=f"last of step {last}:"):
    restore(tmp_path / "checkpoints")


def test_a_step_that_is_gone_is_named(copy, caplog):
  record = copy.with_name("checkpoints.json")
  record.write_text('{"last_saved": 3}')
  assert restore(copy).step == 3 and not caplog.text
  shutil.rmtree(copy / "3")
  assert restore(copy).step == 2
  assert "Checkpoint 3, which was saved last, is no longer in" in caplog.text
  record.unlink()
  record.mkdir()
  assert restore(copy).step == 2
  shutil.rmtree(copy)
  with pytest.raises(errors.CheckpointError, match="last of step unknown:"):
    restore(copy)


def test_the_record_is_of_saves_that_are_on_disk(copy, monkeypatch):
  record = copy.with_name("checkpoints.json")
  store = checkpoint.Checkpoints(copy)
  with monkeypatch.context() as patch:
    fail_to_commit(patch)
    assert store.save(4, make(4), {}) and not store.wait()
  assert not record.exists()
  assert store.save(5, make(5), {}) and store.wait()
  store.close()
  assert json.loads(record.read_text()) == {"last_saved": 5}
  assert [p.name for p in copy.parent.iterdir() if p.is_file()] == [record.name]


def fail_to_commit(monkeypatch):
  def rename(source, target, **how):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(os, "rename", rename)


@pytest.mark.slow(1)
def test_a_failed_save_is_said_and_outlived(copy, monkeypatch, caplog):
  store = checkpoint.Checkpoints(copy, checkpoint.CheckpointConfig(keep_last=3))
  with monkeypatch.context() as patch:
    fail_to_commit(patch)
    for failures in (1, 2):
      assert store.save(4, make(4), {}) and not store.wait()
      assert f"(failure {failures} in a row)" in caplog.text
      assert sorted(os.listdir(copy)) == ["1", "2", "3"]
  said = caplog.records[-1]
  assert said.levelno == logging.ERROR
  for part in (
    "CHECKPOINT 4 WAS NOT SAVED (failure 2 in a row)", "No space left",
    "MB are free", "[1, 2, 3] stand",
  ):  # fmt: skip
    assert part in said.getMessage()
  assert store.save(5, make(5), {"data": {"seed": 5}}) and store.wait()
  assert store.steps() == [2, 3, 5]
  store.close()
  assert is_exact(restore(copy))


def fails(error):
  def call(*arguments, **options):
    raise error

  return call


REFUSED = [
  OSError(28, "No space left on device"),
  TimeoutError("the save took too long"),
  ValueError("UNKNOWN: Error writing [os_error_code='5'] [tensorstore_spec=1]"),
  ValueError("RESOURCE_EXHAUSTED: Error writing local file"),
  ExceptionGroup("saves", [OSError(5, "Input/output error")]),
  jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED: Barrier timed out"),
]
DEFECTS = [
  TypeError("save() got an unexpected keyword argument 'force'"),
  AttributeError("no attribute 'save'"),
  ValueError("Must provide `args` for `save`."),
  ExceptionGroup("saves", [OSError(5, "I/O"), TypeError("and a defect")]),
  jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory"),
]


@pytest.mark.parametrize("error", REFUSED, ids=repr)
def test_what_the_disk_refuses_is_told_from_a_defect(error):
  assert disk.cannot_write(error)


@pytest.mark.parametrize("error", DEFECTS, ids=repr)
def test_a_defect_is_told_from_what_the_disk_refuses(error):
  assert not disk.cannot_write(error)


def test_a_save_that_cannot_begin_is_said_and_outlived(
  copy, monkeypatch, caplog
):
  store = checkpoint.Checkpoints(copy)
  with monkeypatch.context() as patch:
    patch.setattr(store._writer._orbax, "save", fails(REFUSED[0]))
    assert not store.save(4, make(4), {}) and not store.wait()
  assert "CHECKPOINT 4 WAS NOT SAVED" in caplog.text
  assert store.save(4, make(4), {"data": {"seed": 4}}) and store.wait()
  store.close()
  assert is_exact(restore(copy, step=4))


def test_a_defect_ends_training_at_once(copy, monkeypatch):
  store = checkpoint.Checkpoints(copy)
  with monkeypatch.context() as patch:
    patch.setattr(store._writer._orbax, "save", fails(DEFECTS[0]))
    with pytest.raises(TypeError, match="unexpected keyword"):
      store.save(4, make(4), {})
  store.close()
  assert sorted(os.listdir(copy)) == ["1", "2", "3"]


@pytest.mark.slow(1)
def test_a_defect_behind_the_training_is_raised_at_the_next_call(
  copy, monkeypatch
):
  for ask in ("wait", "save", "close"):
    store = checkpoint.Checkpoints(copy)
    step = store.steps()[-1] + 1
    finish = store._writer._orbax.wait_until_finished

    def wait_for_orbax(finish=finish):
      finish()
      if threading.current_thread() is not threading.main_thread():
        raise AttributeError("no attribute 'wait_until_finished'")

    with monkeypatch.context() as patch:
      patch.setattr(store._writer._orbax, "wait_until_finished", wait_for_orbax)
      assert store.save(step, make(step), {})
      with pytest.raises(AttributeError, match="wait_until") as caught:
        if ask == "save":
          store.save(step + 1, make(step + 1), {})
        else:
          getattr(store, ask)()
    # Where it came from is seen.
    assert caught.traceback[-1].name == "wait_for_orbax"
    store.close()


def refuse_to_open(monkeypatch, name, code):
  """Makes the system refuse to open files of this name."""
  real = open

  def refuse(path, *arguments, **options):
    if pathlib.Path(str(path)).name == name:
      raise OSError(code, os.strerror(code), str(path))
    return real(path, *arguments, **options)

  monkeypatch.setattr("builtins.open", refuse)


@pytest.mark.parametrize(
  "code", [errno.EIO, errno.EACCES, errno.ESTALE, errno.EMFILE]
)
def test_a_disk_that_fails_makes_no_step_unsound(copy, monkeypatch, code):
  before = files(copy)
  store = checkpoint.Checkpoints(copy)
  with monkeypatch.context() as patch:
    failure = OSError(code, os.strerror(code))
    patch.setattr(store._reader, "_read", fails(failure))
    with pytest.raises(errors.CheckpointError) as caught:
      store.restore(abstract())
  for part in (
    "Checkpoint 3", "cannot be read now", os.strerror(code), "nothing was ch",
  ):  # fmt: skip
    assert part in str(caught.value)
  assert store._reader.unsound == {} and files(copy) == before
  assert is_exact(store.restore(abstract()))
  store.close()


def test_a_refusal_that_only_tensorstore_meets_makes_no_step_unsound(copy):
  data = max(files(copy / "3" / "state"), key=lambda p: p.stat().st_size)
  data.unlink()
  data.symlink_to(data)  # Not to be opened, and not gone either.
  with pytest.raises(errors.CheckpointError, match="symbolic links"):
    restore(copy)


def test_a_refusal_that_orbax_takes_for_an_absence_is_met(copy, monkeypatch):
  """It asks `os.path.exists`, which is False of a disk that fails."""
  refuse_to_open(monkeypatch, "metadata", errno.EIO)
  store = checkpoint.Checkpoints(copy, read_only=True)
  monkeypatch.setattr(
    store._reader, "_read", fails(FileNotFoundError("no item `manifest`"))
  )
  with pytest.raises(errors.CheckpointError, match="cannot be read now.*Input"):
    store.restore(abstract())
  store.close()


def test_a_listing_that_fails_is_not_an_empty_folder(copy, monkeypatch):
  store = checkpoint.Checkpoints(copy, read_only=True)
  monkeypatch.setattr(os, "scandir", fails(OSError(5, "Input/output error")))
  with pytest.raises(errors.CheckpointError, match="list of its steps"):
    store.restore(abstract())
  store.close()


def break_manifest(copy, step):
  path = copy / str(step) / "manifest" / "metadata"
  path.write_text(path.read_text().replace("float32", "int32"))


@pytest.mark.slow(1)
def test_an_unsound_step_outlives_a_failed_replacement(copy, monkeypatch):
  break_manifest(copy, 3)
  store = checkpoint.Checkpoints(copy, checkpoint.CheckpointConfig(keep_last=2))
  broken = {p.name: p.read_bytes() for p in files(copy / "3")}
  assert store.restore(abstract()).step == 2
  real = os.rename

  def rename(source, target, **how):
    if checkpoint.TEMPORARY in str(source):
      raise OSError(28, "No space left on device")
    real(source, target, **how)

  with monkeypatch.context() as patch:
    patch.setattr(os, "rename", rename)
    assert store.save(3, make(3), {"data": {"seed": 3}}) and not store.wait()
  aside = copy / "3.unsound"
  assert sorted(os.listdir(copy)) == ["1", "2", "3.unsound"]
  assert {p.name: p.read_bytes() for p in files(aside)} == broken
  assert store.save(3, make(3), {"data": {"seed": 3}}) and store.wait()
  assert sorted(os.listdir(copy)) == ["2", "3", "3.unsound"]
  store.close()
  # Damaged once more: of one step only the last is kept.
  break_manifest(copy, 3)
  store = checkpoint.Checkpoints(copy, checkpoint.CheckpointConfig(keep_last=2))
  assert store.restore(abstract()).step == 2
  assert store.save(3, make(3), {"data": {"seed": 3}}) and store.wait()
  assert sorted(os.listdir(copy)) == ["2", "3", "3.unsound2"]
  assert store.save(4, make(4), {"data": {"seed": 4}}) and store.wait()
  assert sorted(os.listdir(copy)) == ["3", "4"]
  store.close()
  assert is_exact(restore(copy))


@pytest.mark.slow(1)
def test_only_orbax_is_hushed_while_it_runs_or_has_failed(
  copy, caplog, monkeypatch
):
  monkeypatch.setattr(quiet, "_failed", False)
  hook, told = sys.unraisablehook, []
  absl = logging.getLogger("absl")
  with quiet.orbax():
    pass
  filters = list(absl.filters)

  async def straggle():
    try:
      await asyncio.sleep(0)
    finally:
      raise RuntimeError("the user's own")

  def complain():
    pending = straggle()
    pending.send(None)
    del pending
    gc.collect()
    logging.getLogger("asyncio").error(
      "Task exception was never retrieved", exc_info=OSError("the user's own")
    )

  sys.unraisablehook = lambda report: told.append(str(report.exc_value))
  before = sys.unraisablehook
  try:
    with quiet.orbax(), quiet.orbax():
      assert sys.unraisablehook is not before
      complain()
    assert sys.unraisablehook is before
    store = checkpoint.Checkpoints(copy)
    break_manifest(copy, 3)
    assert store.restore(abstract()).step == 2
    assert store.save(4, make(4), {}) and store.wait()
    store.close()
    assert sys.unraisablehook is not before  # Its threads may yet complain.
    complain()
    with monkeypatch.context() as patch:
      patch.setattr(quiet, "_failed", False)
      with quiet.orbax():
        pass
    assert sys.unraisablehook is before and absl.filters == filters
  finally:
    sys.unraisablehook = hook
  assert told == ["the user's own"] * 2
  assert caplog.text.count("Task exception was never retrieved") == 2


@contextlib.contextmanager
def small_disk(folder, megabytes):
  """Mounts a small file system; skips the test where that is not allowed."""
  mount = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "none", folder]
  if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
    pytest.skip("mounting needs root")
  try:
    yield folder
  finally:
    subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.slow(1)
def test_a_full_disk_loses_nothing_and_is_recovered_from(tmp_path, caplog):
  with small_disk(tmp_path, 3), lock.WorkdirLock(tmp_path):
    store = checkpoint.Checkpoints(
      tmp_path / "checkpoints", checkpoint.CheckpointConfig(keep_last=1)
    )
    assert store.save(0, make(0), {}) and store.wait()
    ballast, failed = tmp_path / "ballast", 0
    rooms = [0, 4096, 12288, 20000, 40000, 80000, 200000, 350000, 380000]
    for number, room in enumerate(rooms):
      free = shutil.disk_usage(tmp_path).free
      ballast.write_bytes(bytes(max(0, free - room)))
      stood, step = store.steps(), 2 * number + 1
      store.save(step, make(step), {"data": {"seed": step}})
      if not store.wait():
        failed += 1
        assert store.steps() == stood
        assert is_exact(store.restore(abstract())) or not stood[0]
      assert os.listdir(store.directory) == [str(store.steps()[0])]
      ballast.unlink()
      step += 1
      assert store.save(step, make(step), {"data": {"seed": step}})
      assert store.wait() and store.steps() == [step]
    store.close()
    assert failed >= 6
    assert caplog.text.count("WAS NOT SAVED (failure 1 in a row)") == failed
    assert not [record for record in caplog.records if record.exc_info]
    beside = {path.name for path in tmp_path.iterdir() if path.is_file()}
    assert beside <= {"checkpoints.json", lock.NAME}


KILLED = """
import os, pathlib, random, signal, sys, time
sys.path.insert(0, sys.argv[2])
import jax
import numpy as np
import orbax.checkpoint
import test_checkpoint_faults as faults
from flowjax.train import checkpoint, lock

folder = pathlib.Path(sys.argv[1])


def sitting(say):
  with lock.WorkdirLock(folder):
    config = checkpoint.CheckpointConfig(keep_last=2)
    store = checkpoint.Checkpoints(folder / "checkpoints", config)
    left = [p.name for p in store.directory.iterdir() if "tmp" in p.name]
    restored = store.restore(faults.abstract())
    step = 0
    if restored is not None:
      step = restored.step
      assert step == store.steps()[-1] and not restored.passed_over
      assert faults.is_exact(restored) and int(restored.state["step"]) == step
    assert not left, left
    began = step
    while True:
      step += 1
      state = faults.make(step)
      store.save(step, state, {"data": {"seed": step}})
      for leaf in jax.tree.leaves(state):
        leaf.delete()
      if step == began + 1:
        os.write(say, began.to_bytes(4))


rng = random.Random(0)
for _ in range(int(sys.argv[3])):
  hear, say = os.pipe()
  child = os.fork()
  if not child:
    try:
      sitting(say)
    finally:
      os._exit(1)
  os.close(say)
  heard = os.read(hear, 4)
  time.sleep(rng.uniform(0.0, 0.4))
  os.kill(child, signal.SIGKILL)
  _, status = os.waitpid(child, 0)
  os.close(hear)
  assert os.WIFSIGNALED(status), "it ended by itself"
  print(int.from_bytes(heard), flush=True)
"""


@pytest.mark.slow(1)
def test_killed_at_any_moment_the_newest_commit_is_restored(tmp_path):
  here = pathlib.Path(__file__)
  root = here.parents[2]
  run = subprocess.run(
    [sys.executable, "-c", KILLED, str(tmp_path), str(here.parent), "6"],
    capture_output=True, text=True, timeout=240,
    env={**os.environ, "PYTHONPATH": str(root)},
  )  # fmt: skip
  assert run.returncode == 0, run.stderr[-2000:]
  began = [int(line) for line in run.stdout.split()]
  assert len(began) == 6 and began[0] == 0
  assert began == sorted(began) and began[-1] > 3


PAIR = """
import pathlib, sys
import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from flowjax.train import checkpoint, lock, manifest

folder, port, process = pathlib.Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
jax.distributed.initialize(f"127.0.0.1:{port}", 2, process)
mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))


def make(step):
  w = np.random.default_rng(step).normal(size=(512, 64)).astype(np.float32)
  sharding = NamedSharding(mesh, PartitionSpec("data"))
  array = jax.make_array_from_callback(w.shape, sharding, lambda at: w[at])
  return {"w": array}


def biggest(step, process):
  state = folder / "checkpoints" / str(step) / "state"
  data = state / f"ocdbt.process_{process}" / "d"
  return max(data.iterdir(), key=lambda path: path.stat().st_size)


with lock.WorkdirLock(folder):
  store = checkpoint.Checkpoints(folder / "checkpoints")
  for step in (1, 2, 3):
    assert store.save(step, make(step), {}) and store.wait()
  if process == 0:
    biggest(2, 1).unlink()  # The other process alone will miss it.
    raw = bytearray(biggest(3, 1).read_bytes())
    raw[1000] ^= 1
    biggest(3, 1).write_bytes(raw)
  multihost_utils.sync_global_devices("damaged")
  like = make(0)["w"]
  like = jax.ShapeDtypeStruct(like.shape, like.dtype, sharding=like.sharding)
  restored = store.restore({"w": like})
  assert restored.step == 1, restored.passed_over
  assert manifest.fingerprints(restored.state) == manifest.fingerprints(make(1))
  assert "bits of w" in restored.passed_over[3]
  said = ("process 1 cannot read it", "its data cannot be read at w")[process]
  assert said in restored.passed_over[2]
  assert store.save(3, make(3), {}) and store.wait()
  assert store.restore({"w": like}).step == 3
  store.close()
print("done", process)
"""


@pytest.mark.slow(1)
def test_two_processes_agree_on_what_is_sound(tmp_path):
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    port = str(probe.getsockname()[1])
  flags = "--xla_force_host_platform_device_count=2"
  root = str(pathlib.Path(__file__).parents[2])
  environment = {**os.environ, "PYTHONPATH": root, "XLA_FLAGS": flags}
  pair = [
    subprocess.Popen(
      [sys.executable, "-c", PAIR, str(tmp_path), port, str(process)],
      stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
      env=environment,
    )
    for process in (0, 1)
  ]  # fmt: skip
  try:
    said = [process.communicate(timeout=300)[0] for process in pair]
  finally:
    for process in pair:
      process.kill()
  for number, text in enumerate(said):
    assert f"done {number}" in text, text[-2000:]
  assert not (tmp_path / lock.NAME).exists()
  whole = jax.ShapeDtypeStruct((512, 64), np.float32)
  alone = checkpoint.Checkpoints(tmp_path / "checkpoints", read_only=True)
  restored = alone.restore({"w": whole})
  expected = np.random.default_rng(3).normal(size=(512, 64)).astype(np.float32)
  assert np.array_equal(restored.state["w"], expected)


def test_processes_that_see_other_steps_do_not_restore(monkeypatch):
  """As in folders that are not shared: each would take its own newest."""
  told: list[np.ndarray] = []
  gather = lambda mine: told.append(mine) or np.stack(told)  # noqa: E731
  monkeypatch.setattr(reading.jax, "process_count", lambda: 3)
  monkeypatch.setattr(reading.multihost_utils, "process_allgather", gather)
  folder = pathlib.Path("/runs/checkpoints")
  for _ in range(2):
    reading._require_same([1, 2, 3], folder)
  with pytest.raises(errors.CheckpointError) as caught:
    reading._require_same([], folder)
  said = str(caught.value)
  assert "Process 2 sees 0 checkpoints in /runs/checkpoints" in said
  assert "process 0 sees 3, up to step 3" in said
