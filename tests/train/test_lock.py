"""One writer per workdir: who is refused, who takes over, who lets go."""

import contextlib
import json
import logging
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import jax
import pytest

from flowjax import errors
from flowjax.train import lock

HOLD = """
import sys, time
from flowjax.train import lock
with lock.WorkdirLock(sys.argv[1]):
  print("held", flush=True)
  time.sleep(60)
"""


def soon(condition):
  """Tells whether it comes true, however slow this machine is."""
  end = time.monotonic() + 60
  while not condition() and time.monotonic() < end:
    time.sleep(0.01)
  return condition()


@contextlib.contextmanager
def other_process(workdir):
  """Runs another process that holds the workdir."""
  root = pathlib.Path(lock.__file__).parents[2]
  environment = {**os.environ, "PYTHONPATH": str(root)}
  child = subprocess.Popen(
    [sys.executable, "-c", HOLD, str(workdir)],
    stdout=subprocess.PIPE, text=True, env=environment,
  )  # fmt: skip
  try:
    assert child.stdout.readline() == "held\n"
    yield child
  finally:
    child.kill()
    child.wait()


def write(workdir, *, age=0.0, **changes):
  """Writes the lock of somebody else."""
  owner = {**lock._identity(), "since": "yesterday", "token": "1", **changes}
  path = workdir / lock.NAME
  path.write_text(json.dumps(owner))
  os.utime(path, (time.time() - age,) * 2)
  return path


def test_held_between_enter_and_exit(tmp_path):
  held = lock.WorkdirLock(tmp_path / "new" / "run")
  assert not held.path.exists()
  with held:
    assert json.loads(held.path.read_text())["pid"] == os.getpid()
    assert lock.is_ours(held.path.parent)
    assert lock.is_ours(held.path.parent / "checkpoints")
    assert os.listdir(held.path.parent) == [lock.NAME]
  assert os.listdir(held.path.parent) == []
  with pytest.raises(RuntimeError), lock.WorkdirLock(tmp_path):
    raise RuntimeError
  assert not (tmp_path / lock.NAME).exists()


def test_a_second_writer_is_refused_and_a_killed_one_replaced(tmp_path, caplog):
  with other_process(tmp_path) as child:
    assert not lock.is_ours(tmp_path)
    with pytest.raises(errors.UserError) as error, lock.WorkdirLock(tmp_path):
      pass
    said = str(error.value)
    assert f"process {child.pid} on host {os.uname().nodename}" in said
    assert "heartbeat" in said and str(tmp_path) in said
    with pytest.raises(errors.UserError, match="taken over by process"):
      lock.require_no_other(tmp_path)
    child.send_signal(signal.SIGKILL)
    while lock._start(child.pid) is not None:  # A zombie by now: not reaped.
      time.sleep(0.01)
    with lock.WorkdirLock(tmp_path):
      assert lock.is_ours(tmp_path)
      lock.require_no_other(tmp_path)
  assert f"from process {child.pid}" in caplog.text


def test_refused_within_one_process_too(tmp_path):
  with lock.WorkdirLock(tmp_path):
    with pytest.raises(errors.UserError), lock.WorkdirLock(tmp_path):
      pass
    assert lock.is_ours(tmp_path)


def test_a_reused_pid_is_no_owner(tmp_path):
  write(tmp_path, start="1")
  with lock.WorkdirLock(tmp_path):
    assert lock.is_ours(tmp_path)


def test_a_sleeping_owner_on_this_machine_is_alive(tmp_path):
  write(tmp_path, age=10_000)
  with pytest.raises(errors.UserError), lock.WorkdirLock(tmp_path):
    pass


def test_another_machine_silent_for_long(tmp_path, caplog):
  write(tmp_path, age=61, machine="elsewhere", host="elsewhere")
  started = time.monotonic()
  with lock.WorkdirLock(tmp_path):
    assert lock.is_ours(tmp_path)
  assert time.monotonic() - started < 2
  assert "on host elsewhere" in caplog.text


