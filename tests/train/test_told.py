"""Tasks that tell a network a layout, or an image: in a config, on a mesh."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowjax import errors
from flowjax.commands import drawing
from flowjax.data import config as data_config
from flowjax.data import scenes, sources
from flowjax.models import image_encoder, layout, mmdit
from flowjax.parallel import mesh as meshes
from flowjax.train import experiment, optim, parts, tasks

WIDTH = 16
MMDIT = mmdit.MMDiTConfig(
  image_size=(8, 8), channels=1, heads=2, head_size=8, depth=1,
  position_table=8, text_width=WIDTH, pooled_width=WIDTH, text_tokens=4,
)  # fmt: skip
EMBEDDING = image_encoder.EmbeddingConfig(size=6, depth=1, width=16, heads=2)


def loss_of(run, batch):
  """Returns the shape of the training loss of a batch, as training makes it."""
  loss = run.experiment.task.prepared(run.experiment.loss(run.network))
  value, _ = jax.eval_shape(loss, run.abstract.params, batch, jax.random.key(0))
  return value.shape


BOXES = dict(boxes=3, box_names=scenes.NAMES)


def varied(**groups):
  """Returns a small experiment that varies digits."""
  return experiment.Experiment(
    **{
      "steps": 2,
      "model": MMDIT,
      "task": tasks.TaskConfig("variation"),
      "embedding": EMBEDDING,
      "data": data_config.DataConfig(batch_size=8),
      "optim": optim.OptimConfig(),
      **groups,
    }
  )


def laid_out(**groups):
  """Returns a small experiment on layouts of scenes."""
  return varied(
    **{
      "model": dataclasses.replace(
        MMDIT, image_size=(32, 32), channels=3, patch_size=8
      ),
      "task": tasks.TaskConfig("layout"),
      "embedding": image_encoder.EmbeddingConfig(),
      "layout": layout.LayoutConfig(
        classes=60, boxes=3, width=WIDTH, depth=1, heads=2
      ),
      "data": data_config.DataConfig(
        source="scenes", image_size=(32, 32), channels=3, batch_size=8, **BOXES
      ),
      **groups,
    }
  )


@pytest.mark.parametrize(
  "config", [varied(), laid_out()], ids=["varied", "laid"]
)
def test_its_encoder_is_divided_over_a_mesh(config):
  mesh = meshes.MeshConfig(data=1, fsdp=2, tensor=2, context=2)
  run = parts.build(dataclasses.replace(config, mesh=mesh), jax.devices())
  group = {"variation": "image_encoder", "layout": "layout_encoder"}
  params = run.abstract.params[group[config.task.name]]
  whole = params.get("vision", params)
  kernel = whole["blocks"]["mlp"]["in"]["kernel"]
  assert kernel.sharding.shard_shape(kernel.shape) == (1, WIDTH // 2, 32)


@pytest.mark.parametrize(
  "config", [varied(), laid_out()], ids=["varied", "laid"]
)
def test_the_loss_takes_what_the_source_gives(config):
  run = parts.build(config, jax.devices()[:1])
  source = sources.open(config.data, "train")
  batch = source.gather(np.arange(8))
  assert loss_of(run, batch) == ()
  images, cond = drawing.held_out(run, 3)
  told = jax.eval_shape(lambda: run.network.example(3))
  assert {key: value.shape for key, value in cond.items()} == {
    key: value.shape for key, value in told.items()
  }
  if config.task.name == "variation":
    np.testing.assert_array_equal(cond["original"], images)


def test_a_variation_is_told_the_image_and_nothing_that_is_said_of_it():
  batch = {"image": jnp.ones((2, 8, 8, 1)), "label": jnp.arange(2)}
  config = tasks.TaskConfig("variation")
  found = config.add(batch, jax.random.key(0))
  assert found.keys() == {"image", "original", "original_mask"}
  given = config.add(
    {**batch, "embedding": jnp.ones((2, 6))}, jax.random.key(0)
  )
  assert given["embedding_mask"].tolist() == [True, True]


def test_embeddings_may_come_with_the_data(tmp_path):
  for i in range(4):
    np.savez(
      tmp_path / f"{i}.npz",
      image=np.zeros((8, 8, 1), np.float32),
      embedding=np.full(6, i, np.float32),
    )
  given = dataclasses.replace(EMBEDDING, depth=0)
  data = data_config.DataConfig(
    source=f"embedded:{tmp_path}", batch_size=2, held_out=0.0
  )
  config = varied(embedding=given, data=data)
  source = sources.open(data, "train")
  batch = {
    key: np.stack([source[i][key] for i in range(2)]) for key in source[0]
  }
  assert batch.keys() == {"image", "embedding"}
  run = parts.build(config, jax.devices()[:1])
  assert "vision" not in run.abstract.params["image_encoder"]
  assert loss_of(run, batch) == ()
  options = dict(batch_size=2, num_classes=None, channels=1, image_size=(8, 8))
  sources.check(source, **options, embedding=6)
  with pytest.raises(errors.UserError, match=r"of 5 numbers .* has \(6,\)"):
    sources.check(source, **options, embedding=5)
  digits = sources.open(data_config.DataConfig(), "train")
  with pytest.raises(errors.UserError, match="has none"):
    sources.check(digits, **options, embedding=5)


@pytest.mark.parametrize(
  ("make", "groups", "said"),
  [
    (varied, dict(task=tasks.TaskConfig()), "embedding.size = 6"),
    (
      varied,
      dict(embedding=image_encoder.EmbeddingConfig()),
      "'variation' and embedding.size = 0",
    ),
    (
      varied,
      dict(
        task=tasks.TaskConfig("variation", noise=0.4),
        embedding=dataclasses.replace(EMBEDDING, depth=0),
      ),
      "embedding.depth = 0 takes embeddings from the data",
    ),
    (laid_out, dict(task=tasks.TaskConfig()), "layout.classes = 60"),
    (
      laid_out,
      dict(layout=layout.LayoutConfig(classes=60, boxes=4, width=WIDTH)),
      "set config.layout.boxes=3",
    ),
    (
      laid_out,
      dict(layout=layout.LayoutConfig(classes=9, boxes=3, width=WIDTH)),
      "set config.layout.classes=60",
    ),
    (
      varied,
      dict(embedding=dataclasses.replace(EMBEDDING, patch_size=3)),
      "does not divide images of 8x8",
    ),
    (
      varied,
      dict(data=data_config.DataConfig(source="scenes", tokenizer="bytes")),
      "set config.text.",
    ),
  ],
)
def test_what_does_not_go_together_is_refused(make, groups, said):
  with pytest.raises(ValueError, match=said):
    make(**groups)


def test_a_text_of_another_length_is_refused():
  embedding = dataclasses.replace(EMBEDDING, tokens=3)
  with pytest.raises(errors.UserError, match="config.embedding: tokens = 3"):
    parts.build(varied(embedding=embedding))
