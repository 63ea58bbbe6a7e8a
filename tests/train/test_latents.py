"""Latents are sampled and texts dropped in the loss, by its rng alone."""

import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowjax import __main__ as door
from flowjax import errors
from flowjax.commands import bench, drawing, restored
from flowjax.data import (
  archive,
  archive_writing,
  embeddings,
  records,
)
from flowjax.data import config as data_config
from flowjax.models import conditions
from flowjax.parallel import mesh as meshes
from flowjax.parallel import placing
from flowjax.train import experiment, latents, loop

pytestmark = pytest.mark.usefixtures("traced_once")

SHAPE = (4, 4, 2)
TEXTS = embeddings.Texts(
  4,
  6,
  4,
  True,
  (
    embeddings.Part("a", (0, 2), (0, 3), (0, 1)),
    embeddings.Part("b", (0, 2), (3, 5), (1, 4)),
    embeddings.Part("c", (2, 4), (0, 6), None),
  ),
)
# The embedded empty caption: 7 wherever an encoder speaks.
EMPTY = np.full((4, 6), 7.0)
EMPTY[:2, 5] = 0.0
SD3 = (0.463, 0.463, 0.463)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  """Latents with embedded texts, and the empty caption."""
  folder = tmp_path_factory.mktemp("latents")
  layout = records.Layout(
    (
      records.Field("index", "int64"),
      records.Field("mean", "float16", SHAPE),
      records.Field("log_variance", "float16", SHAPE),
      *TEXTS.fields("bfloat16"),
    ),
    captioned=True,
  )
  about = {"shape": list(SHAPE), "class_names": [], "texts": TEXTS.to_json(),
           "frozen": None, "data": {}}  # fmt: skip
  plan = archive.Plan(layout, {"train": 40, "held_out": 9}, 16, about)
  archive_writing.begin(folder, plan)
  rng = np.random.default_rng(0)

  def pack(numbers, fill=None):
    count = len(numbers)
    values = {
      f.name: rng.standard_normal((count, *f.shape))
      if fill is None
      else np.full((count, *f.shape), fill)
      for f in layout.fields
    }
    values |= {"index": np.asarray(numbers), "text_mask": np.ones((count, 4))}
    if fill is not None:
      values["text_mask"] = np.zeros((count, 4))
    return layout.pack(values, ["a caption"] * count)

  archive_writing.write_empty(folder, pack([0], 7.0)[0])
  for split, shard in plan.shards():
    with archive_writing.writing(folder, split, shard) as writer:
      writer.write(pack(plan.numbers(split, shard)))
  archive_writing.finish(folder, plan)
  return data_config.DataConfig(
    source=f"arrayrecord:{folder}", image_size=SHAPE[:2], channels=2,
    batch_size=8,
  )  # fmt: skip


def batch_of(count=8):
  rng = np.random.default_rng(1)
  return {
    "mean": rng.standard_normal((count, *SHAPE)).astype(np.float16),
    "log_variance": np.full((count, *SHAPE), -2.0, np.float16),
    "text": rng.standard_normal((count, 4, 6)).astype(jnp.bfloat16),
    "pooled": rng.standard_normal((count, 4)).astype(jnp.bfloat16),
    "text_mask": np.ones((count, 4), bool),
  }


def seen(params, batch, rng):
  """A loss that tells what it is given."""
  return jnp.zeros(()), batch


def test_latents_are_sampled_from_their_law():
  batch = batch_of(4000)
  found = jax.jit(latents.sampled)(batch, jax.random.key(0))
  mean = batch["mean"].astype(np.float32)
  z = (np.asarray(found["image"]) - mean) / np.exp(-1.0)
  assert found["image"].dtype == jnp.float32 and "mean" not in found
  np.testing.assert_allclose(z.mean(), 0.0, atol=0.01)
  np.testing.assert_allclose(z.std(), 1.0, atol=0.01)
  assert abs(np.mean(z[:, 0, 0, 0] * z[:, 0, 0, 1])) < 0.06
  plain = latents.sampled(batch, None)
  np.testing.assert_array_equal(plain["image"], mean)


