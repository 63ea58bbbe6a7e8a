"""A network that is told nothing, from its training to its export."""

import json
import pathlib

import jax
import numpy as np
import PIL.Image
import pytest

from flowjax import __main__ as door
from flowjax.commands import configs, drawing, evaluate, restored
from flowjax.train import parts

pytestmark = pytest.mark.usefixtures(
  "on_one_device", "traced_once", "hashed_by_numpy", "fitted_once"
)

CONFIG = f"{pathlib.Path(__file__).parents[2]}/configs/digits_unconditional.py"
TINY = [
  f"--config={CONFIG}",
  "--config.steps=2",
  "--config.optim.warmup_steps=0",
  "--config.model.patch_size=4",
  "--config.model.width=16",
  "--config.model.depth=1",
  "--config.model.heads=2",
  "--config.model.position=sincos2d",
  "--config.model.frequency_shift=1",
  "--config.data.batch_size=64",
  "--config.sample.steps=2",
  "--config.log.validation_every=2",
  "--config.log.samples_every=2",
  # As many as are drawn below: one program.
  "--config.log.sample_count=9",
  "--config.log.tensorboard=False",
]


def flowjax(*words):
  return door.main(list(map(str, words)))


@pytest.fixture(name="run", scope="module")
def _run(tmp_path_factory):
  folder = tmp_path_factory.mktemp("run")
  assert flowjax("train", *TINY, f"--workdir={folder}") == 0
  return folder


@pytest.mark.slow
def test_it_is_sampled_without_a_condition(run, tmp_path, capsys):
  assert (run / "samples/step_0000002.png").exists()
  out = tmp_path / "out.npy"
  words = "sample", f"--workdir={run}", f"--out={out}"
  assert flowjax(*words, "--num=9") == 0
  found = np.load(out)
  assert found.shape == (9, 8, 8, 1)
  assert np.abs(found[0] - found[1]).max() > 0.1
  assert flowjax(*words, "--num=9", "--invert") == 0
  for word, text in (
    ("--labels=3", "this network is told nothing"),
    ("--prompt=a", "it is told nothing"),
    ("--guidance=2", "no condition to guide towards: set 1.0"),
  ):
    assert flowjax(*words, word) == 2
    assert text in capsys.readouterr().err


@pytest.mark.slow
def test_it_is_scored_by_what_asks_for_no_class(run):
  assert flowjax("evaluate", f"--workdir={run}") == 0
  report = json.loads((run / "report.json").read_text())
  assert 1.0 <= report["classes"] <= 10.0
  assert report["frechet_unguided"] > report["frechet_real"]
  assert "sample_accuracy" not in report
  assert report["samples"] > 1000
  assert np.isfinite(report["validation_loss"])


@pytest.mark.slow
@pytest.mark.parametrize("format", ["torch", "diffusers"])
def test_it_goes_to_others_and_comes_back(run, tmp_path, format):
  pytest.importorskip(format)
  out, back = tmp_path / "out", tmp_path / "back"
  words = "export", f"--workdir={run}", f"--out={out}", "--verify"
  assert flowjax(*words, f"--format={format}") == 0
  words = "import", f"--from={out}", f"--config={CONFIG}"
  assert flowjax(*words, f"--workdir={back}") == 0
  grids = []
  for folder in (run, back):
    words = "--num=4", "--steps=3", "--solver=euler", f"--out={out}.npy"
    assert flowjax("sample", f"--workdir={folder}", *words) == 0
    grids.append(np.load(f"{out}.npy"))
  np.testing.assert_allclose(*grids, atol=1e-5)


def test_scenes_of_which_it_is_told_nothing_have_no_judge(tmp_path):
  words = [
    "--config.data.source=scenes",
    "--config.data.images_alone=True",
    "--config.data.image_size=(32, 32)",
    "--config.data.channels=3",
    "--config.model.image_size=(32, 32)",
    "--config.model.channels=3",
    "--config.model.patch_size=16",
  ]
  run = parts.build(configs.load(CONFIG, [*TINY[1:], *words]))
  found = restored.Restored(tmp_path, run, 0, {}, {})
  assert evaluate._scores(found, run.experiment.sample, None) == {}


def test_it_is_described(capsys):
  assert flowjax("describe", *TINY) == 0
  assert "parameters" in capsys.readouterr().out


@pytest.mark.slow(1)
@pytest.mark.parametrize("told", [{}, {"num_classes": 2}])
def test_it_may_be_told_sizes_and_nothing_else(told, tmp_path):
  for i in range(4):
    place = tmp_path / "ab"[i % 2]
    place.mkdir(exist_ok=True)
    PIL.Image.new("L", (8, 12)).save(place / f"{i}.png")
  words = [
    f"--config.data.source=folder:{tmp_path}",
    "--config.data.originals=True",
    f"--config.data.images_alone={not told}",
    "--config.data.batch_size=8",
    "--config.model.size_conditioning=True",
    *(f"--config.model.{key}={value}" for key, value in told.items()),
  ]
  run = parts.build(configs.load(CONFIG, [*TINY[1:], *words]))
  params = jax.tree.map(lambda x: np.zeros(x.shape), run.abstract.params)
  found = restored.Restored(tmp_path, run, 0, params, {})
  cond = drawing.conditions(run, 3)
  assert set(cond) == ({"label"} if told else set())
  assert not drawing.reads_text(run.network)
  assert found.draw(cond, seed=0, count=3).shape == (3, 8, 8, 1)
