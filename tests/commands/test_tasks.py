"""What is shown and scored of a run that is told of images, and imported."""

# Shape suffixes: N images, H height, W width, C channels.

import pathlib
import types

import jax
import numpy as np
import PIL.Image
import pytest

from flowjax import __main__ as door
from flowjax.commands import configs, drawing, restored, tasked
from flowjax.interop import torch_export
from flowjax.train import parts, tasks

pytestmark = pytest.mark.usefixtures(
  "traced_once", "hashed_by_numpy", "fitted_once"
)

INPAINTING = f"{pathlib.Path(__file__).parents[2]}/configs/digits_inpainting.py"
SMALL = [
  "--config.model.patch_size=4",
  "--config.model.width=16",
  "--config.model.depth=1",
  "--config.model.heads=2",
  "--config.data.batch_size=16",
  "--config.mesh.data=1",
  "--config.mesh.fsdp=-1",
  "--config.sample.steps=2",
]
LOWERED = [
  "--config.task.name=super_resolution",
  "--config.task.factor=2",
  "--config.model.context_channels=1",
]


def untrained(*words):
  run = parts.build(configs.load(INPAINTING, [*SMALL, *words]))
  rng = np.random.default_rng(0)
  params = jax.tree.map(
    lambda leaf: 0.3 * rng.standard_normal(leaf.shape).astype(np.float32),
    run.abstract.params,
  )
  return restored.Restored(pathlib.Path("run"), run, 0, params, {})


@pytest.mark.slow(1)
def test_sample_shows_held_out_images_and_what_is_told(tmp_path, monkeypatch):
  plain, told = untrained(), []

  def draw(images, cond):
    told.append(cond)
    return -images

  found = drawing_by(plain, draw)
  monkeypatch.setattr(restored, "open", lambda *args, **options: found)
  out = tmp_path / "grid.png"
  words = ["sample", "--workdir=run", f"--out={out}", "--num=3"]
  assert not door.main([*words, "--labels=7"]) and not door.main(words)
  sheet = np.asarray(PIL.Image.open(out))
  images, cond = drawing.held_out(found.run, 3)
  assert sorted(cond) == ["context", "label"]
  for each, label_N in zip(told, ([7, 7, 7], cond["label"]), strict=True):
    np.testing.assert_array_equal(each["label"], label_N)
    np.testing.assert_array_equal(each["context"], cond["context"])
  # Three images of 8x8 and a gap of white between, each pixel of 4x4.
  first = sheet[2:34, 2:114].reshape(8, 4, 28, 4, 3)[:, 0, :, 0, 0]
  shown = (first / 127.5 - 1.0)[..., None]
  np.testing.assert_allclose(shown[:, :8], images[0], atol=0.01)
  np.testing.assert_allclose(
    shown[:, 9:17], cond["context"][0, ..., 1:], atol=0.01
  )
  np.testing.assert_allclose(shown[:, 18:26], -images[0], atol=0.01)
  assert (first[:, [8, 17, 26, 27]] == 255).all()


@pytest.mark.slow(1)
def test_sample_draws_by_the_network_of_a_task():
  found = untrained()
  cond = drawing.conditions(found.run, 2)
  one = found.draw(cond, seed=0)
  other = found.draw({**cond, "context": -cond["context"]}, seed=0)
  assert one.shape == (2, 8, 8, 1) and np.abs(one - other).max() > 1e-3


def drawing_by(found, draw, directory=pathlib.Path("run")):
  """Returns the run as one that draws `draw(images, cond)`, and no network."""

  class Drawn(restored.Restored):
    def draw(self, cond, **options):
      images, _ = drawing.held_out(found.run, len(cond["context"]))
      return draw(images, cond)

  return Drawn(directory, found.run, 0, found.params, {})


def scores(found, draw, monkeypatch, directory):
  """Returns the report of a run that draws `draw(images, cond)`."""
  found = drawing_by(found, draw, directory)
  monkeypatch.setattr(tasked, "_judge", lambda *args: None)
  args = types.SimpleNamespace(num=12, seed=0)
  return tasked.evaluate(found, found.config.sample, args)


