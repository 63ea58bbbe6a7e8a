"""Scores how well the pictures of a run on scenes obey their layouts."""

# Shape suffixes: B layouts, H height, W width, C channels.

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from flowjax.commands import obedience, restored
from flowjax.data import layouts, scenes
from flowjax.evaluate import layouts as scores
from flowjax.evaluate import pictures
from flowjax.parallel import distributed
from flowjax.train import methods, progress

COLUMNS, ROWS = 8, 4
_ASKED = 2  # Scenes of another seed than that of training.


def evaluate(
  found: restored.Restored, method: methods.SampleConfig, args
) -> dict[str, Any]:
  """Draws by layouts of held-out scenes, and says how much a detector sees.

  `drawn` is with the guidance of the config and `unguided` without;
  `shuffled` are the pictures held against other layouts. `judge` is what the
  detector, and the boxes around the ink, make of the real scenes themselves.
  """
  judge = obedience.fit(found, args.judge_steps, args.seed)
  layout = layouts.of(found.config.data)
  assert layout is not None
  source = scenes.of_digits(
    found.config.data, "held_out", "seen", length=args.num, seed=_ASKED
  )
  asked = [source.boxes(source.scene(i)) for i in range(args.num)]
  plain = dataclasses.replace(method, guidance=methods.GuidanceConfig())
  images: dict[str, np.ndarray] = {}
  with progress.counter("samples", 2 * args.num) as done:
    for name, how in (("drawn", method), ("unguided", plain)):
      before = len(images) * args.num
      images[name] = found.draw(
        cond(layout, asked),
        seed=args.seed + len(images),
        done=lambda count, before=before: done(before + count),
        method=how,
      )
  if distributed.is_first():
    sheet = pictured(images["drawn"][: COLUMNS * ROWS], asked, columns=COLUMNS)
    pictures.save_png(sheet, found.directory / "samples.png")
  images["judge"] = source.gather(np.arange(args.num))["image"]
  seen = {name: judge.see(each) for name, each in images.items()}

  def score(name: str, boxes: list) -> dict[str, float]:
    return scores.agreement(
      [_read(each) for each in boxes],
      seen[name],
      images[name],
      tight=scenes.tight,
      inked=scenes.INKED,
    )

  return {
    "samples": args.num,
    "guidance": method.guidance.scale,
    "drawn": score("drawn", asked),
    "unguided": score("unguided", asked),
    "shuffled": score("drawn", asked[1:] + asked[:1]),
    "judge": score("judge", asked),
  }


def cond(
  layout: layouts.Layout, asked: Sequence[Sequence[layouts.Box]]
) -> dict[str, np.ndarray]:
  """Returns layouts as a network is told them."""
  rows = [layout.arrays(boxes) for boxes in asked]
  return {key: np.stack([row[key] for row in rows]) for key in layout.blank}


def pictured(
  images_BHWC: np.ndarray,
  asked: Sequence[Sequence[layouts.Box]],
  *,
  columns: int = COLUMNS,
) -> np.ndarray:
  """Returns a sheet of pictures, each with its boxes and what is in them."""
  asked = asked[: len(images_BHWC)]
  boxed = pictures.boxed(
    images_BHWC, [[box[1:] for box in boxes] for boxes in asked]
  )
  said = [", ".join(box[0] for box in boxes) for boxes in asked]
  return pictures.captioned(boxed, said, columns=columns)


def _read(boxes: Sequence[layouts.Box]) -> list[scores.Asked]:
  found = []
  for name, *sides in boxes:
    colour, digit = name.split()
    top, left, bottom, right = sides
    found.append(scores.Asked(int(digit), colour, (top, left, bottom, right)))
  return found
