"""Steps over buckets of several aspects: all programs there are, at once."""

# Shape suffixes: B batch, H height, W width, C channels.

import dataclasses
import itertools
import json

import jax
import numpy as np
import pytest

from flowjax import errors, models
from flowjax.commands import restored, train
from flowjax.data import buckets, canvas, loader, sources
from flowjax.data import config as data_config
from flowjax.data import digits as digits_source
from flowjax.interop import formats
from flowjax.models import coupling, dit, mmdit
from flowjax.parallel import programs
from flowjax.train import (
  aspects,
  checkpoint,
  experiment,
  flows,
  loop,
  optim,
  parts,
  tasks,
)

BUCKETS = ((8, 8), (4, 16), (12, 4))

TINY = experiment.Experiment(
  steps=8,
  model=dit.DiTConfig(
    image_size=(8, 8),
    channels=1,
    patch_size=4,
    width=16,
    depth=1,
    heads=2,
    num_classes=10,
  ),
  data=data_config.DataConfig(batch_size=8, buckets=BUCKETS),
  optim=optim.OptimConfig(warmup_steps=2),
  checkpoint=checkpoint.CheckpointConfig(every=100),
  log=experiment.LogConfig(
    metrics_every=1, tensorboard=False, validation_every=4, samples_every=0
  ),
)


class Images:
  """Forty images of four sizes, which can be cut to any."""

  class_names, num_classes = tuple("0123456789"), 10
  name = "images"

  def __init__(self, size=(8, 8)):
    self.shape = (*size, 1)

  def sizes(self):
    return np.array([(80, 80), (40, 160), (120, 40), (30, 31)] * 10)

  def cut(self, size):
    return Images(size)

  def __len__(self):
    return 40

  @property
  def blank(self):
    image, two = np.zeros(self.shape, np.float32), np.zeros(2, np.int32)
    none = {"label": np.int32(0), "truncated": np.int32(0)}
    return {"image": image, "size": two, "crop": two, **none}

  def __getitem__(self, i):
    image = np.random.default_rng(i).uniform(-1, 1, self.shape)
    return self.blank | {
      "image": image.astype(np.float32),
      "label": np.int32(i % 10),
      "size": self.sizes()[i % 40].astype(np.int32),
    }

  def fingerprint(self):
    return {}


@pytest.fixture(name="bucketed", scope="module")
def _bucketed():
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(
      sources, "open",
      lambda config, split: buckets.divide(Images(), config, split),
    )  # fmt: skip
    patch.setattr(loop.curves, "draw", lambda *unused, **unused_too: None)
    yield


@pytest.mark.slow
def test_no_bucket_is_compiled_in_mid_run(bucketed, tmp_path, capsys, caplog):
  """Neither by a step nor by a validation; each program is said."""
  caplog.set_level("INFO")
  compiled, found = [], []

  def heard(event, *unused, **unused_too):
    if event == "/jax/core/compile/backend_compile_duration":
      compiled.append(event)

  def look(state):
    found.append((int(state.step), len(compiled)))
    return {}, {}

  def evaluators(run):
    return [*train.evaluators(run, tmp_path), loop.Evaluator(1, look)]

  jax.monitoring.register_event_duration_secs_listener(heard)
  config = _over(TINY, data=_over(TINY.data, buckets=BUCKETS[:2]))
  try:
    loop.train(config, tmp_path, evaluators=evaluators)
  finally:
    jax.monitoring.unregister_event_duration_listener(heard)
  assert [step for step, _ in found] == list(range(1, 9))
  # With the second step counts are added up, and after the last all leaves are
  # hashed, for the checkpoint.
  assert len({count for _, count in found[1:-1]}) == 1 and found[0][1] >= 4
  said = capsys.readouterr().err
  for line in (
    "compiling bucket 1 of 2, 8x8",
    "compiling bucket 2 of 2, 4x16",
  ):
    assert f"step 0/8  {line}" in said and f"Validation: {line}" in caplog.text
  rows = (tmp_path / "metrics.jsonl").read_text().splitlines()
  looked = [row for row in map(json.loads, rows) if "validation_loss" in row]
  assert [row["step"] for row in looked] == [4, 8]


