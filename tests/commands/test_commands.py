"""The commands one after the other on a small run, as a user calls them."""

import json
import os
import pathlib
import re
import signal

import numpy as np
import PIL.Image
import pytest

from flowjax import __main__ as door
from flowjax.train import session

pytestmark = pytest.mark.usefixtures(
  "traced_once", "hashed_by_numpy", "fitted_once"
)

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
SMALL = [
  f"--config={CONFIGS}/digits_dit.py",
  "--config.steps=4",
  "--config.optim.learning_rate=0.05",
  "--config.optim.warmup_steps=0",
  "--config.model.patch_size=4",
  "--config.model.width=16",
  "--config.model.depth=1",
  "--config.model.heads=2",
  "--config.data.batch_size=64",
  "--config.sample.steps=2",
  # One evaluation a step, and not rk4's four.
  "--config.flow.likelihood.solver=euler",
  "--config.log.validation_every=2",
  "--config.log.samples_every=4",
  # As many as are drawn and scored below: one program.
  "--config.log.sample_count=12",
  "--config.log.tensorboard=False",
]


def _flowjax(*words):
  assert door.main(list(map(str, words))) == 0


@pytest.fixture(name="workdir", scope="module")
def _workdir(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("run")
  _flowjax("train", *SMALL, f"--workdir={workdir}")
  return workdir


@pytest.mark.slow
def test_training_leaves_what_the_readme_promises(workdir):
  rows = [json.loads(x) for x in (workdir / "metrics.jsonl").open()]
  validated = {row["step"] for row in rows if "validation_loss" in row}
  assert validated == {2, 4}
  for name in ("config.json", "curves.png", "samples/step_0000004.png"):
    assert (workdir / name).exists(), name
  assert json.loads((workdir / "config.json").read_text())["steps"] == 4


@pytest.mark.slow(1)
def test_a_run_that_is_told_to_stop_ends_with_42(tmp_path, monkeypatch, capsys):
  look = session.Session._look

  def told(self, number, state):
    if number == 1:
      os.kill(os.getpid(), signal.SIGTERM)
    return look(self, number, state)

  monkeypatch.setattr(session.Session, "_look", told)
  assert door.main(["train", *SMALL, f"--workdir={tmp_path}"]) == 42
  assert "SIGTERM: saved at step 1." in capsys.readouterr().err
  assert (tmp_path / "checkpoints/1").exists()


@pytest.mark.slow
def test_samples_are_the_same_however_many_are_drawn(workdir, tmp_path):
  def draw(count, *words):
    out = tmp_path / "grid.png"
    _flowjax(
      "sample", f"--workdir={workdir}", f"--out={out}", f"--num={count}", *words
    )
    return np.asarray(PIL.Image.open(out))

  one, twelve = draw(1, "--seed=5"), draw(12, "--seed=5")
  cell = one.shape[1]
  first = slice(0, cell), slice(0, cell)
  np.testing.assert_array_equal(one[first], twelve[first])
  assert not np.array_equal(one[first], twelve[: one.shape[0]][:, cell:][first])
  assert twelve.shape[0] > one.shape[0]
  # The largest seed there is.
  assert not np.array_equal(one, draw(1, "--seed=4294967295"))
  assert not np.array_equal(one, draw(1, "--seed=5", "--no-ema"))
  assert not np.array_equal(one, draw(1, "--seed=5", "--labels=3"))


@pytest.mark.slow
def test_evaluation_and_export_fill_the_report(workdir, tmp_path):
  pytest.importorskip("torch")
  _flowjax("evaluate", f"--workdir={workdir}", "--num=12")
  out = tmp_path / "exported"
  _flowjax("export", f"--workdir={workdir}", f"--out={out}", "--verify")
  report = json.loads((workdir / "report.json").read_text())
  for key in (
    "parameters",
    "train_seconds",
    "classifier_accuracy",
    "sample_accuracy",
    "frechet",
    "frechet_unguided",
    "frechet_real",
    "nearest_neighbour",
    "torch_max_abs_diff",
  ):
    assert key in report, key
  assert report["classifier_accuracy"] >= 0.97
  assert 0 <= report["torch_max_abs_diff"] <= 1e-5
  assert report["step"] == 4
  # Four steps do not make digits: the judge must see that.
  assert report["sample_accuracy"] < 0.5
  assert report["frechet_unguided"] > 2 * report["frechet_real"]
  assert (workdir / "samples.png").exists()
  assert "Training step: 4" in (out / "README.md").read_text()


def test_describe_counts_parameters_memory_and_flops(capsys):
  _flowjax(
    "describe",
    f"--config={CONFIGS}/imagenet_dit.py:xl_2",
    "--config.mesh.fsdp=8",
  )
  text = capsys.readouterr().out
  assert "blocks/attention/qkv/kernel" in text
  facts = dict(
    re.split(r"  +", line, maxsplit=1)
    for line in text.splitlines()
    if re.match(r"(parameters|state per device)  ", line)
  )
  assert facts["parameters"].startswith("674,")
  # Parameters, EMA and two moments in float32, over eight devices.
  size, unit = facts["state per device"].split()[:2]
  assert unit == "GiB"
  assert float(size) == pytest.approx(674.8e6 * 16 / 8 / 2**30, rel=0.01)


@pytest.mark.slow
def test_bench_writes_its_figures(tmp_path):
  out = tmp_path / "bench.json"
  _flowjax("bench", *SMALL, "--seconds=0.1", f"--json={out}")
  found = json.loads(out.read_text())
  assert found["images_per_second"] > 0
  assert found["share_of_matmul"] > 0
  assert found["batch_size"] == 64


@pytest.mark.slow
def test_every_key_of_sampling_can_be_changed_by_a_flag(workdir, tmp_path):
  def draw(*words):
    out = tmp_path / "grid.png"
    _flowjax("sample", f"--workdir={workdir}", f"--out={out}", *words)
    return np.asarray(PIL.Image.open(out))

  plain = draw("--num=1")
  for words in (
    ["--solver=ddim", "--config.sample.solver.eta=0.5"],
    ["--grid=karras", "--config.sample.grid.sigma_min=0.01"],
    ["--guidance=3", "--config.sample.guidance.name=apg"],
    ["--guidance=3", f"--worse={workdir}"],
  ):
    changed = draw("--num=1", *words)
    assert not np.array_equal(plain, changed), words
  # Guided away from itself, a network says what it says.
  same = draw("--num=1", "--guidance=3", f"--worse={workdir}")
  unguided = draw("--num=1", "--guidance=1")
  assert np.abs(same.astype(int) - unguided).max() <= 1


@pytest.mark.slow
def test_the_likelihood_is_that_of_levels_that_are_given(workdir, capsys):
  words = ["evaluate", f"--workdir={workdir}", "--num=12", "--likelihood"]
  assert door.main(words) == 2
  assert "--levels=17" in capsys.readouterr().err
  _flowjax(*words, "--levels=17", "--likelihood_steps=4")
  coarse = json.loads((workdir / "report.json").read_text())
  _flowjax(*words, "--levels=256", "--likelihood_steps=4")
  fine = json.loads((workdir / "report.json").read_text())
  # The same density, of levels 255 / 16 times as narrow.
  difference = fine["bits_per_dimension"] - coarse["bits_per_dimension"]
  assert difference == pytest.approx(np.log2(255 / 16), abs=0.5)


@pytest.mark.slow
def test_runs_are_compared_in_one_picture_and_table(workdir, tmp_path, capsys):
  nf = tmp_path / "nf"
  _flowjax(
    "train",
    f"--config={CONFIGS}/digits_nf.py",
    f"--workdir={nf}",
    "--config.steps=2",
    "--config.optim.warmup_steps=0",
    "--config.model.width=16",
    "--config.model.depth=2",
    "--config.log.tensorboard=False",
  )
  out = tmp_path / "compare.png"
  _flowjax(
    "compare",
    "--workdirs",
    workdir,
    nf,
    f"--out={out}",
    "--evaluations=2,4",
    "--num=40",
  )
  assert "| nf |" in capsys.readouterr().out
  found = json.loads(out.with_suffix(".json").read_text())
  run, flow = (found["runs"][path.name] for path in (workdir, nf))
  assert run["evaluations"] == [2, 4] and len(run["frechet"]) == 2
  assert flow["evaluations"] == [1] and flow["error"] == []
  # More noise, more error; and never more than that of saying nothing.
  assert run["error"][0] > 10 * run["error"][-1] > 0.0
  assert PIL.Image.open(out).size[0] > 1000
  _flowjax("evaluate", f"--workdir={nf}", "--num=12", "--likelihood")
  report = json.loads((nf / "report.json").read_text())
  assert report["bits_per_dimension"] == pytest.approx(
    report["validation_loss"], rel=0.05
  )


@pytest.mark.slow
def test_a_flow_goes_from_one_set_of_images_to_another(tmp_path):
  random = np.random.default_rng(0)
  for name, level in (("dark", 60), ("light", 200)):
    for label in ("a", "b"):
      folder = tmp_path / name / label
      folder.mkdir(parents=True)
      for i in range(12):
        pixels = random.integers(level - 40, level + 40, (8, 8), np.uint8)
        PIL.Image.fromarray(pixels).save(folder / f"{i}.png")
  workdir, out = tmp_path / "run", tmp_path / "grid.png"
  words = [
    *SMALL,
    f"--workdir={workdir}",
    f"--config.data.source=folder:{tmp_path}/light",
    "--config.data.batch_size=8",
    "--config.data.held_out=0.3",
    "--config.model.num_classes=2",
    "--config.optim.learning_rate=0.01",
    "--config.steps=60",
    "--config.log.validation_every=0",
    "--config.log.samples_every=0",
    "--config.ema.decay=0.9",
  ]
  pair = f"--config.data.pair_source=folder:{tmp_path}/dark"
  assert door.main(["train", *words, pair]) == 2  # Without its coupling.
  _flowjax("train", *words, pair, "--config.flow.coupling.name=pairs")
  rows = [json.loads(x) for x in (workdir / "metrics.jsonl").open()]
  losses = [row["loss"] for row in rows if "loss" in row]
  assert losses[-1] < 0.5 * losses[0]
  _flowjax(
    "sample", f"--workdir={workdir}", f"--out={out}", "--num=10", "--guidance=1"
  )
  # It starts from dark images, and ends with light ones.
  pixels = np.asarray(PIL.Image.open(out))
  shown = pixels[pixels < 255]  # Not the paper.
  assert 170 < shown.mean() < 230
  _flowjax("evaluate", f"--workdir={workdir}")
