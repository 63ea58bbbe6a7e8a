"""Several processes train as one does, and end together whatever happens."""

import dataclasses
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

from flowjax import __main__ as door
from flowjax import errors
from flowjax.train import parts, session

# Five lives of two or four processes, on a machine that may have much to do.
pytestmark = pytest.mark.timeout(900)

ROOT = pathlib.Path(__file__).parents[2]
LOCAL = ROOT / "launch/local.sh"
CONFIG = """
from flowjax.train import experiment
def get_config():
  c = experiment.defaults("dit")
  c.steps = 6
  c.model.update(image_size=(8, 8), channels=1, patch_size=4, width=16,
                 depth=1, heads=2, num_classes=10)
  c.data.update(source="digits", batch_size=16)
  c.optim.update(learning_rate=1e-2, warmup_steps=2)
  c.mesh.update(fsdp=2, tensor=2)
  c.log.update(metrics_every=1, validation_every=0, samples_every=0,
               sample_count=8, tensorboard=False)
  c.sample.steps = 2
  c.checkpoint.every = 2
  return c
"""

# Commands with "+" between them, in one life of the process. Notes which rows
# of the batches it was given, and sends itself signals: PROCESS:STEP:SIGNAL.
DRIVER = """
import json, os, pathlib, signal, sys, time, zlib
from flowjax import __main__ as door
from flowjax.commands import doctor
from flowjax.parallel import distributed, placing
from flowjax.train import loop, session

notes = pathlib.Path(os.environ["NOTES"])
put_part, look = placing.put_part, session.Session._look

def noted(mesh, count):
  place, rows = put_part(mesh, count), placing.rows(mesh, count).tolist()
  turn = len(list(notes.glob(f"rows.{os.getpid()}.*")))
  file = open(notes / f"rows.{os.getpid()}.{turn}", "w")
  def put(batch):
    marks = [zlib.crc32(image.tobytes()) for image in batch["image"]]
    print(json.dumps(list(zip(rows, marks))), file=file, flush=True)
    return place(batch)
  return put

def signalled(self, number, state):
  for act in os.environ.get("ACTS", "").split():
    process, step, kind = map(int, act.split(":"))
    once = notes / act
    if (process, step) == (distributed.peers().index, number) and (
      not once.exists()
    ):
      once.touch()
      os.kill(os.getpid(), kind)
      # The others stop soon after, however slow it is to tell them.
      end = time.monotonic() + 60
      while distributed.peers()._stop is None and time.monotonic() < end:
        time.sleep(0.01)
  return look(self, number, state)

placing.put_part, session.Session._look = noted, signalled
# Other tests look at these.
loop.curves.draw, doctor.bodies = lambda *_: None, lambda off: {}
words, groups = sys.argv[1:], [[]]
for word in words:
  groups.append([]) if word == "+" else groups[-1].append(word)
code, finish = 0, distributed.finish
if len(groups) > 1:
  distributed.start()
  distributed.start = distributed.finish = lambda: None
for group in groups:
  code = code or door.main(group)
if len(groups) > 1:
  finish()
sys.exit(code)
"""

# Meets the others, and then waits for them for ever.
WAITER = """
import os, signal, sys, time
from flowjax.parallel import arrival, distributed
distributed.start()
client, me = arrival.state().client, os.environ["FLOWJAX_PROCESS"]
client.key_value_set(f"here/{me}", "")
if sys.argv[1] == me:
  for other in range(2):  # Whoever still starts would say less.
    client.blocking_key_value_get(f"here/{other}", 300_000)
  os.kill(os.getpid(), int(sys.argv[2]))
time.sleep(600)
"""


@dataclasses.dataclass
class Ended:
  code: int
  text: str
  rows: list[dict[int, int]]  # By step, the mark of each row that was read.


def _port():
  with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    return s.getsockname()[1]


def _environment(**more):
  env = {**os.environ, "NPROC": "16", "JAX_PLATFORMS": "cpu", **more}
  count = r"--xla_force_host_platform_device_count=\d+"
  env["XLA_FLAGS"] = re.sub(count, "", env["XLA_FLAGS"])
  env["PYTHONPATH"] = str(ROOT)
  return env


def _local(
  folder, processes, devices, *words, acts="", restarts=0, patience=60
):
  """Runs the driver by launch/local.sh; returns how it ended.

  Who is not heard of for `patience` seconds is lost: many, unless one is to be.
  """
  notes = folder / "notes"
  notes.mkdir(exist_ok=True)
  flags = ["-n", processes, "-d", devices, "-r", restarts]
  command = [LOCAL, *flags, "--", sys.executable, "-c", DRIVER, *words]
  env = dict(NOTES=str(notes), ACTS=acts, FLOWJAX_LOST_TIMEOUT=str(patience))
  started = subprocess.Popen(
    list(map(str, command)),
    env=_environment(**env),
    stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    start_new_session=True,
  )  # fmt: skip
  try:
    text, _ = started.communicate()
  except BaseException:
    os.killpg(started.pid, signal.SIGKILL)
    raise
  steps: list[dict[int, int]] = []
  if restarts:  # Each life begins at another step.
    return Ended(started.returncode, text, steps)
  # The last that a process asked for are those to train on.
  last = {path.suffixes[0]: path for path in sorted(notes.glob("rows.*"))}
  for path in last.values():
    for i, line in enumerate(path.read_text().splitlines()):
      steps += [{}] * (i + 1 - len(steps))
      found = dict(json.loads(line))
      # Several processes may need one row, and see the same in it.
      assert all(steps[i].get(r, m) == m for r, m in found.items())
      steps[i] = {**steps[i], **found}
  return Ended(started.returncode, text, steps)


