"""Reading in processes: the same batches, and no silent death."""

import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import time

import numpy as np
import PIL.Image
import pytest

from flowjax import errors
from flowjax.data import config as config_lib
from flowjax.data import loader, sources

pytestmark = pytest.mark.slow


def gone(pid: int) -> bool:
  try:
    os.kill(pid, 0)
  except ProcessLookupError:
    return True
  with open(f"/proc/{pid}/stat") as file:
    return file.read().rpartition(")")[2].split()[0] == "Z"


def wait_for(condition, seconds=120) -> bool:
  end = time.monotonic() + seconds
  while not condition() and time.monotonic() < end:
    time.sleep(0.05)
  return condition()


@pytest.fixture
def folder(tmp_path):
  """Forty images in two classes, one of them corrupt."""
  rng = np.random.default_rng(0)
  for i in range(40):
    path = tmp_path / "ab"[i % 2] / f"{i:02d}.png"
    path.parent.mkdir(exist_ok=True)
    PIL.Image.fromarray(rng.integers(0, 256, (6, 6), np.uint8)).save(path)
    path.with_suffix(".txt").write_text(f"Häuschen {i} 赤")
  (tmp_path / "a/06.png").write_bytes(b"no image")
  return tmp_path


def test_the_number_of_workers_changes_nothing_and_a_dead_one_is_told(folder):
  def batches(workers):
    config = config_lib.DataConfig(
      source=f"folder:{folder}",
      batch_size=8,
      flip=True,
      workers=workers,
      held_out=0.0,
      captions=True,
    )
    source = sources.open(config, "train")
    return loader.batches(source, config, start_step=5)

  readers = {workers: batches(workers) for workers in (0, 1, 2)}
  skipped = 0
  for _ in range(12):
    expected = next(readers[0])
    skipped += expected["skipped"].sum()
    for workers in (1, 2):
      found = next(readers[workers])
      assert set(found) == set(expected)
      for key in expected:
        np.testing.assert_array_equal(found[key], expected[key])
        assert type(found[key]) is np.ndarray  # Not memory that is unmapped.
  assert skipped  # The corrupt image was among them.

  children = multiprocessing.active_children()
  assert len(children) == 3
  # What a scheduler or Ctrl-C sends to the whole group does not end them.
  for child in children:
    os.kill(child.pid, signal.SIGTERM)
    os.kill(child.pid, signal.SIGINT)
  for _ in range(8):
    next(readers[1]), next(readers[2])
  assert all(child.is_alive() for child in children)

  readers[1].close()
  assert len(multiprocessing.active_children()) == 2

  os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
  with pytest.raises(errors.DataError, match="died.*exit code -9.*workers"):
    list(itertools.islice(readers[2], 100))
  assert wait_for(lambda: not multiprocessing.active_children())


def test_a_worker_leaves_the_accelerator_alone_and_hands_on_errors(monkeypatch):
  monkeypatch.setenv("JAX_PLATFORMS", "no_such_platform")

  class Reporting:  # Local, so that it is sent by value.
    num_classes = 2

    def __len__(self):
      return 64

    def __getitem__(self, i):
      import jax

      if len(jax.devices("cpu")) != len(jax.devices()):
        raise RuntimeError("an accelerator was opened")
      raise errors.DataError(f"here {os.environ['JAX_PLATFORMS']}")

  config = config_lib.DataConfig(batch_size=4, workers=1)
  batches = loader.batches(Reporting(), config)
  with pytest.raises(errors.DataError, match="here cpu"):
    next(batches)
  assert wait_for(lambda: not multiprocessing.active_children())


SCRIPT = """
import multiprocessing
from flowjax.data import config, loader, sources

if __name__ == "__main__":
  config = config.DataConfig(workers=1)
  batches = loader.batches(sources.open(config, "train"), config)
  next(batches)
  print(multiprocessing.active_children()[0].pid, flush=True)
  while True:
    next(batches)
"""


def test_workers_end_with_a_trainer_that_is_killed(tmp_path):
  script = tmp_path / "train.py"
  script.write_text(SCRIPT)
  root = os.path.dirname(os.path.dirname(os.path.dirname(__file__)))
  trainer = subprocess.Popen(
    [sys.executable, script],
    stdout=subprocess.PIPE,
    env=os.environ | {"PYTHONPATH": root},
  )
  worker = int(trainer.stdout.readline())
  assert not gone(worker)

  trainer.kill()
  trainer.wait()

  assert wait_for(lambda: gone(worker))
