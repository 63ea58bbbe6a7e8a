"""Adapters by commands: born beside imported weights, trained, out and in."""

import json
import pathlib

import jax
import numpy as np
import pytest
import safetensors.numpy

from flowjax import __main__ as door
from flowjax import models
from flowjax.commands import restored
from flowjax.interop import folder_export, lora
from flowjax.models import dit
from flowjax.models import lora as adapters

pytestmark = pytest.mark.usefixtures("traced_once", "hashed_by_numpy")

CONFIG = [
  f"--config={pathlib.Path(__file__).parents[2]}/configs/digits_dit.py",
  "--config.steps=2",
  "--config.optim.warmup_steps=0",
  "--config.data.batch_size=8",
  "--config.log.validation_every=0",
  "--config.log.samples_every=0",
  "--config.log.tensorboard=False",
]
MODEL = dit.DiTConfig(
  image_size=(8, 8),
  channels=1,
  patch_size=4,
  width=16,
  depth=2,
  heads=2,
  num_classes=10,
  position="sincos2d",
  frequency_shift=1.0,
)


def flowjax(*words):
  return door.main([str(word) for word in words])


@pytest.fixture(name="base", scope="module")
def _base(tmp_path_factory):
  """Returns a folder with weights for diffusers, none of them zero."""
  rng = np.random.default_rng(0)
  params = jax.tree.map(
    lambda leaf: 0.2 * rng.standard_normal(leaf.shape, np.float32),
    jax.eval_shape(models.build(MODEL).init, jax.random.key(0)),
  )
  folder = tmp_path_factory.mktemp("base") / "base"
  folder_export.export(params, MODEL, folder, format="diffusers")
  return folder


def weights(folder):
  return safetensors.numpy.load_file(
    folder / "diffusion_pytorch_model.safetensors"
  )


@pytest.mark.slow
def test_adapters_of_imported_weights_train_and_go_out(base, tmp_path, capsys):
  run, out, merged = (tmp_path / name for name in ("run", "out", "merged"))
  words = ["--config.lora.rank=2", "--config.lora.alpha=4"]
  assert flowjax(
    "import", *CONFIG, f"--from={base}", f"--workdir={run}", *words
  ) == 0  # fmt: skip
  assert "drawn anew: lora/blocks/attention/out" in capsys.readouterr().out
  saved = run / "config.json"
  assert flowjax("train", f"--config={saved}", f"--workdir={run}") == 0
  for format, folder in (("lora", out), ("diffusers", merged)):
    words = [f"--workdir={run}", f"--format={format}", f"--out={folder}"]
    assert flowjax("export", *words) == 0

  # In closed form: the base, and alpha / rank B A.
  factors = safetensors.numpy.load_file(out / lora.FILE)
  before, after = weights(base), weights(merged)
  changed = {
    key for key in after if not np.array_equal(after[key], before[key])
  }
  modules = {key.partition(".lora_")[0] for key in factors}
  prefix = "transformer."
  assert changed == {m.removeprefix(prefix) + ".weight" for m in modules}
  assert len(changed) == 2 * 4
  for module in modules:
    product = (
      factors[f"{module}.lora_B.weight"] @ (factors[f"{module}.lora_A.weight"])
    )
    key = module.removeprefix(prefix) + ".weight"
    np.testing.assert_allclose(
      after[key], before[key] + 2.0 * product, atol=1e-6
    )

  # The same adapters beside the same weights are the same run.
  again, second = tmp_path / "again", tmp_path / "second"
  words = [f"--from={base}", f"--lora={out}", f"--workdir={again}"]
  assert flowjax("import", *CONFIG, *words) == 0
  told = json.loads((again / "config.json").read_text())["lora"]
  assert (told["rank"], told["alpha"]) == (2, 4.0)
  words = [f"--workdir={again}", "--format=lora", f"--out={second}"]
  assert flowjax("export", *words) == 0
  ours, theirs = (folder / lora.FILE for folder in (out, second))
  assert ours.read_bytes() == theirs.read_bytes()

  # Another run begins from this one, of which it has the merged weights.
  third = tmp_path / "third"
  words = [f"--from={again}", f"--workdir={third}", "--config.lora.rank=3"]
  assert flowjax("import", *words) == 0
  found, begun = (restored.open(path) for path in (again, third))
  assert begun.config.lora.rank == 3
  wanted = adapters.merged(found.config.lora, found.params)
  kept = {key: begun.params[key] for key in wanted}
  assert jax.tree.all(jax.tree.map(np.array_equal, kept, wanted))
  wrong = [f"--from={again}", f"--workdir={tmp_path / 'fourth'}"]
  assert flowjax("import", *wrong, "--config.model.depth=1") != 0
  assert "is a run of another network" in capsys.readouterr().err
  assert not (tmp_path / "fourth").exists()


@pytest.mark.slow
def test_what_has_no_meaning_is_refused(base, tmp_path, capsys):
  run = tmp_path / "run"
  words = [*CONFIG, f"--from={base}", f"--workdir={run}"]
  more = ["--config.lora.rank=2", f"--lora={tmp_path}"]
  assert flowjax("import", *words, *more) != 0
  assert "Leave config.lora as it is" in capsys.readouterr().err
  assert flowjax("import", *words) == 0
  words = [f"--workdir={run}", "--format=lora", f"--out={tmp_path / 'out'}"]
  assert flowjax("export", *words) != 0
  assert "has no adapters to export" in capsys.readouterr().err
  assert flowjax("export", *words, "--verify") != 0
  assert "compared, merged" in capsys.readouterr().err
  assert not (tmp_path / "out").exists()


def test_describe_says_what_is_trained(capsys):
  def said(*words):
    assert flowjax("describe", *CONFIG, *words) == 0
    out = capsys.readouterr().out
    rows = [line.rsplit("  ", 1) for line in out.splitlines() if "  " in line]
    return {name.strip(): value.strip() for name, value in rows}

  plain, adapted = said(), said("--config.lora.rank=2")
  assert "of which trained" not in plain
  count = int(adapted["of which trained"].replace(",", ""))
  assert count == int(adapted["parameters"].replace(",", "")) - int(
    plain["parameters"].replace(",", "")
  )

  def size(rows, name):
    number, unit = rows[name].split()[:2]
    return float(number) * 1024 ** ("B", "KiB", "MiB").index(unit)

  for name in ("state per device", "gradients per device"):
    assert size(adapted, name) < 0.4 * size(plain, name), name
