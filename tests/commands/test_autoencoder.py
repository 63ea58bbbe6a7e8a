"""An autoencoder by the commands: trained, scored, exported, imported."""

import json

import jax
import numpy as np
import pytest

from flowjax import __main__ as door
from flowjax.commands import latents, restored
from flowjax.data import config as data_config
from flowjax.data import digits as data_digits
from flowjax.interop import vae
from flowjax.models import autoencoder, vq
from flowjax.train import experiment, parts

pytestmark = pytest.mark.usefixtures(
  "on_one_device", "traced_once", "hashed_by_numpy"
)

SMALL = [
  "--config.steps=3",
  "--config.optim.warmup_steps=1",
  "--config.model.widths=(8,)",
  "--config.model.middle_attention=False",
  "--config.model.groups=4",
  "--config.log.tensorboard=False",
  "--config.data.batch_size=32",
  # The mesh of a run that is only read, so that its programs are the same.
  "--config.mesh.data=1",
  "--config.mesh.fsdp=-1",
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
  pytest.importorskip("torch")
  diffusers = pytest.importorskip("diffusers")
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
  encode = jax.jit(lambda x: vq.latents(config, params, x))
  z = np.asarray(encode(images.image_NHWC[:1024]))
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


@pytest.fixture(name="found", scope="module")
def _found(workdir):
  return restored.open(workdir)


@pytest.mark.slow(1)
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
def test_what_it_cannot_do_is_refused(
  workdir, found, tmp_path, capsys, monkeypatch, words, text
):
  # What is refused is refused once the run is known, and that takes a second.
  monkeypatch.setattr(restored, "open", lambda *_, **__: found)
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


@pytest.mark.slow(1)
def test_the_scale_is_that_of_drawn_latents(tmp_path):
  """Of a KL autoencoder: what means and variances together spread."""
  model = autoencoder.AutoencoderConfig(
    image_size=(8, 8), channels=1, widths=(8,), depth=1, groups=4,
    middle_attention=False, shift_factor=0.25,
  )  # fmt: skip
  config = experiment.Experiment(
    model=model, data=data_config.DataConfig(batch_size=512)
  )
  run = parts.build(config)
  params = jax.jit(run.network.init)(jax.random.key(0))
  # Means and deviations of different size, so that both count.
  params["quant_conv"]["kernel"] *= 8.0
  found = restored.Restored(tmp_path, run, 1, params, {})
  seen = latents.measure(found)
  images_NHWC = data_digits.open(config.data, "train").image_NHWC[:1024]

  @jax.jit
  def drawn(x_BHWC):
    moments = autoencoder.encode(model, params, x_BHWC)
    return autoencoder.sample(*moments, jax.random.key(1)), moments[0]

  z, mean = map(np.asarray, drawn(images_NHWC))
  assert seen.images == 1024
  np.testing.assert_allclose(seen.mean, z.mean(), atol=0.02)
  np.testing.assert_allclose(seen.spread, z.std(), rtol=0.01)
  assert z.std() > 1.1 * mean.std()
