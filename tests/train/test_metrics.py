"""Metrics survive kills, resumes, full disks and broken backends."""

import ast
import errno
import inspect
import json
import logging
import os
import pathlib
import signal
import struct
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowjax import errors
from flowjax.train import json_lines, metrics


def _rows(directory):
  # Strict: NaN is no JSON.
  def refuse(constant):
    raise AssertionError(constant)

  lines = (directory / "metrics.jsonl").read_text().splitlines()
  return [json.loads(line, parse_constant=refuse) for line in lines]


def _events(directory):
  from tensorboardX.proto import event_pb2

  found = []
  for path in sorted((directory / "tensorboard").iterdir()):
    data = path.read_bytes()
    while data:
      (length,) = struct.unpack("<Q", data[:8])
      found.append(event_pb2.Event.FromString(data[12 : 12 + length]))
      data = data[16 + length :]
  return found


def test_one_line_per_write(tmp_path):
  writer = metrics.Writer(tmp_path, tensorboard=False)
  writer.write_scalars(1, {"loss": jnp.float32(0.5), "count": np.int64(3)})
  writer.write_texts(2, {"note": "hello"})
  writer.write_hparams({"model": {"depth": 4, "size": (8, 8)}})
  writer.write_images(2, {"samples": np.zeros((1, 4, 4, 3), np.uint8)})
  rows = _rows(tmp_path)  # Before close: each line is there at once.
  writer.close()
  assert [row.pop("wall") > 1e9 for row in rows] == [True] * 3
  assert rows == [
    {"step": 1, "loss": 0.5, "count": 3},
    {"step": 2, "note": "hello"},
    {"step": 0, "hparams": {"model": {"depth": 4, "size": [8, 8]}}},
  ]
  assert list(tmp_path.iterdir()) == [tmp_path / "metrics.jsonl"]


def test_what_is_not_finite_is_null(tmp_path):
  writer = metrics.Writer(tmp_path, tensorboard=False)
  nan, inf = float("nan"), np.float32("inf")
  writer.write_scalars(1, {"a": nan, "b": -inf, "c": np.array([1.0, inf])})
  writer.close()
  (row,) = _rows(tmp_path)
  assert (row["a"], row["b"], row["c"]) == (None, None, [1.0, None])


@pytest.mark.parametrize("cut", range(1, 40, 7))
def test_a_cut_line_is_repaired(tmp_path, cut):
  path = tmp_path / "metrics.jsonl"
  whole = b'{"step": 1, "loss": 0.25}\n'
  path.write_bytes(
    whole + b'{"step": 2, "wall": 1700000000.5, "loss": 0.125}\n'[:cut]
  )
  writer = metrics.Writer(tmp_path, tensorboard=False)
  writer.write_scalars(2, {"loss": 1.0})
  writer.close()
  assert path.read_bytes().startswith(whole)
  assert [row["step"] for row in _rows(tmp_path)] == [1, 2]


def test_only_the_end_of_line_was_cut(tmp_path):
  (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}')
  json_lines.repair(tmp_path / "metrics.jsonl")
  assert [row["step"] for row in _rows(tmp_path)] == [1, 2]


def test_later_steps_are_dropped_and_nothing_else(tmp_path):
  path = tmp_path / "metrics.jsonl"
  kept = [
    b'{"step":  10,   "loss": 1.50}',
    b"\x00\x00 damaged, and not ours to throw away",
    b'{"step": 20, "loss": null}',
    b'{"no": "step"}',
  ]
  dropped = [b'{"step": 21, "loss": 1}', b'{"step": 30, "loss": 1}']
  lines = [kept[0], dropped[0], *kept[1:], dropped[1]]
  path.write_bytes(b"".join(line + b"\n" for line in lines))
  metrics.Writer(tmp_path, tensorboard=False, resume_step=20).close()
  assert path.read_bytes() == b"".join(line + b"\n" for line in kept)
  assert [row["step"] for row in json_lines.read(path)] == [10, 20]
  assert list(tmp_path.iterdir()) == [path]


def test_no_resume_step_keeps_all_and_zero_begins_anew(tmp_path):
  path = tmp_path / "metrics.jsonl"
  path.write_text('{"step": 0}\n{"step": 5}\n')
  json_lines.repair(path)
  assert len(_rows(tmp_path)) == 2
  json_lines.repair(path, resume_step=0)
  assert _rows(tmp_path) == [{"step": 0}]


def test_a_repair_that_fails_leaves_the_file(tmp_path, monkeypatch):
  path = tmp_path / "metrics.jsonl"
  path.write_text('{"step": 1}\n{"step": 5}\n')

  def fail(*_):
    raise OSError(errno.ENOSPC, "No space left on device")

  monkeypatch.setattr(os, "replace", fail)
  with pytest.raises(errors.UserError, match="cannot be written.*No space"):
    metrics.Writer(tmp_path, tensorboard=False, resume_step=1)
  assert path.read_text() == '{"step": 1}\n{"step": 5}\n'


