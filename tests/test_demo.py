"""The demo's own script, on a network that is trained for a moment."""

import importlib.util
import json
import pathlib

import pytest

pytestmark = pytest.mark.usefixtures(
  "on_one_device", "traced_once", "hashed_by_numpy", "fitted_once"
)

DEMO = pathlib.Path(__file__).parents[1] / "launch" / "demo.py"
SMALL = (
  "--config.steps=2",
  "--config.optim.warmup_steps=0",
  "--config.model.patch_size=4",
  "--config.model.width=16",
  "--config.model.depth=1",
  "--config.model.heads=2",
  "--config.sample.steps=1",
  # As many at once while it trains as when it is scored: one program.
  "--config.data.batch_size=64",
  "--config.log.sample_count=64",
  "--config.log.tensorboard=False",
)


@pytest.mark.slow
def test_the_demo_ends_with_scores_and_where_everything_is(tmp_path, capsys):
  spec = importlib.util.spec_from_file_location("demo", DEMO)
  demo = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(demo)
  # Two steps make no digits, and the demo must say so.
  assert demo.main(str(tmp_path), *SMALL) == 1

  out = capsys.readouterr().out
  assert "met     the judge" in out
  assert "MISSED  at least 98%" in out and "MISSED  unguided" in out
  told = out.split("Where everything is:")[1].splitlines()
  files = [line.split()[-1] for line in told if str(tmp_path) in line]
  assert len(files) == 7
  assert all(pathlib.Path(file).exists() for file in files)
  report = json.loads((tmp_path / "report.json").read_text())
  wanted = "parameters train_seconds classifier_accuracy sample_accuracy"
  wanted += " frechet frechet_unguided frechet_real nearest_neighbour"
  assert set(wanted.split()) <= set(report)
  torch = importlib.util.find_spec("torch") is not None
  assert ("torch_max_abs_diff" in report) == torch


def test_the_demo_stops_at_the_first_command_that_fails(tmp_path, capsys):
  spec = importlib.util.spec_from_file_location("demo", DEMO)
  demo = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(demo)
  assert demo.main(str(tmp_path), "--config.stepz=2") == 2
  assert "'steps'" in capsys.readouterr().err
