"""Scores how well the pictures of a run on scenes obey their captions."""

# Shape suffixes: B captions or scenes, H height, W width, C channels.

import dataclasses
from typing import Any

import numpy as np

from flowjax.commands import restored
from flowjax.data import scenes
from flowjax.evaluate import pictures
from flowjax.evaluate import scenes as judges
from flowjax.parallel import distributed
from flowjax.train import methods, progress

COLUMNS, ROWS = 6, 4
# Scenes of other seeds than that of training.
_JUDGE, _ASKED = 1, 2


def evaluate(
  found: restored.Restored, method: methods.SampleConfig, args
) -> dict[str, Any]:
  """Draws by captions, and says how much of these a detector sees.

  `seen` and `held_out` captions are of the combinations that training saw and
  never saw; `unguided` are the seen ones without guidance, and `shuffled` the
  seen ones' pictures held against other captions. `judge` is what the detector
  makes of real scenes that it never saw.
  """
  judge = fit(found, args.judge_steps, args.seed)
  seen, held_out = (
    _asked(found, kind, args.num) for kind in ("seen", "held_out")
  )
  plain = dataclasses.replace(method, guidance=methods.GuidanceConfig())
  drawn: dict[str, np.ndarray] = {}
  with progress.counter("samples", 3 * args.num) as done:
    for name, asked, how in (
      ("seen", seen, method),
      ("held_out", held_out, method),
      ("unguided", seen, plain),
    ):
      before = len(drawn) * args.num
      drawn[name] = found.draw(
        _cond(found, asked),
        seed=args.seed + len(drawn),
        done=lambda count, before=before: done(before + count),
        method=how,
      )
  looked = {name: judge.see(images) for name, images in drawn.items()}

  def score(asked, name):
    return judges.agreement(asked, looked[name], scenes.holds)

  if distributed.is_first():
    _picture(found, drawn, seen, held_out)
  real = _real(found, args.num)
  return {
    "samples": args.num,
    "guidance": method.guidance.scale,
    "seen": score(seen, "seen"),
    "held_out": score(held_out, "held_out"),
    "unguided": score(seen, "unguided"),
    "shuffled": score(seen[1:] + seen[:1], "seen"),
    "judge": judges.agreement(
      [scene for scene, _ in real],
      judge.see(np.stack([image_HWC for _, image_HWC in real])),
      scenes.holds,
    ),
  }


def fit(found: restored.Restored, steps: int, seed: int) -> judges.Detector:
  """Fits a detector on real scenes, of training digits in all combinations."""
  source = scenes.of_digits(
    found.config.data, "train", "all", length=2**20, seed=_JUDGE
  )
  size = judges.BATCH

  with progress.counter("steps of the judge", steps) as done:

    def batches(step: int):
      done(step + 1)
      drawn = [source.scene(i) for i in range(step * size, (step + 1) * size)]
      images = [source.painted(scene) for scene in drawn]
      return np.stack(images), [scene.things for scene in drawn]

    return judges.fit(
      batches, colours=tuple(scenes.COLOURS), seed=seed, steps=steps
    )


def _asked(
  found: restored.Restored, combinations: str, count: int
) -> list[scenes.Scene]:
  source = scenes.of_digits(
    found.config.data, "train", combinations, length=count, seed=_ASKED
  )
  return [source.scene(i) for i in range(count)]


def _real(
  found: restored.Restored, count: int
) -> list[tuple[scenes.Scene, np.ndarray]]:
  """Returns scenes of digits that neither the run nor the judge has seen."""
  source = scenes.of_digits(
    found.config.data, "held_out", "all", length=count, seed=_ASKED
  )
  drawn = [source.scene(i) for i in range(count)]
  return [(scene, source.painted(scene)) for scene in drawn]


def _cond(
  found: restored.Restored, asked: list[scenes.Scene]
) -> dict[str, np.ndarray]:
  tokenizer = found.config.data.build_tokenizer()
  assert tokenizer is not None
  token_BL, mask_BL = tokenizer([scene.caption for scene in asked])
  return {"token": token_BL, "token_mask": mask_BL}


def _picture(
  found: restored.Restored,
  drawn: dict[str, np.ndarray],
  seen: list[scenes.Scene],
  held_out: list[scenes.Scene],
) -> None:
  """Writes a sheet of pictures: seen combinations, and below them others."""
  count = min(COLUMNS * ROWS // 2, len(seen))
  asked = [scene.caption for scene in seen[:count]]
  asked += [f"{scene.caption} (never seen)" for scene in held_out[:count]]
  images = np.concatenate([drawn["seen"][:count], drawn["held_out"][:count]])
  sheet = pictures.captioned(images, asked, columns=COLUMNS)
  pictures.save_png(sheet, found.directory / "samples.png")