@pytest.mark.slow(1)
def test_holes_are_scored_apart_from_what_is_around_them(monkeypatch, tmp_path):
  found = untrained()

  def perfect_outside(images, cond):
    hole = cond["context"][..., :1] > 0.5
    return np.where(hole, images + 0.5, images)

  report = scores(found, perfect_outside, monkeypatch, tmp_path)
  assert report["samples"] == 12
  scored = report["inpainting"]
  assert scored["hole"] == pytest.approx(0.5) and scored["outside"] == 0.0
  assert 0.05 < scored["share"] < 0.9 and scored["hole_filled_grey"] > 0.5
  assert (tmp_path / "samples.png").exists()


def test_larger_images_are_scored_at_both_sizes(monkeypatch, tmp_path):
  found = untrained(*LOWERED)

  def moved(images, cond):
    # By 0.2, and in each square by plus and minus 0.1, that no mean sees.
    signs = np.tile([[0.1], [-0.1]], (4, 8))[None, :, :, None]
    return images + 0.2 + signs

  scored = scores(found, moved, monkeypatch, tmp_path)["super_resolution"]
  error = np.sqrt(0.2**2 + 0.1**2)
  assert scored["psnr"] == pytest.approx(20 * np.log10(2 / error), abs=1e-4)
  assert scored["consistency"] == pytest.approx(0.2, abs=1e-5)
  assert scored["consistency_bilinear"] < 0.3
  assert 5 < scored["psnr_bilinear"] < scored["psnr"] + 20


def test_errors_of_latents_are_called_so(monkeypatch, tmp_path):
  for i in range(8):
    np.save(tmp_path / f"{i}.npy", np.full((8, 8, 4), i, np.float32))
  found = untrained(
    *LOWERED,
    "--config.model.num_classes=0",
    "--config.model.context_channels=4",
    "--config.model.channels=4",
    "--config.sample.guidance.scale=1",
    f"--config.data.source=folder:{tmp_path}",
    "--config.data.images_alone=True",
    "--config.data.held_out=0.5",
    "--config.data.channels=4",
    "--config.data.batch_size=8",
  )
  report = scores(found, lambda images, cond: images, monkeypatch, tmp_path)
  assert "super_resolution" not in report
  scored = report["super_resolution_of_latents"]
  assert sorted(scored) == ["consistency", "consistency_bilinear"]


@pytest.mark.slow(1)
def test_scenes_in_buckets_are_judged_at_the_reference(tmp_path):
  found = untrained(
    *LOWERED,
    "--config.model.num_classes=0",
    "--config.sample.guidance.scale=1",
    "--config.data.source=scenes",
    "--config.data.images_alone=True",
    "--config.data.buckets=((32, 32), (34, 48))",
    "--config.model.patch_size=2",
    "--config.model.context_channels=3",
    *(
      f"--config.{group}.{key}"
      for group in ("data", "model")
      for key in ("image_size=(34, 48)", "channels=3")
    ),
  )
  found = drawing_by(found, lambda images, cond: images, tmp_path)
  args = types.SimpleNamespace(num=3, seed=0, judge_steps=1)
  report = tasked.evaluate(found, found.config.sample, args)
  assert report["judge_of_drawn"] == report["judge_of_held_out"]
  assert report["super_resolution"]["consistency"] == 0.0


@pytest.mark.slow
def test_weights_of_a_network_without_begin_one_that_is_told(tmp_path):
  run = untrained(
    "--config.task.name=none", "--config.model.context_channels=0"
  )
  torch_export.export(run.params, run.config.model, tmp_path / "plain")
  words = ["--config.task.name=inpainting", "--config.data.batch_size=8"]
  assert not door.main(
    ["import", f"--from={tmp_path / 'plain'}", f"--workdir={tmp_path / 'run'}"]
    + [*words, "--config.model.context_channels=2"]
  )
  found = restored.open(tmp_path / "run")
  assert found.config.task == tasks.TaskConfig("inpainting")
  rng = np.random.default_rng(1)
  x_NHWC = rng.standard_normal((2, 8, 8, 1), np.float32)
  t_N, label_N = np.array([0.2, 0.8], np.float32), np.array([3, 10])
  told = {"label": label_N, "context": np.ones((2, 8, 8, 2), np.float32)}
  both = (found, told), (run, {"label": label_N})
  np.testing.assert_allclose(
    *(
      jax.jit(each.run.network.apply)(each.params, x_NHWC, t_N, cond)
      for each, cond in both
    ),
    rtol=0,
    atol=1e-5,
  )
