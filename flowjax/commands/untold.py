"""Scores runs on digits in which no class is asked for."""

# Shape suffixes: N images, H height, W width, C channels.

import dataclasses

import numpy as np

from flowjax.commands import drawing, restored
from flowjax.data import config as data_config
from flowjax.data import sources
from flowjax.evaluate import digits, pictures
from flowjax.parallel import distributed
from flowjax.train import methods, progress

SHOWN = 50

Labelled = tuple[np.ndarray, np.ndarray]


def between_digits(data: data_config.DataConfig) -> bool:
  """Says whether a flow goes from some digits to others."""
  ends = data.source, data.pair_source or ""
  return all(end.partition(":")[0] == "digits" for end in ends)


def translation(
  found: restored.Restored, method: methods.SampleConfig, args
) -> dict:
  """Scores what becomes of the held-out images that a flow starts from."""
  data = found.config.data

  def opened(source: str, split: str) -> Labelled:
    return sources.labelled(dataclasses.replace(data, source=source), split)

  judge = digits.Digits(
    *opened("digits", "train"), *opened("digits", "held_out"), seed=args.seed
  )
  starts, _ = opened(data.pair_source or "", "held_out")
  cond = drawing.conditions(found.run, len(starts))
  with progress.counter("samples", len(starts)) as done:
    images = found.draw(
      cond,
      seed=args.seed,
      done=done,
      method=method,
      starts=starts,
      count=len(starts),
    )
  path = found.directory / "samples.png"
  if distributed.is_first():
    pairs = pictures.pairs(starts[:SHOWN], images[:SHOWN])
    pictures.save_png(pairs, path)
  return {
    "samples": len(starts),
    "classifier_accuracy": judge.accuracy,
    **judge.translation(images, starts, *opened(data.source, "held_out")),
  }


def evaluate(
  found: restored.Restored,
  method: methods.SampleConfig,
  args,
  training: Labelled,
  held_out: Labelled,
) -> dict:
  """Scores as many samples as training images, of no classes asked for."""
  judge = digits.Digits(*training, *held_out, seed=args.seed)
  count = len(training[1])
  cond = drawing.conditions(found.run, count)
  with progress.counter("samples", count) as done:
    images = found.draw(
      cond, seed=args.seed + 1, done=done, method=method, count=count
    )
  path = found.directory / "samples.png"
  if distributed.is_first():
    pictures.save_png(pictures.grid(images[:100], columns=10), path)
  scores = judge.spread(images)
  return {
    "samples": count,
    "classifier_accuracy": judge.accuracy,
    "frechet_unguided": scores["frechet"],
    "frechet_real": judge.frechet_real,
    "classes": scores["classes"],
    "nearest_neighbour": scores["nearest_neighbour"],
  }
