"""An autoencoder by the commands: trained, scored, exported, imported."""

import json

import jax
import numpy as np
import pytest

from flowjax import __main__ as door
from flowjax.commands import latents, restored
from flowjax.data import digits as data_digits
from flowjax.data import sources
from flowjax.interop import vae
from flowjax.models import autoencoder, vq

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

SMALL = [
  "--config.steps=3",
  "--config.optim.warmup_steps=1",
  "--config.model.widths=(8,8)",
  "--config.model.groups=4",
  "--config.log.tensorboard=False",
  "--config.data.batch_size=32",
]
ALL = [
  "--config.reconstruction.adversary.weight=0.5",
  "--config.reconstruction.adversary.start=1",
  "--config.reconstruction.adversary.width=4",
  "--config.reconstruction.adversary.layers=1",
]


def flowjax(*words):
  return door.main([str(word) for word in words])


def config_of(workdir):
  return json.loads((workdir / "config.json").read_text())


@pytest.fixture(name="workdir", scope="module")
def _workdir(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("autoencoder") / "run"
  config = "--config=configs/digits_autoencoder.py:vq_ema"
  assert flowjax("train", config, f"--workdir={workdir}", *SMALL, *ALL) == 0
  return workdir


@pytest.mark.slow
def test_it_is_trained_and_scored(workdir, capsys):
  assert (workdir / "samples/step_0000003.png").exists()
  assert flowjax("evaluate", f"--workdir={workdir}") == 0
  report = json.loads((workdir / "report.json").read_text())
  assert 0 < report["validation_loss"] < 4
  assert 0 < report["validation_psnr"] < 40
  assert report["validation_codes_in_use"] >= 1
  assert (workdir / "reconstructions.png").exists()
  assert "validation_psnr" in capsys.readouterr().out


@pytest.mark.slow
def test_its_folder_is_loaded_by_diffusers_and_read_again(
  workdir, tmp_path, capsys
):
  out, again = tmp_path / "vae", tmp_path / "again"
  words = [f"--workdir={workdir}", "--format=diffusers", f"--out={out}"]
  assert flowjax("export", *words, "--verify") == 0
  said = capsys.readouterr().out
  assert "scaling_factor = " in said and "Largest difference" in said
  theirs, info = diffusers.VQModel.from_pretrained(
    out, output_loading_info=True, low_cpu_mem_usage=False
  )
  assert not any(info.values())
  # Scaled, latents have the spread that was promised.
  config, params = vae.open(out)
  assert config.scaling_factor == theirs.config.scaling_factor != 1.0
  assert set(params) == {
    "encoder", "decoder", "quant_conv", "post_quant_conv", "codebook"
  }  # fmt: skip
  images = data_digits.open(restored.open(workdir).config.data, "train")
  z = vq.latents(config, params, images.image_NHWC[:1024])
  np.testing.assert_allclose(config.scaling_factor * z.std(), 1.0, rtol=1e-3)
  words = [f"--from={out}", f"--workdir={again}", "--config.steps=5"]
  assert flowjax("import", *words) == 0
  assert config_of(again)["model"]["scaling_factor"] == config.scaling_factor
  second = tmp_path / "second"
  words = [f"--workdir={again}", "--format=diffusers", f"--out={second}"]
  assert flowjax("export", *words) == 0
  weights = "diffusion_pytorch_model.safetensors"
  for name in (weights, "config.json"):
    assert (second / name).read_bytes() == (out / name).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(
  ("words", "text"),
  [
    (["sample"], "nothing in it to sample"),
    (["evaluate", "--likelihood"], "to find the likelihood of"),
    (["evaluate", "--steps=3"], "--steps would be without effect"),
    (["export", "--out=OUT"], "no format 'torch'"),
    (
      ["export", "--format=diffusers", "--pipeline=OUT", "--out=OUT"],
      "--pipeline=",
    ),
    (["compare"], "nothing in it to compare"),
  ],
)
def test_what_it_cannot_do_is_refused(workdir, tmp_path, capsys, words, text):
  command, *rest = [word.replace("OUT", str(tmp_path / "x")) for word in words]
  where = [f"--workdir={workdir}"]
  if command == "compare":
    where = ["--workdirs", workdir, workdir, f"--out={tmp_path / 'x.png'}"]
  if command == "sample":
    where += [f"--out={tmp_path / 'x.png'}"]
  assert flowjax(command, *where, *rest) == 2
  assert text in capsys.readouterr().err


@pytest.mark.slow
def test_a_perceptual_loss_needs_its_file(tmp_path, capsys):
  words = ["--config=configs/digits_autoencoder.py", *SMALL]
  words += ["--config.reconstruction.perceptual.weight=1.0"]
  words += ["--config.reconstruction.perceptual.file=nowhere.safetensors"]
  assert flowjax("train", *words, f"--workdir={tmp_path / 'run'}") == 2
  said = capsys.readouterr().err
  assert "nowhere.safetensors" in said and "perceptual.weight=0.0" in said


@pytest.mark.slow
def test_the_scale_is_that_of_drawn_latents(tmp_path):
  """A KL autoencoder's, imported: its own scale stays, until it is trained."""
  config = autoencoder.AutoencoderConfig(
    image_size=(8, 8), channels=1, widths=(8, 8), depth=1, groups=4,
    scaling_factor=0.5, shift_factor=0.25,
  )  # fmt: skip
  params = autoencoder.init(config, jax.random.key(0))
  # Means and deviations of different size, so that both count.
  params["quant_conv"]["kernel"] *= 8.0
  vae.write(tmp_path / "vae", config, jax.tree.map(np.asarray, params))
  workdir = tmp_path / "run"
  assert flowjax(
    "import", f"--from={tmp_path / 'vae'}", f"--workdir={workdir}"
  ) == 0  # fmt: skip
  found = restored.open(workdir)
  seen = latents.measure(found)
  source = sources.open(found.config.data, "train")
  images = np.stack([source[i]["image"] for i in range(seen.images)])
  moments = autoencoder.encode(config, params, images)
  z = autoencoder.sample(*moments, jax.random.key(1))
  assert seen.images == 1024
  np.testing.assert_allclose(seen.mean, z.mean(), atol=0.05)
  np.testing.assert_allclose(seen.spread, z.std(), rtol=0.02)
  assert z.std() > 1.1 * moments[0].std()
  out = tmp_path / "out"
  words = [f"--workdir={workdir}", "--format=diffusers", f"--out={out}"]
  assert flowjax("export", *words) == 0
  assert vae.open(out)[0] == config