def test_a_shape_that_was_not_compiled_is_no_reason_to_compile():
  def double(x, batch):
    return x * batch["image"].sum()

  shapes = [(2, 4, 4, 1), (2, 2, 8, 1)]
  kinds = [
    (np.float32(0), {"image": jax.ShapeDtypeStruct(shape, np.float32)})
    for shape in shapes
  ]
  call = programs.ahead(jax.jit(double), kinds)
  for shape in shapes:
    assert call(np.float32(2), {"image": np.ones(shape, np.float32)}) == 64
  with pytest.raises(AssertionError, match=r"\(2, 8, 2, 1\)"):
    call(np.float32(2), {"image": np.ones((2, 8, 2, 1), np.float32)})


MMDIT = mmdit.MMDiTConfig(
  image_size=(8, 8),
  channels=1,
  patch_size=2,
  depth=1,
  heads=1,
  head_size=8,
  position_table=6,
  num_classes=10,
)


@pytest.mark.parametrize(
  ("model", "reason"),
  [
    (dataclasses.replace(TINY.model, patch_size=8), "4x16: patch_size=8 does"),
    (
      dataclasses.replace(TINY.model, position="learned"),
      "'rope2d' or 'sincos2d'",
    ),
    (MMDIT, r"4x16: An image of 4x16 is a grid of 2x8 .* of 6x6"),
    (coupling.CouplingConfig(), "takes images of one size"),
  ],
)
def test_a_bucket_that_a_model_cannot_take_is_refused(model, reason):
  with pytest.raises(errors.UserError, match=f"config.data.buckets.*{reason}"):
    aspects.check(model, TINY.data)


def test_the_figures_are_those_of_the_largest_bucket():
  largest = aspects.largest(TINY)
  assert largest.model.image_size == largest.data.image_size == (8, 8)
  wide = dataclasses.replace(
    TINY, data=dataclasses.replace(TINY.data, buckets=((8, 8), (8, 12)))
  )
  built = parts.build(aspects.largest(wide))
  assert loop.batch_shapes(built)["image"].shape == (8, 8, 12, 1)
  assert "2 programs" in aspects.said(wide.data)
  assert "the largest, 8x12" in aspects.said(wide.data)


def _over(config, **changes):
  return dataclasses.replace(config, **changes)


CANVAS = _over(TINY.data, padded_patch=4)


@pytest.mark.parametrize("data", [TINY.data, CANVAS])
def test_what_is_compiled_is_what_is_read(bucketed, data):
  source = sources.open(data, "train")

  def said(batch):
    return str([(k, batch[k].shape, batch[k].dtype) for k in sorted(batch)])

  kinds = {*map(said, loop.shapes(source, data, data.batch_size))}
  assert len(kinds) == (1 if data.padded_patch else 3)
  read = set()
  for batch in itertools.islice(loader.batches(source, data), 12):
    del batch["skipped"]
    read.add(said(batch))
  assert read == kinds


@pytest.mark.slow(2)
def test_the_loss_of_a_canvas_is_that_of_its_image():
  flow = flows.FlowConfig(
    # So that the noise is given, on the canvas as on the image.
    coupling=flows.CouplingConfig("pairs"),
    # Which is l2, and the mean of something else.
    distance=flows.DistanceConfig("l2_cosine"),
  )
  net, rng = models.build(TINY.model), np.random.default_rng(0)
  shapes = jax.eval_shape(net.init, jax.random.key(0))
  params = jax.tree.map(
    lambda leaf: 0.3 * rng.standard_normal(leaf.shape, np.float32), shapes
  )
  on_images = flow.loss(net)
  on_canvas = aspects.prepared(TINY.model, CANVAS, flow.loss(net))
  both = [
    jax.jit(jax.value_and_grad(loss, has_aux=True))
    for loss in (on_images, on_canvas)
  ]
  for size in ((4, 16), (12, 4)):
    image, noise = rng.standard_normal((2, 2, *size, 1), np.float32)
    batch = {"image": image, "source": noise, "label": np.zeros(2, np.int32)}
    wanted, found = (
      value_and_grad(params, told, jax.random.key(1))
      for value_and_grad, told in zip(
        both, (batch, canvas.of(batch, CANVAS)), strict=True
      )
    )
    (loss, _), gradient = wanted
    (same, _), as_well = found
    for a, b in zip(
      jax.tree.leaves((loss, gradient)),
      jax.tree.leaves((same, as_well)),
      strict=True,
    ):
      np.testing.assert_allclose(b, a, atol=1e-5, rtol=1e-4)


