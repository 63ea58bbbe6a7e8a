"""Scores how a run varies images that it never saw."""

# Shape suffixes: N originals, V variations of each, H height, W width, C
# channels.

import dataclasses
from typing import Any

import numpy as np

from flowjax.commands import drawing, restored
from flowjax.evaluate import digits, pictures
from flowjax.evaluate import variations as scores
from flowjax.parallel import distributed
from flowjax.train import methods, progress

EACH, SHOWN = 5, 20

Labelled = tuple[np.ndarray, np.ndarray]


def evaluate(
  found: restored.Restored,
  method: methods.SampleConfig,
  args,
  training: Labelled,
  held_out: Labelled,
) -> dict[str, Any]:
  """Varies held-out digits, and says how like them the variations are.

  `varied` is with the guidance of the config and `unguided` without; `shuffled`
  are the variations held against other originals. `real` are other held-out
  digits of the same class in place of variations.
  """
  images, labels = held_out
  known = digits.Digits(*training, *held_out, seed=args.seed)
  judge = scores.Judge(known, images, labels)
  count = min(len(images), max(1, args.num // EACH))
  plain = dataclasses.replace(method, guidance=methods.GuidanceConfig())
  told = drawing.told_of(
    found.run, {"image": np.tile(images[:count], (EACH, 1, 1, 1))}
  )
  drawn: dict[str, np.ndarray] = {}
  with progress.counter("samples", 2 * count * EACH) as done:
    for name, how in (("varied", method), ("unguided", plain)):
      before = len(drawn) * count * EACH
      drawn[name] = found.draw(
        told,
        seed=args.seed + len(drawn),
        done=lambda count, before=before: done(before + count),
        method=how,
      )
  if distributed.is_first():
    shown = np.flatnonzero(np.arange(count * EACH) % count < SHOWN)
    sheet = beside(images[:count][:SHOWN], drawn["varied"][shown])
    pictures.save_png(sheet, found.directory / "samples.png")
  which = np.arange(count)
  apart = {
    name: np.swapaxes(each.reshape(EACH, count, *images.shape[1:]), 0, 1)
    for name, each in drawn.items()
  }
  real = [np.resize(np.roll(judge.others(i), -i), EACH) for i in which]
  return {
    "samples": count * EACH,
    "guidance": method.guidance.scale,
    "classifier_accuracy": known.accuracy,
    "varied": judge.score(apart["varied"], which),
    "unguided": judge.score(apart["unguided"], which),
    "shuffled": judge.score(apart["varied"], np.roll(which, 1)),
    "real": judge.score(images[np.array(real)], which),
  }


def beside(original_NHWC: np.ndarray, drawn_MHWC: np.ndarray) -> np.ndarray:
  """Returns a sheet: a row for each original, itself and what it became.

  Variations come in the order of the originals, in turn.
  """
  count = len(original_NHWC)
  each = -(-len(drawn_MHWC) // count)
  filled_MHWC = np.full((count * each, *drawn_MHWC.shape[1:]), -1.0, np.float32)
  filled_MHWC[: len(drawn_MHWC)] = drawn_MHWC
  drawn_NVHWC = np.swapaxes(
    filled_MHWC.reshape(each, count, *drawn_MHWC.shape[1:]), 0, 1
  )
  both = np.concatenate([original_NHWC[:, None], drawn_NVHWC], axis=1)
  return pictures.grid(both.reshape(-1, *both.shape[2:]), columns=both.shape[1])
