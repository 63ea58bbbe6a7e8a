"""Encoded, trained on and resumed, each by other numbers of processes."""

# Shape suffixes: B batch, H height, W width, C channels.

import itertools
import os
import signal

import jax
import numpy as np
import PIL.Image
import pytest

from flowjax import errors
from flowjax.commands import encode
from flowjax.data import archive_writing, buckets, loader, order, sources
from flowjax.data import config as data_config
from flowjax.models import dit
from flowjax.train import checkpoint, experiment, json_lines, loop, optim, parts

IMAGES, STEPS, BATCH = 24, 7, 8
ORIGINALS = {(8, 8): (40, 40), (4, 16): (20, 80)}


class Encoder:
  """Latents of half the size."""

  def encode(self, image_BHWC):
    b, h, w, _ = image_BHWC.shape
    mean = image_BHWC.reshape(b, h // 2, 2, w // 2, 2, -1).mean(axis=(2, 4))
    return mean, mean - 4.0

  def fingerprint(self):
    return {"vae": "halves"}


def photos_in(root):
  """Writes images of two aspects and two classes, each of its own grey."""
  for i in range(IMAGES):
    folder = root / "ab"[i % 2]
    folder.mkdir(parents=True, exist_ok=True)
    size = list(ORIGINALS.values())[i % 3 == 2]
    pixels = np.full((*size, 3), 10 * i, np.uint8)
    PIL.Image.fromarray(pixels).save(folder / f"{i:02d}.png")


def data_of(source, scale, bucketed):
  sizes = [(h // scale, w // scale) for h, w in ORIGINALS]
  return data_config.DataConfig(
    source=source, image_size=sizes[0], channels=3, batch_size=BATCH,
    buckets=tuple(sizes) if bucketed else (), held_out=0.0,
  )  # fmt: skip


def encoded(folder, data, counts):
  """Encodes by so many processes one after the other: all but the last die."""
  folder.mkdir(parents=True)
  opened = {"train": sources.open(data, "train")}
  for last, count in enumerate(counts, 1 - len(counts)):
    works = [
      encode.begin(
        *found[:2], Encoder(), found[2],
        dtype=None, shard_size=700, batch_size=2,
      )
      for found in encode.by_bucket(folder, opened, data)
    ]  # fmt: skip
    for work in works:
      missing = archive_writing.missing(work.folder, work.plan)
      assert len(missing) > 1
      for process in range(count):
        mine = missing[process::count]
        work.write(mine if last == 0 else mine[: process % 2])
      if last == 0:
        archive_writing.finish(work.folder, work.plan)


def content(folder):
  return {
    path.relative_to(folder): path.read_bytes()
    for path in folder.rglob("*")
    if path.is_file()
  }


def joined(count, read):
  """Returns `loader.batches` of so many processes, and notes what they read."""
  batches, each = loader.batches, BATCH // count

  def of(source, config, *, start_step, rows):
    assert list(rows) == list(range(BATCH))
    parts = [
      batches(
        source, config, start_step=start_step, rows=rows[i : i + each]
      )
      for i in range(0, BATCH, each)
    ]  # fmt: skip
    for step, found in enumerate(zip(*parts, strict=True), start_step):
      batch = {
        key: np.concatenate([part[key] for part in found]) for key in found[0]
      }
      read.append((step, batch["mean"]))
      yield batch

  return of


def wanted(data, step):
  """Returns the latents of a step's images, read and encoded on the spot."""
  source, seed = sources.open(data, "train"), data.shuffle_seed
  if isinstance(source, buckets.Bucketed):
    source, seed, step = source.turn(seed, step)
  position_B = np.arange(step * BATCH, (step + 1) * BATCH)
  record_B = order.records(seed, len(source), position_B)
  image_BHWC = np.stack([source[int(i)]["image"] for i in record_B])
  return Encoder().encode(image_BHWC)[0].astype(np.float16)


def encoded_by_several(root, bucketed):
  """Returns the data of pixels, and of latents that one would have made."""
  photos_in(root / "photos")
  pixels = data_of(f"folder:{root / 'photos'}", 1, bucketed)
  encoded(root / "one", pixels, [1])
  encoded(root / "many", pixels, [3, 2])
  assert content(root / "one") == content(root / "many")
  return pixels, data_of(f"arrayrecord:{root / 'many'}", 2, bucketed)


def check(read, pixels):
  """Whatever step was read, by whoever: it has its images."""
  assert {step for step, _ in read} >= set(range(STEPS))
  for step, mean_BHWC in read:
    np.testing.assert_array_equal(mean_BHWC, wanted(pixels, step))


def test_images_of_one_size_come_in_the_order_of_one_process(tmp_path):
  pixels, data = encoded_by_several(tmp_path, bucketed=False)
  source, read = sources.open(data, "train"), []
  for count, first, last in ((1, 0, STEPS), (4, 0, 3), (2, 3, STEPS)):
    batches = joined(count, read)(
      source, data, start_step=first, rows=range(BATCH)
    )
    assert len(list(itertools.islice(batches, last - first))) == last - first
  check(read, pixels)


@pytest.mark.slow
@pytest.mark.usefixtures("traced_once")
def test_a_run_on_buckets_that_moves_is_the_straight_run(tmp_path, monkeypatch):
  pixels, data = encoded_by_several(tmp_path, bucketed=True)
  config = experiment.Experiment(
    steps=STEPS,
    model=dit.DiTConfig(
      image_size=(4, 4), channels=3, patch_size=2, width=16, depth=1, heads=2,
      num_classes=2,
    ),
    data=data,
    optim=optim.OptimConfig(warmup_steps=2),
    checkpoint=checkpoint.CheckpointConfig(every=100),
    log=experiment.LogConfig(metrics_every=1, tensorboard=False),
  )  # fmt: skip
  monkeypatch.setattr(loop.curves, "draw", lambda *unused, **unused_too: None)
  build, one_device = parts.build, jax.devices()[:1]
  monkeypatch.setattr(parts, "build", lambda found: build(found, one_device))
  read = []

  def train(folder, count, look=None):
    found = [loop.Evaluator(1, look)] if look else []
    with monkeypatch.context() as patch:
      patch.setattr(loader, "batches", joined(count, read))
      loop.train(config, folder, evaluators=lambda run: found)
    rows = json_lines.read(folder / "metrics.jsonl")
    return [row["loss"] for row in rows if "loss" in row]

  def stop(state):
    if int(state.step) == 3:
      os.kill(os.getpid(), signal.SIGTERM)
    return {}, {}

  straight = train(tmp_path / "straight", 1)
  with pytest.raises(errors.Preempted):
    train(tmp_path / "run", 4, stop)
  assert train(tmp_path / "run", 2) == straight and len(straight) == STEPS
  assert len({mean_BHWC.shape for _, mean_BHWC in read}) == 2
  check(read, pixels)