def _each(script, count, words, folders=None, **env):
  """Starts some of `count` processes; calling the result waits for them.

  It then returns the exit code and the text of each, and ends the one `but`.
  """
  env = {"FLOWJAX_COORDINATOR": f"127.0.0.1:{_port()}",
         "FLOWJAX_PROCESSES": str(count), **env}  # fmt: skip
  started = {
    process: subprocess.Popen(
      [sys.executable, "-c", script, *map(str, mine)],
      env=_environment(FLOWJAX_PROCESS=str(process), **env),
      cwd=(folders or {}).get(process),
      text=True,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
    )  # fmt: skip
    for process, mine in words.items()
  }

  def wait(but=None):
    ended = {}
    try:
      for process, running in started.items():
        if process != but:
          text, _ = running.communicate(timeout=300)
          ended[process] = running.returncode, text
    finally:
      for running in started.values():
        running.kill()
        running.communicate()
    return ended

  return wait


def _losses(workdir):
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  rows = [json.loads(line) for line in lines]
  return {row["step"]: row["loss"] for row in rows if "loss" in row}


def _fingerprints(workdir):
  path = workdir / "checkpoints/6/manifest/metadata"
  return json.loads(path.read_text())["leaves"]


@pytest.fixture(name="config", scope="module")
def _config(tmp_path_factory):
  path = tmp_path_factory.mktemp("config") / "tiny.py"
  path.write_text(CONFIG)
  return path


def _train(config, workdir, *more):
  return ["train", f"--config={config}", f"--workdir={workdir}", *more]


@pytest.fixture(name="one", scope="module")
def _one(config, tmp_path_factory):
  """One process of eight devices."""
  workdir = tmp_path_factory.mktemp("one")
  assert door.main(_train(config, workdir)) == 0
  return workdir


@pytest.fixture(name="two", scope="module")
def _two(config, tmp_path_factory):
  """Two processes of four devices, which also draw, score and export."""
  folder = tmp_path_factory.mktemp("two")
  workdir = folder / "run"
  here = f"--workdir={workdir}"
  ended = _local(
    folder, 2, 4,
    *_train(config, workdir, "--config.log.validation_every=6",
            "--config.log.samples_every=6"),
    "+", "sample", here, f"--out={folder / 'x.npy'}", "--num=12",
    "+", "export", here, f"--out={folder / 'out'}", "--format=torch",
    "+", "doctor", "--mesh=data=2,fsdp=4", "--reduce_size=10KB",
    f"--json={folder / 'facts.json'}",
  )  # fmt: skip
  assert ended.code == 0, ended.text
  return folder, ended


@pytest.mark.slow(40)
def test_two_processes_compute_what_one_does(one, two, tmp_path):
  folder, ended = two
  ours, theirs = _losses(one), _losses(folder / "run")
  assert list(theirs) == list(ours) == [1, 2, 3, 4, 5, 6]
  np.testing.assert_allclose(
    list(theirs.values()), list(ours.values()), rtol=1e-5
  )
  # What they draw and export is what one process makes of their checkpoint.
  here = f"--workdir={folder / 'run'}"
  alone = tmp_path / "x.npy"
  assert door.main(["sample", here, f"--out={alone}", "--num=12"]) == 0
  np.testing.assert_allclose(
    np.load(folder / "x.npy"), np.load(alone), atol=1e-5
  )
  out = tmp_path / "out"
  words = ["export", here, f"--out={out}", "--format=torch"]
  assert door.main(words) == 0
  name = "model.safetensors"
  assert (folder / "out" / name).read_bytes() == (out / name).read_bytes()
  assert ended.text.count("samples of step 6") == 1
  facts = json.loads((folder / "facts.json").read_text())
  assert facts["devices"]["processes"] == 2 and facts["off"] == []
  assert set(facts["all_reduce_bytes_per_second"]) == {"data (2)", "fsdp (4)"}
  assert (folder / "run/samples/step_0000006.png").exists()


def _back_to(step, workdir, copy):
  """Copies a run as it was after a step."""
  shutil.copytree(workdir, copy)
  for path in (copy / "checkpoints").iterdir():
    if path.name.isdecimal() and int(path.name) > step:
      shutil.rmtree(path)


