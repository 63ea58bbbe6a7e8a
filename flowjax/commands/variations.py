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

EACH = 5
SHOWN = 10

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
  judge = digits.Digits(*training, *held_out, seed=args.seed)
  images, labels = held_out
  count = min(len(images), max(1, args.num // EACH))
  images, labels = images[:count], labels[:count]
  plain = dataclasses.replace(method, guidance=methods.GuidanceConfig())
  drawn: dict[str, np.ndarray] = {}
  with progress.counter("samples", 2 * count * EACH) as done:
    for name, how in (("varied", method), ("unguided", plain)):
      before = len(drawn) * count * EACH
      drawn[name] = found.draw(
        drawing.told_of(found.run, {"image": np.repeat(images, EACH, axis=0)}),
        seed=args.seed + len(drawn),
        done=lambda count, before=before: done(before + count),
        method=how,
      ).reshape(count, EACH, *images.shape[1:])
  if distributed.is_first():
    sheet = beside(images[:SHOWN], drawn["varied"][:SHOWN])
    pictures.save_png(sheet, found.directory / "samples.png")
  next_of_class = _next_of_class(labels)
  return {
    "samples": count * EACH,
    "guidance": method.guidance.scale,
    "classifier_accuracy": judge.accuracy,
    "varied": scores.score(judge, drawn["varied"], images, labels),
    "unguided": scores.score(judge, drawn["unguided"], images, labels),
    "shuffled": scores.score(
      judge, drawn["varied"], np.roll(images, 1, axis=0), np.roll(labels, 1)
    ),
    "real": scores.score(judge, images[next_of_class], images, labels),
  }


def beside(original_NHWC: np.ndarray, drawn_NVHWC: np.ndarray) -> np.ndarray:
  """Returns a sheet: a row for each original, itself and what it became."""
  both = np.concatenate([original_NHWC[:, None], drawn_NVHWC], axis=1)
  return pictures.grid(both.reshape(-1, *both.shape[2:]), columns=both.shape[1])


def _next_of_class(label_N: np.ndarray) -> np.ndarray:
  """Returns for each image others of its class, [N, EACH], in turn."""
  found = []
  for i, label in enumerate(label_N):
    others = np.flatnonzero(label_N == label)
    others = others[others != i] if len(others) > 1 else others
    found.append(np.resize(np.roll(others, -i), EACH))
  return np.array(found)
