"""The picture of a run shows what is in its metrics."""

import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from flowjax.train import curves

BLUE, RED = (37, 99, 168), (209, 73, 91)


def _write(path, rows):
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return path


def _training(count):
  return [
    {
      "step": 10 * i,
      "loss": 2.0 / (1 + i) if i != 3 else None,
      "learning_rate": 1e-3,
      "grad_norm": 1.0 + 0.1 * (i % 3),
    }
    for i in range(1, count)
  ]


def _validation(step):
  by_time = {f"validation_loss_t{i}": 0.5 + 0.1 * i for i in range(8)}
  return {"step": step, "validation_loss": 0.85, **by_time}


def _picture(path):
  return np.asarray(Image.open(path).convert("RGB")).astype(int)


def _has(image, colour):
  return bool((np.abs(image - colour).max(axis=-1) < 12).any())


@pytest.mark.slow(1)
def test_all_panels(tmp_path):
  rows = [*_training(200), _validation(1000), _validation(2000)]
  rows.insert(0, {"step": 0, "hparams": {"loss": "not a number of ours"}})
  out = tmp_path / "curves.png"
  assert curves.draw(_write(tmp_path / "metrics.jsonl", rows), out)
  image = _picture(out)
  height, width, _ = image.shape
  assert width > 1.4 * height > 1000  # Two by two.
  assert _has(image, BLUE) and _has(image, RED)
  for top in (slice(0, height // 2), slice(height // 2, None)):
    for left in (slice(0, width // 2), slice(width // 2, None)):
      assert image[top, left].std() > 5.0  # Each quarter has something in it.
  assert sorted(path.name for path in tmp_path.iterdir()) == [
    "curves.png",
    "metrics.jsonl",
  ]


def test_panels_without_metrics_are_left_out(tmp_path):
  only_loss = [
    {"step": row["step"], "loss": row["loss"]} for row in _training(9)
  ]
  out = tmp_path / "curves.png"
  assert curves.draw(_write(tmp_path / "metrics.jsonl", only_loss), out)
  image = _picture(out)
  assert image.shape[1] < 1000  # One panel.
  assert _has(image, BLUE) and not _has(image, RED)


def test_one_step_is_a_dot(tmp_path):
  out = tmp_path / "curves.png"
  path = _write(tmp_path / "metrics.jsonl", [{"step": 1, "learning_rate": 1.0}])
  assert curves.draw(path, out)
  assert _has(_picture(out), BLUE)


def test_nothing_to_draw(tmp_path):
  out = tmp_path / "curves.png"
  assert not curves.draw(tmp_path / "missing.jsonl", out)
  nan_only = _write(tmp_path / "m.jsonl", [{"step": 1, "loss": None}])
  assert not curves.draw(nan_only, out)
  assert not out.exists()


def test_smoothing_keeps_constants_and_steep_beginnings():
  x = np.full(500, 3.0)
  x[7] = np.nan
  np.testing.assert_allclose(curves.smoothed(x), 3.0)
  steep = np.exp(-np.arange(500.0))
  assert curves.smoothed(steep)[0] == 1.0
  noise = np.random.default_rng(0).normal(size=5000)
  assert np.std(curves.smoothed(noise)[100:]) < 0.15
  # A line is its own average, wherever as many come before as after.
  line = np.arange(500.0)
  np.testing.assert_allclose(curves.smoothed(line)[:480], line[:480])


def test_series_reads_null_as_nan():
  rows = [{"step": 1, "a": 2.0}, {"step": 2, "b": 1.0}, {"step": 3, "a": None}]
  steps, values = curves.series(rows, "a")
  np.testing.assert_array_equal(steps, [1, 3])
  np.testing.assert_array_equal(values, [2.0, np.nan])


def test_matplotlib_comes_only_with_a_picture():
  code = (
    "import sys, flowjax.train.curves; "
    "print([m for m in ('matplotlib', 'rich', 'tensorboardX') "
    "if m in sys.modules])"
  )
  done = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True, check=True
  )
  assert done.stdout.strip() == "[]"
