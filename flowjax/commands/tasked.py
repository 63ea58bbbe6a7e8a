"""Scores what a run with a task makes of images that training never saw."""

# Shape suffixes: N images, H height, W width, C channels.

from collections.abc import Callable
from typing import Any

import numpy as np

from flowjax.commands import drawing, obedience, restored
from flowjax.data import rows, scenes, sources
from flowjax.evaluate import digits, pictures
from flowjax.evaluate import scenes as judges
from flowjax.parallel import distributed
from flowjax.train import methods, progress, tasks

SHOWN = 30
# What a judge says of images, of which it knows what should be in them.
Judge = Callable[[np.ndarray], dict[str, float]]


def evaluate(
  found: restored.Restored, method: methods.SampleConfig, args
) -> dict[str, Any]:
  """Draws what the network is told of held-out images, and compares with these.

  Errors are root mean squares of images in [-1, 1]; those of latents are called
  so, and have no PSNR, of which the peak would be unknown. A judge of digits or
  of scenes looks at what was drawn, at what the network was told, and at the
  images themselves.
  """
  source = drawing.held_out_source(found.run)
  count = min(args.num, len(source))
  images, cond = drawing.held_out(found.run, count)
  with progress.counter("samples", count) as done:
    drawn = found.draw(cond, seed=args.seed, done=done, method=method)
  told, task = cond["context"], found.config.task
  shown = task.shown(told, images.shape[-1])
  if distributed.is_first():
    beside = [part[:SHOWN] for part in (images, shown)]
    sheet = pictures.sheet(drawn[:SHOWN], beside=beside)
    pictures.save_png(sheet, found.directory / "samples.png")
  scored = SCORES[task.name](task, images, told, drawn)
  name = task.name
  if images.shape[-1] not in (1, 3) or "mean" in sources.blank(source):
    name = f"{task.name}_of_latents"
    scored = {key: scored[key] for key in scored if not key.startswith("psnr")}
  report = {
    "samples": count,
    "guidance": method.guidance.scale,
    name: scored,
  }
  judge = _judge(found, source, count, args)
  if judge is None:
    return report
  looked = {"drawn": drawn, "told": shown, "held_out": images}
  return report | {
    f"judge_of_{name}": judge(each) for name, each in looked.items()
  }


def _inpainting(
  task: tasks.TaskConfig, images, told, drawn
) -> dict[str, float]:
  """Says how far drawn images are from their originals, in the hole and not.

  `hole_filled_grey` is the error of a hole that was left as it is told.
  """
  del task
  hole_NHWC = np.broadcast_to(told[..., :1] > 0.5, images.shape)
  away_NHWC = drawn - images
  return {
    "share": float(np.mean(told[..., :1])),
    "hole": _size(away_NHWC[hole_NHWC]),
    "hole_filled_grey": _size(images[hole_NHWC]),
    "outside": _size(away_NHWC[~hole_NHWC]),
  }


def _super_resolution(
  task: tasks.TaskConfig, images, told, drawn
) -> dict[str, float]:
  """Says how far drawn images are from their originals, and from what was told.

  `psnr` is 20 log10(2 / error), and `consistency` the error of what was drawn
  when it is made as small as what the network was told.
  """

  def low(images_NHWC):
    return np.asarray(tasks.lowered(images_NHWC, task.factor))

  bilinear = task.shown(told, images.shape[-1])
  return {
    "psnr": _psnr(drawn - images),
    "psnr_bilinear": _psnr(bilinear - images),
    "consistency": _size(low(drawn) - low(images)),
    "consistency_bilinear": _size(low(bilinear) - low(images)),
  }


SCORES: dict[str, Callable[..., dict[str, float]]] = {
  "inpainting": _inpainting,
  "super_resolution": _super_resolution,
}


def _size(away: np.ndarray) -> float:
  return float(np.sqrt(np.mean(np.square(away, dtype=np.float64))))


def _psnr(away: np.ndarray) -> float:
  return float(20.0 * np.log10(2.0 / max(_size(away), 1e-5)))


def _judge(found, source: Any, count: int, args) -> Judge | None:
  """Returns the judge of the first held-out images of a source, if any."""
  if found.config.data.source == "digits":
    return _of_digits(found, count, args)
  if found.config.data.source == "scenes":
    return _of_scenes(found, source, count, args)
  return None


def _of_digits(found, count: int, args) -> Judge:
  images, labels = sources.labelled(found.config.data, "train")
  held_images, held_labels = sources.labelled(found.config.data, "held_out")
  judge = digits.Digits(
    images, labels, held_images, held_labels, seed=args.seed
  )

  def look(images_NHWC):
    found_N = judge.classifier.predict(judge.stored(images_NHWC))
    return {"recognised": float(np.mean(found_N == held_labels[:count]))}

  return look


def _of_scenes(found, source: Any, count: int, args) -> Judge:
  detector = obedience.fit(found, args.judge_steps, args.seed)
  # Below the tokens are the scenes, or those of a bucket among them.
  made, row_N = source.source, np.arange(len(source))
  if isinstance(made, rows.Rows):
    made, row_N = made.source, made.row_N
  asked = [made.scene(int(row)) for row in row_N[:count]]

  def look(images_NHWC):
    seen = detector.see(images_NHWC)
    return judges.agreement(asked, seen, scenes.holds)

  return look
