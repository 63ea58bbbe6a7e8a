"""The flags of `export`: what is refused, and what `--verify` compares."""

import json

import jax
import numpy as np
import pytest

from flowjax import __main__ as door
from flowjax import models
from flowjax.interop import folder_export
from flowjax.models import dit

pytestmark = pytest.mark.usefixtures("traced_once")

pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

with pytest.MonkeyPatch.context() as patch:
  # A torchvision built for another torch would break an import that a DiT
  # does not need.
  patch.setattr("diffusers.utils.import_utils._torchvision_available", False)
  assert diffusers.DiTTransformer2DModel

CONFIG = dit.DiTConfig(
  image_size=(8, 8),
  channels=1,
  patch_size=4,
  width=16,
  depth=1,
  heads=2,
  num_classes=3,
  position="sincos2d",
  frequency_shift=1.0,
)


def flowjax(*words):
  return door.main([str(word) for word in words])


@pytest.fixture(name="workdir", scope="module")
def _workdir(tmp_path_factory):
  folder = tmp_path_factory.mktemp("export")
  rng = np.random.default_rng(0)
  abstract = jax.eval_shape(models.build(CONFIG).init, jax.random.key(0))
  params = jax.tree.map(
    lambda leaf: 0.1 * rng.standard_normal(leaf.shape, np.float32), abstract
  )
  folder_export.export(params, CONFIG, folder / "a", format="diffusers")
  workdir = folder / "run"
  assert flowjax("import", f"--from={folder}/a", f"--workdir={workdir}") == 0
  return workdir


@pytest.mark.slow
@pytest.mark.parametrize(
  "words, text",
  [
    (["--format=torch", "--max-shard-size=5GB"], "reads one file"),
    (["--format=original", "--verify"], "there is none"),
    (["--format=original"], "frequency_shift = 1.0, there 0.0"),
    (["--format=diffusers", "--max-shard-size=5"], "such as 5GB"),
    (["--format=pickle"], "There are: diffusers, lora"),
  ],
)
def test_what_cannot_be_is_refused_and_nothing_written(
  workdir, tmp_path, capsys, words, text
):
  out = tmp_path / "out"
  given = [f"--workdir={workdir}", f"--out={out}", *words]
  assert flowjax("export", *given) == 2
  assert text in capsys.readouterr().err
  assert not out.exists()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_diffusers_says_the_same_and_the_report_that_it_does(
  workdir, tmp_path, dtype
):
  words = [f"--workdir={workdir}", "--format=diffusers", f"--dtype={dtype}"]
  assert flowjax("export", *words, f"--out={tmp_path}/b", "--verify") == 0
  report = json.loads((workdir / "report.json").read_text())
  assert 0 < report["diffusers_max_abs_diff"] <= 2e-5
  assert report["step"] == 0


@pytest.mark.slow
def test_an_export_in_another_format_is_not_replaced(workdir, tmp_path, capsys):
  words = ["export", f"--workdir={workdir}", f"--out={tmp_path}/b"]
  assert flowjax(*words, "--format=diffusers") == 0
  assert flowjax(*words, "--format=torch") == 2
  assert "no earlier export" in capsys.readouterr().err
  assert flowjax(*words, "--format=diffusers", "--dtype=float16") == 0