def test_a_network_is_told_the_sizes_of_a_batch():
  told = {}

  def loss(params, batch, rng):
    told.update(batch)
    return 0.0, {}

  model = _over(TINY.model, size_conditioning=True)
  size, crop = np.array([[90, 70]] * 2), np.array([[3, 1]] * 2)
  batch = {"image": np.zeros((2, 4, 16, 1)), "size": size, "crop": crop}
  for data in (TINY.data, CANVAS):
    aspects.prepared(model, data, loss)({}, canvas.of(batch, data), None)
    assert "size" not in told and "crop" not in told
    np.testing.assert_array_equal(
      told["size_crop"], [[90, 70, 3, 1, 4, 16]] * 2
    )
  np.testing.assert_array_equal(
    aspects.whole((4, 16), 2, original=(64, 64), crop=(8, 0)),
    [[64, 64, 8, 0, 4, 16]] * 2,
  )
  assert aspects.prepared(TINY.model, TINY.data, loss) is loss


def test_a_source_that_knows_no_sizes_is_refused_who_is_told_them():
  model = _over(TINY.model, size_conditioning=True)
  digits = digits_source.open(data_config.DataConfig(), "train")
  aspects.check_sizes(TINY.model, digits)
  aspects.check_sizes(model, Images())
  with pytest.raises(errors.UserError, match="config.data.originals=True"):
    aspects.check_sizes(model, digits)


@pytest.mark.parametrize(
  ("changes", "reason"),
  [
    (dict(data=_over(CANVAS, buckets=())), "there are no config.data.buckets"),
    (dict(data=_over(CANVAS, padded_patch=2)), "that of a model 'dit' is 4"),
    (
      dict(flow=flows.FlowConfig(coupling=flows.CouplingConfig("sinkhorn"))),
      "coupling 'sinkhorn' asks for whole images",
    ),
    (
      dict(flow=flows.FlowConfig(objective="maximum_likelihood")),
      "objective 'maximum_likelihood'",
    ),
    (dict(task=tasks.TaskConfig("inpainting")), "the task 'inpainting'"),
  ],
)
def test_a_canvas_that_would_not_be_its_images_is_refused(changes, reason):
  model = TINY.model
  if "task" in changes:
    model = _over(model, context_channels=2)
  with pytest.raises(errors.UserError, match=f"padded_patch = .*{reason}"):
    _over(TINY, **{"model": model, "data": CANVAS, **changes})


@pytest.mark.parametrize("format", ["torch", "diffusers", "original"])
def test_who_is_told_sizes_is_not_exported(format):
  model = _over(TINY.model, size_conditioning=True)
  with pytest.raises(errors.UserError, match=f"size_conditioning=.*{format}"):
    formats.layout(model, format)


def test_every_aspect_of_training_can_be_drawn():
  drawn = restored._resized(TINY, (4, 16))
  assert drawn.model.image_size == drawn.data.image_size == (4, 16)
  assert drawn.data.buckets == BUCKETS
  with pytest.raises(errors.UserError, match=r"\(8x8, 4x16, 12x4\)"):
    restored._resized(TINY, (8, 16))
  wide = _over(TINY, model=_over(MMDIT, position="rope2d"))
  assert restored._resized(wide, (8, 16)).data.buckets == ()