@pytest.mark.parametrize("text", [None, "", "{]", "[]", "\xff"])
def test_another_machine_is_watched_until_it_was_silent(tmp_path, text):
  path = write(tmp_path, machine="elsewhere")
  if text is not None:
    path.write_text(text, encoding="latin-1")
  started = time.monotonic()
  with lock.WorkdirLock(tmp_path, silence=0.5):
    assert lock.is_ours(tmp_path)
  assert time.monotonic() - started > 0.4


def test_another_machine_that_beats_is_alive(tmp_path):
  path, stop = write(tmp_path, machine="elsewhere", pid=7), threading.Event()

  def beat():
    while not stop.wait(0.3):
      os.utime(path)

  thread = threading.Thread(target=beat)
  thread.start()
  try:
    with pytest.raises(errors.UserError, match="process 7"):
      lock.WorkdirLock(tmp_path).__enter__()
  finally:
    stop.set()
    thread.join()
  assert path.exists()


def test_of_many_that_see_a_dead_owner_one_takes_over(tmp_path):
  for _ in range(10):
    write(tmp_path, start="1")
    start, won, refused = threading.Barrier(8), [], []

    def contend(start=start, won=won, refused=refused):
      contender = lock.WorkdirLock(tmp_path)
      start.wait()
      try:
        won.append(contender.__enter__())
      except errors.UserError:
        refused.append(contender)

    threads = [threading.Thread(target=contend) for _ in range(8)]
    for thread in threads:
      thread.start()
    for thread in threads:
      thread.join()
    assert (len(won), len(refused)) == (1, 7)
    won[0].__exit__()
    assert os.listdir(tmp_path) == []


def test_an_abandoned_claim_does_not_block_for_ever(tmp_path):
  write(tmp_path, start="1")
  claim = tmp_path / f"{lock.NAME}.claim"
  claim.touch()
  os.utime(claim, (time.time() - 61,) * 2)
  with lock.WorkdirLock(tmp_path):
    assert lock.is_ours(tmp_path)
  assert os.listdir(tmp_path) == []


def test_the_heart_beats(tmp_path):
  with lock.WorkdirLock(tmp_path, beat=0.05) as held:
    os.utime(held.path, (1, 1))
    assert soon(lambda: held.path.stat().st_mtime > 1)
    held.path.unlink()
    assert soon(lambda: lock.is_ours(tmp_path))
  assert not held.path.exists()


def test_a_lock_taken_over_is_left_to_its_new_owner(tmp_path, caplog):
  with caplog.at_level(logging.ERROR):
    with lock.WorkdirLock(tmp_path, beat=0.05):
      path = write(tmp_path, pid=7)
      os.utime(path, (1, 1))
      assert soon(lambda: "taken over by process 7" in caplog.text)
      with pytest.raises(errors.UserError, match="process 7"):
        lock.require_no_other(tmp_path)
  assert json.loads(path.read_text())["pid"] == 7
  assert path.stat().st_mtime == 1


def test_only_the_first_process_holds_it(tmp_path, monkeypatch):
  monkeypatch.setattr(jax, "process_index", lambda: 1)
  with lock.WorkdirLock(tmp_path):
    assert os.listdir(tmp_path) == []


def test_a_workdir_that_cannot_be_made(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(errors.UserError, match="cannot be written: Not a dir"):
    lock.WorkdirLock(tmp_path / "file" / "run").__enter__()


def test_a_read_only_workdir(tmp_path):
  mount = ["mount", "-t", "tmpfs", "-o", "ro,size=1m", "none", str(tmp_path)]
  if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
    pytest.skip("mounting needs root")
  try:
    with pytest.raises(errors.UserError, match="cannot be written: Read-only"):
      lock.WorkdirLock(tmp_path).__enter__()
  finally:
    subprocess.run(["umount", str(tmp_path)], check=True)