def test_each_encoder_is_dropped_by_itself(data):
  config = latents.EncodedConfig(text_dropout=SD3)
  loss = jax.jit(latents.training(config, data, seen))
  batch = batch_of(4000)
  _, found = loss(None, batch, jax.random.key(0))
  text = batch["text"].astype(np.float32)
  gone = np.asarray(found["text"]) == 7.0
  pooled = np.asarray(found["pooled"]) == 7.0
  # What changes is the box of an encoder, whole, and what none has stays.
  a, b, c = gone[:, 0, 0], gone[:, 0, 3], gone[:, 2, 0]
  for part, drop in zip(TEXTS.parts, (a, b, c), strict=True):
    box = gone[:, slice(*part.tokens), slice(*part.columns)]
    assert (box == drop[:, None, None]).all()
    if part.pooled:
      assert (pooled[:, slice(*part.pooled)] == drop[:, None]).all()
  kept = np.where(gone, text, np.asarray(found["text"]))
  np.testing.assert_array_equal(kept, text)
  # A token is padding, as the empty caption has it, once nobody speaks there.
  mask = np.asarray(found["text_mask"])
  np.testing.assert_array_equal(mask[:, 0], ~(a & b))
  np.testing.assert_array_equal(mask[:, 3], ~c)
  for drop in (a, b, c):
    np.testing.assert_allclose(drop.mean(), 0.463, atol=0.03)
  np.testing.assert_allclose((a & b & c).mean(), 0.463**3, atol=0.02)
  np.testing.assert_allclose((a & ~b).mean(), 0.463 * 0.537, atol=0.03)
  # One probability is that of all; none is none, and so is an evaluation's.
  one = latents.EncodedConfig(text_dropout=(0.9,))
  assert one.rates(TEXTS) == (0.9,) * 3
  for quiet in (
    latents.training(latents.EncodedConfig(), data, seen),
    latents.evaluation(config, data, seen),
  ):
    _, found = jax.jit(quiet)(None, batch_of(), jax.random.key(0))
    np.testing.assert_array_equal(
      found["text"], batch_of()["text"].astype(np.float32)
    )


def test_what_an_example_receives_is_the_same_on_every_mesh(data):
  config = latents.EncodedConfig(text_dropout=SD3)
  loss = jax.jit(latents.training(config, data, seen))
  _, want = loss(None, batch_of(), jax.random.key(3))
  mesh = meshes.build(meshes.MeshConfig(data=4, fsdp=2))
  placed = placing.put_whole(mesh)(batch_of())
  with meshes.use(mesh):
    _, found = loss(None, placed, jax.random.key(3))
  for a, b in zip(jax.tree.leaves(want), jax.tree.leaves(found), strict=True):
    np.testing.assert_array_equal(a, b)
  _, other = loss(None, batch_of(), jax.random.key(4))
  assert not np.array_equal(want["image"], other["image"])


def test_no_text_is_the_empty_caption(data):
  """All at once, as `condition_dropout` does it, and in guidance."""
  config = types.SimpleNamespace(
    num_classes=0, condition_dropout=0.5, text_width=6
  )
  quiet = latents.evaluation(latents.EncodedConfig(), data, seen)

  @jax.jit
  def dropped(batch):
    _, batch = quiet(None, batch, jax.random.key(0))
    return conditions.dropped(config, batch, jax.random.key(1))

  found = dropped(batch_of())
  drop = np.asarray(found["pooled"])[:, 0] == 7.0
  assert 0 < drop.sum() < 8
  np.testing.assert_array_equal(
    (np.asarray(found["text"]) == EMPTY).all(axis=(1, 2)), drop
  )
  cond = {key: batch_of()[key] for key in ("text", "pooled")}
  told = latents.with_negative(data, cond)["negative"]
  assert sorted(told) == ["pooled", "text"] and (told["text"] == EMPTY).all()
  given = {**cond, "negative": cond}
  assert latents.with_negative(data, given) is given
  long = {**cond, "text": np.zeros((8, 5, 6))}
  with pytest.raises(errors.UserError, match="are of 5 tokens, and the empty"):
    latents.with_negative(data, long)