@pytest.mark.slow(30)
def test_a_run_moves_from_8_devices_to_4_processes_and_to_4_devices(
  config, one, two, tmp_path, monkeypatch
):
  """With `tensor` and `context` across processes, which then share rows.

  They stop together: SIGTERM to process 1, after its first step. The last has
  by `fsdp` alone what the others have by `fsdp` and `tensor`.
  """
  straight, rows = _losses(one), two[1].rows
  assert all(len(step) == 16 for step in rows[:6])
  assert len({mark for step in rows[:6] for mark in step.values()}) == 96

  workdir = tmp_path / "run"
  _back_to(2, one, workdir)
  ended = _local(
    tmp_path, 4, 2, *_train(config, workdir, "--config.mesh.context=2"),
    acts=f"1:3:{signal.SIGTERM:d}",
  )  # fmt: skip
  assert ended.code == errors.Preempted.exit_code == 42, ended.text
  assert "step 2/6  compiling" in ended.text
  saved = re.findall(
    r"\[(\d)\] flowjax: .*SIGTERM: saved at step (\d)", ended.text
  )
  assert sorted(process for process, _ in saved) == ["0", "1", "2", "3"]
  (step,) = {int(step) for _, step in saved}
  assert step < 6 and ended.rows[: step - 2] == rows[2:step]

  build, devices = parts.build, jax.devices()[:4]
  monkeypatch.setattr(parts, "build", lambda config: build(config, devices))
  go, states = session.Session.go, []

  def noted(*given):
    states.append(go(*given))
    return states[-1]

  monkeypatch.setattr(session.Session, "go", noted)
  mesh = [f"--config.mesh.{x}" for x in ("data=1", "fsdp=-1", "tensor=1")]
  assert door.main(_train(config, workdir, *mesh)) == 0
  kernel = states[0].params["blocks"]["mlp"]["in"]["kernel"]
  assert kernel.shape == (1, 16, 64)  # Before, each had (1, 8, 32) of it.
  assert {x.data.shape for x in kernel.addressable_shards} == {(1, 4, 64)}
  losses = _losses(workdir)
  assert list(losses) == list(straight) == [1, 2, 3, 4, 5, 6]
  np.testing.assert_allclose(
    list(losses.values()), list(straight.values()), rtol=1e-5
  )


@pytest.mark.slow(35)
def test_stopped_then_killed_then_started_again_is_the_straight_run(
  config, two, tmp_path
):
  """SIGTERM to process 1 after step 1, and kill -9 after step 5."""
  workdir = tmp_path / "run"
  ended = _local(
    tmp_path, 2, 4, *_train(config, workdir),
    acts=f"1:1:{signal.SIGTERM:d} 1:5:{signal.SIGKILL:d}",
    restarts=2, patience=10,
  )  # fmt: skip
  assert ended.code == 0, ended.text
  saved = re.findall(
    r"\[(\d)\] flowjax: .*SIGTERM: saved at step (\d)", ended.text
  )
  assert sorted(process for process, _ in saved) == ["0", "1"]
  (step,) = {step for _, step in saved}
  assert "process 1 was killed by signal 9" in ended.text
  assert "Lost process 1 (host" in ended.text
  lives = re.findall(r"\[0\] step (\d)/6  compiling", ended.text)
  # The kill may come before the checkpoint of step 4 is whole.
  assert lives in (["0", step, max("2", step)], ["0", step, "4"])
  straight = two[0] / "run"
  assert _losses(workdir) == _losses(straight)
  assert _fingerprints(workdir) == _fingerprints(straight)


@pytest.mark.slow(10)
def test_whoever_is_lost_is_named_and_the_others_end():
  """Killed, or no longer running; process 0, where all meet, as well."""
  lost = [(0, signal.SIGKILL), (1, signal.SIGKILL), (1, signal.SIGSTOP)]
  jobs = [
    _each(
      WAITER, 2, {p: (process, kind.value) for p in range(2)},
      FLOWJAX_LOST_TIMEOUT="5",
    )
    for process, kind in lost
  ]  # fmt: skip
  for (process, kind), ended in zip(lost, jobs, strict=True):
    for other, (code, text) in ended(but=process).items():
      assert code == errors.Lost.exit_code == 6, (kind, other, text)
      assert f"Lost process {process}" in text


@pytest.mark.slow(10)
def test_whoever_does_not_come_or_is_another_is_named(config, tmp_path):
  other = tmp_path / config.name
  other.write_text(CONFIG.replace("batch_size=16", "batch_size=32"))
  words = _train(config, tmp_path / "run")
  start = "import sys; from flowjax import __main__ as d; sys.exit(d.main())"
  late = {"FLOWJAX_START_TIMEOUT": "10"}
  absent = _each(start, 3, {0: words, 2: words}, **late)
  mistyped = [*words, "--config.steps=7"]
  flags = _each(start, 2, {0: words, 1: mistyped})
  # The same words, which read another file.
  words = _train(config.name, tmp_path / "run")
  folders = {0: config.parent, 1: tmp_path}
  files = _each(start, 2, {0: words, 1: words}, folders=folders)
  for code, text in absent().values():
    assert code == 6 and "Process 1 of 3 did not arrive" in text, text
  for code, text in flags().values():
    assert code == 2 and "Process 1 differs from process 0 in its flags" in text
    assert "--config.steps=7" in text
  for code, text in files().values():
    assert code == 2 and "config.data.batch_size: 16 -> 32" in text, text
  assert not (tmp_path / "run").exists()
