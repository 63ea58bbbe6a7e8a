"""Steps over buckets of several aspects: all programs there are, at once."""

# Shape suffixes: B batch, H height, W width, C channels.

import dataclasses
import itertools
import json

import jax
import numpy as np
import pytest

from flowjax import errors
from flowjax.commands import train
from flowjax.data import config as data_config
from flowjax.data import loader, sources
from flowjax.models import coupling, dit, mmdit
from flowjax.parallel import programs
from flowjax.train import aspects, checkpoint, experiment, loop, optim, parts

pytestmark = pytest.mark.usefixtures("traced_once")

EPOCH = loader.epoch_batches
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


class Part:
  """Ten images of one size."""

  class_names, num_classes = tuple("0123456789"), 10

  def __init__(self, size):
    self.shape, self.name = (*size, 1), f"part {size}"

  def __len__(self):
    return 10

  def __getitem__(self, i):
    image = np.random.default_rng(i).uniform(-1, 1, self.shape)
    return {"image": image.astype(np.float32), "label": np.int32(i)}

  def fingerprint(self):
    return {"shape": self.shape}


class Bucketed(Part):
  """Such images of every bucket."""

  def __init__(self):
    super().__init__(BUCKETS[0])
    self.parts = tuple(map(Part, BUCKETS))


def _in_turn(source, config, *, start_step=0, rows=None):
  for step in itertools.count(start_step):
    part = source.parts[step % len(source.parts)]
    batch = next(EPOCH(part, config.batch_size, rows=rows))
    del batch["mask"]
    yield batch


def _epoch(source, size, **options):
  for part in source.parts:
    yield from EPOCH(part, size, **options)


@pytest.fixture(name="bucketed", scope="module")
def _bucketed():
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(sources, "open", lambda config, split: Bucketed())
    patch.setattr(loader, "batches", _in_turn)
    patch.setattr(loader, "epoch_batches", _epoch)
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
  try:
    loop.train(TINY, tmp_path, evaluators=evaluators)
  finally:
    jax.monitoring.unregister_event_duration_listener(heard)
  assert [step for step, _ in found] == list(range(1, 9))
  # After the last step all leaves are hashed, for the checkpoint.
  assert len({count for _, count in found[:-1]}) == 1 and found[0][1] >= 6
  said = capsys.readouterr().err
  for line in (
    "compiling bucket 1 of 3, 8x8",
    "compiling bucket 2 of 3, 4x16",
    "compiling bucket 3 of 3, 12x4",
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