def test_rates_that_cannot_be_are_refused(data):
  with pytest.raises(ValueError, match="at least 0, and below 1"):
    latents.EncodedConfig(text_dropout=(1.0,))
  two = latents.EncodedConfig(text_dropout=(0.1, 0.1))
  with pytest.raises(errors.UserError, match="those of 3: a, b, c"):
    latents.training(two, data, seen)
  plain = data_config.DataConfig()
  with pytest.raises(errors.UserError, match="they hold no embedded text"):
    latents.training(two, plain, seen)
  assert latents.training(latents.EncodedConfig(), plain, seen) is seen


CONFIG = """
from flowjax.train import experiment
def get_config():
  c = experiment.defaults("mmdit")
  c.steps = 3
  c.model.update(image_size=(4, 4), channels=2, patch_size=2, head_size=8,
                 depth=1, heads=2, num_classes=0, text_width=6, text_tokens=4,
                 pooled_width=4, condition_dropout=0.0)
  c.data.update(source="SOURCE", image_size=(4, 4), channels=2, batch_size=8)
  c.encoded.text_dropout = (0.463, 0.463, 0.463)
  c.optim.update(learning_rate=1e-2, warmup_steps=1)
  c.log.update(metrics_every=1, validation_every=0, samples_every=0,
               tensorboard=False)
  c.sample.steps = 1
  c.sample.guidance.scale = 2.0
  return c
"""


@pytest.mark.slow(6)
def test_the_commands_know_such_a_run(data, tmp_path, capsys, monkeypatch):
  path = tmp_path / "config.py"
  path.write_text(CONFIG.replace("SOURCE", data.source))
  run = f"--workdir={tmp_path / 'run'}"
  assert door.main(["train", f"--config={path}", run]) == 0
  assert "NaN" not in (tmp_path / "run/metrics.jsonl").read_text()
  told = []
  draw = drawing.sampling.draw

  def noted(sampler, params, cond, **options):
    told.append(cond)
    return draw(sampler, params, cond, **options)

  monkeypatch.setattr(drawing.sampling, "draw", noted)
  out = tmp_path / "latents.npy"
  assert door.main(["sample", run, f"--out={out}", "--num=3"]) == 0
  assert np.load(out).shape == (3, *SHAPE) and np.isfinite(np.load(out)).all()
  assert (told[0]["negative"]["text"] == EMPTY).all()
  assert told[0]["text"].dtype == told[0]["pooled"].dtype == np.float32
  assert door.main(["evaluate", run]) == 0
  report = json.loads((tmp_path / "run/report.json").read_text())
  assert np.isfinite(report["validation_loss"])
  found = restored.open(tmp_path / "run").run
  # What is lowered is what the loader gives.
  batch = bench.random_batch(found)
  shapes = loop.batch_shapes(found)
  assert {k: (v.shape, v.dtype) for k, v in batch.items()} == {
    k: (v.shape, v.dtype) for k, v in shapes.items()
  }
  assert shapes["mean"].dtype == np.float16 and "image" not in shapes
  assert shapes["text"].shape == (8, 4, 6)
  loop.lower_step(found)


def test_the_group_is_in_every_config():
  values = experiment.defaults("dit")
  values.model.update(image_size=(8, 8), channels=1, num_classes=10)
  config = experiment.build(values)
  assert config.encoded == latents.EncodedConfig() and config.pipeline is None
  again = experiment.build(experiment.to_config_dict(config))
  assert again == config