def test_a_killed_writer_leaves_every_whole_line(tmp_path):
  code = (
    "import pathlib; from flowjax.train import json_lines\n"
    f"lines = json_lines.JsonLines(pathlib.Path({str(tmp_path)!r}) / 'm')\n"
    "for step in range(10**9):\n"
    "  lines.write(step, {'text': 'x' * 5000})\n"
    "  if step == 200: print('go', flush=True)\n"
  )
  child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
  child.stdout.readline()
  child.send_signal(signal.SIGKILL)
  child.wait()
  child.stdout.close()
  path = tmp_path / "m"
  json_lines.repair(path)
  steps = [json.loads(line)["step"] for line in path.read_text().splitlines()]
  assert steps == list(range(len(steps))) and len(steps) > 200


def test_a_full_disk_loses_nothing(tmp_path, monkeypatch, caplog):
  real, full = os.write, [False]

  def write(file, data):
    if not full[0]:
      return real(file, data)
    if len(data) > 10 and full[0] == "half":
      full[0] = True
      return real(file, data[:10])
    raise OSError(errno.ENOSPC, "No space left on device")

  writer = metrics.Writer(tmp_path, tensorboard=False)
  monkeypatch.setattr(os, "write", write)
  writer.write_scalars(1, {"loss": 1.0})
  full[0] = "half"
  with caplog.at_level(logging.WARNING):
    writer.write_scalars(2, {"loss": 2.0})
    writer.write_scalars(3, {"loss": 3.0})
  assert len(caplog.records) == 1
  assert "No space left" in caplog.text and "goes on" in caplog.text
  full[0] = False
  writer.write_scalars(4, {"loss": 4.0})
  writer.close()
  assert [row["loss"] for row in _rows(tmp_path)] == [1.0, 2.0, 3.0, 4.0]


def test_only_process_0_writes(tmp_path):
  writer = metrics.Writer(tmp_path, process_index=1)
  writer.write_scalars(1, {"loss": 1.0})
  writer.write_texts(1, {"note": "x"})
  writer.write_hparams({"a": 1})
  writer.flush()
  writer.close()
  assert not list(tmp_path.iterdir())


def test_tensorboard_holds_the_same(tmp_path):
  writer = metrics.Writer(tmp_path, resume_step=6)
  writer.write_scalars(7, {"loss": 0.5})
  writer.write_images(7, {"samples": np.zeros((1, 4, 6, 3), np.uint8)})
  writer.write_texts(8, {"note": "hello"})
  writer.write_hparams({"model": {"depth": 4}})
  writer.close()
  version, start, scalar, image, text, hparams = _events(tmp_path)
  assert version.file_version == "brain.Event:2"
  # Steps after the resumed one are hidden from the older files.
  assert (start.step, start.session_log.status) == (7, start.session_log.START)
  (value,) = scalar.summary.value
  assert (scalar.step, value.tag, value.simple_value) == (7, "loss", 0.5)
  (value,) = image.summary.value
  assert (value.tag, value.image.height, value.image.width) == ("samples", 4, 6)
  assert b"hello" in text.summary.value[0].tensor.string_val[0]
  assert b'"depth": 4' in hparams.summary.value[0].tensor.string_val[0]


def test_two_sittings_in_one_second_keep_both_files(tmp_path):
  for step in (1, 2):
    writer = metrics.Writer(tmp_path)
    writer.write_scalars(step, {"loss": 0.5})
    writer.close()
  assert [event.step for event in _events(tmp_path)] == [0, 1, 0, 2]


def test_an_unwritable_tensorboard_warns_once(tmp_path, caplog):
  (tmp_path / "tensorboard").write_text("a file in the way")
  with caplog.at_level(logging.WARNING):
    writer = metrics.Writer(tmp_path)
    for step in (1, 2, 3):
      writer.write_scalars(step, {"loss": 1.0})
    writer.close()
  assert len(caplog.records) == 1 and "Training goes on" in caplog.text
  assert [row["step"] for row in _rows(tmp_path)] == [1, 2, 3]


def test_a_tensorboard_that_breaks_warns_once(tmp_path, caplog, monkeypatch):
  writer = metrics.Writer(tmp_path)
  writer.write_scalars(1, {"loss": 1.0})

  def fail(*_):
    raise OSError(errno.ENOSPC, "No space left on device")

  monkeypatch.setattr(writer._backend._file, "write_event", fail)
  with caplog.at_level(logging.WARNING):
    for step in (2, 3):
      writer.write_scalars(step, {"loss": 1.0})
      writer.write_images(step, {"a": np.zeros((1, 4, 4, 3), np.uint8)})
    writer.close()
  assert len(caplog.records) == 1
  assert "tensorboardX raised OSError: [Errno 28] No space" in caplog.text
  assert [row["step"] for row in _rows(tmp_path)] == [1, 2, 3]


def test_without_tensorboardx_it_says_so(tmp_path, caplog, monkeypatch):
  monkeypatch.setattr(metrics, "_is_installed", lambda name: False)
  with caplog.at_level(logging.WARNING):
    writer = metrics.Writer(tmp_path)
    writer.write_scalars(1, {"loss": 1.0})
    writer.close()
  assert "pip install tensorboardX" in caplog.text
  assert len(_rows(tmp_path)) == 1


def test_clu_is_refused_without_tensorflow(tmp_path, monkeypatch):
  monkeypatch.setattr(metrics, "_is_installed", lambda name: False)
  with pytest.raises(errors.UserError, match="tensorflow and tensorboard"):
    metrics.Writer(tmp_path, backend="clu")
  with pytest.raises(errors.UserError, match="'clew' is not one of"):
    metrics.Writer(tmp_path, backend="clew")


def test_clu_gets_every_write_when_asked_for(tmp_path, monkeypatch):
  calls = []

  class Fake:
    def __getattr__(self, name):
      return lambda *arguments: calls.append((name, *arguments))

  fake = types.ModuleType("clu.metric_writers")
  fake.create_default_writer = lambda logdir: calls.append(logdir) or Fake()
  monkeypatch.setattr(metrics, "_is_installed", lambda name: True)
  monkeypatch.setitem(sys.modules, "clu.metric_writers", fake)
  monkeypatch.setattr("clu.metric_writers", fake, raising=False)
  writer = metrics.Writer(tmp_path, backend="clu")
  writer.write_scalars(1, {"loss": 1.0})
  writer.write_texts(1, {"note": "x"})
  writer.write_hparams(
    {"steps": 5, "data": {"flip": True, "rules": ((".*", 0.5),)},
     "optim": {"adam": {"rate": 1e-4}, "clip_norm": None, "law": "uniform"}}
  )  # fmt: skip
  writer.close()
  assert calls == [
    str(tmp_path),
    ("write_scalars", 1, {"loss": 1.0}),
    ("write_texts", 1, {"note": "x"}),
    ("write_hparams", {
      "steps": 5, "data.flip": True, "data.rules": "(('.*', 0.5),)",
      "optim.adam.rate": 1e-4, "optim.clip_norm": "None",
      "optim.law": "uniform",
    }),
    ("close",),
  ]  # fmt: skip
  assert len(_rows(tmp_path)) == 3
  # What is kept beside it keeps its groups.
  assert _rows(tmp_path)[2]["hparams"]["optim"]["clip_norm"] is None


def test_the_methods_are_those_of_clu_in_part():
  """Read from its source: to import it would need tensorflow."""
  clu = pytest.importorskip("clu")
  path = pathlib.Path(clu.__path__[0]) / "metric_writers" / "interface.py"
  (theirs,) = (
    node
    for node in ast.parse(path.read_text()).body
    if isinstance(node, ast.ClassDef) and node.name == "MetricWriter"
  )
  parameters = {
    node.name: [argument.arg for argument in node.args.args]
    for node in theirs.body
    if isinstance(node, ast.FunctionDef)
  }
  ours = {
    name: list(inspect.signature(method).parameters)
    for name, method in inspect.getmembers(metrics.Writer, inspect.isfunction)
    if not name.startswith("_")
  }
  assert ours == {name: parameters[name] for name in ours}
  assert len(ours) == 6


def test_behind_fetches_only_what_is_lag_steps_old(monkeypatch):
  fetched = []
  real = jax.device_get
  monkeypatch.setattr(
    jax, "device_get", lambda x: fetched.append(real(x)) or fetched[-1]
  )
  behind = metrics.Behind(lag=2)
  seen = []
  for step in range(1, 6):
    behind.push(step, {"loss": jnp.float32(step), "by_time": jnp.ones(3)})
    seen += [done for done, _ in behind.ready()]
    # The last two are still on their way.
    assert len(fetched) == len(seen) == max(0, step - 2)
  ((step, values), last) = behind.rest()
  assert seen == [1, 2, 3] and (step, last[0]) == (4, 5)
  assert values["loss"] == 4.0 and type(values["loss"]) is float
  np.testing.assert_array_equal(values["by_time"], np.ones(3))
  assert behind.rest() == []


def test_an_unwritable_workdir_is_a_users_error(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(errors.UserError, match="cannot be written"):
    metrics.Writer(pathlib.Path(tmp_path / "file"), tensorboard=False)
