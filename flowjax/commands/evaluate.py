"""Scores the samples of a workdir against data that training never saw.

Writes `report.json` into the workdir. For digits also `samples.png`: how many
samples a classifier of real digits recognises, the Fréchet distance in its
features beside that of real digits among themselves, and how near samples
come to the training images; of a network that is told nothing also of how many
classes they are; of a flow from some digits to others, how many end as one of
those, and below its originals what each became. For scenes also `samples.png`,
and how much of the captions a detector, fitted on real scenes, finds in
pictures: of combinations that training saw and never saw, without guidance, and
of other captions; or, of a run on layouts, whether in each box is what was
asked for, and how well the boxes around the ink cover those of the layout. Of a
run that fills in or makes larger, instead: how far from held-out images it
draws what it was told of them, and what a judge sees in its pictures
(docs/tasks.md). For any source, and whatever the network is told: the
validation loss. Of an autoencoder: PSNR and losses of held-out images, and
`reconstructions.png`.

example:
  flowjax evaluate --workdir=runs/digits
"""

import dataclasses
from collections.abc import Callable

import numpy as np

from flowjax import errors, models
from flowjax.commands import (
  drawing,
  export,
  flags,
  obedience,
  placement,
  restored,
  tasked,
  train,
  untold,
  variations,
)
from flowjax.data import sources
from flowjax.evaluate import digits, pictures
from flowjax.flow import losses
from flowjax.parallel import distributed
from flowjax.parallel import mesh as meshes
from flowjax.train import loop, methods, progress, workdir

SHOWN = 50  # reconstructions


def add_flags(parser) -> None:
  """Adds the flags of `evaluate`."""
  restored.add_run(parser)
  parser.add_argument(
    "--num", type=flags.count, default=500, help="samples to be recognised"
  )
  parser.add_argument(
    "--likelihood",
    action="store_true",
    help="also the bits per dimension of the held-out images, along the ODE",
  )
  parser.add_argument(
    "--likelihood_steps",
    type=flags.count,
    default=64,
    help="steps of the likelihood's solver, rk4 unless the config has another",
  )
  parser.add_argument(
    "--levels",
    type=flags.count,
    help="how many values a pixel has; default: config.flow.levels",
  )
  parser.add_argument(
    "--judge_steps",
    type=flags.count,
    default=1500,
    help="for how many steps the detector of scenes is fitted",
  )
  restored.add_method(parser)
  parser.add_argument("--seed", type=flags.seed, default=0, help="of the noise")


def run(args) -> None:
  """Evaluates, writes the report, and prints it."""
  found = restored.open(args.workdir, ema=args.ema)
  workdir.require_writable(args.workdir / "report.json", "report")
  if found.config.is_autoencoder:
    _reconstructions(found, args)
    return
  method = restored.method(found.config, args)
  restored.refuse_unheeded(found, method, args)
  likelihood = _likelihood(found, args) if args.likelihood else None
  report = {
    **export.read_report(found, ema=args.ema),
    **export.identity(found, ema=args.ema),
    "parameters": found.run.parameters,
    **_validation(found),
  }
  if likelihood is not None:
    report |= _bits(found, likelihood)
  report |= _scores(found, method, args)
  _write(report, args)


def _scores(
  found: restored.Restored, method: methods.SampleConfig, args
) -> dict:
  """Scores pictures by what the network is told, where a judge knows of it."""
  data = found.config.data
  if found.config.task.name in tasked.SCORES:
    return tasked.evaluate(found, method, args)
  if untold.between_digits(data):
    return untold.translation(found, method, args)
  if data.source == "digits" and (scored := _of_digits(found)):
    splits = [sources.labelled(data, split) for split in sources.SPLITS]
    return scored(found, method, args, *splits)
  if data.source == "scenes" and found.config.layout.classes:
    return placement.evaluate(found, method, args)
  if data.source == "scenes" and drawing.reads_captions(found.run.network):
    return obedience.evaluate(found, method, args)
  return {}


def _of_digits(found: restored.Restored) -> Callable[..., dict] | None:
  """Returns what scores digits by what the network is told, if anything."""
  if found.config.embedding.size:
    return variations.evaluate
  told = models.told(found.config.model)
  return {"labels": _digits, "nothing": untold.evaluate}.get(told)


def _write(report: dict, args) -> None:
  path = args.workdir / "report.json"
  if distributed.is_first():
    workdir.write_json(path, report)
  print_report(report)
  print(f"  {'report':<24} {path}")


def _reconstructions(found: restored.Restored, args) -> None:
  """Scores the reconstructions of held-out images, and shows some of them."""
  if args.likelihood:
    restored.require_field(found, "find the likelihood of")
  restored.refuse_method(found, args)
  with meshes.use(found.run.mesh), loop.out_of_memory_advice():
    scores = train.held_out_loss(found.run).run(found.params)
  report = {
    **export.read_report(found, ema=args.ema),
    **export.identity(found, ema=args.ema),
    "parameters": found.run.parameters,
    **scores,
  }
  pair = drawing.reconstructor(found.run, SHOWN)(found.params)
  grid = pictures.pairs(*pair)
  path = found.directory / "reconstructions.png"
  if distributed.is_first():
    pictures.save_png(grid, path)
  _write(report, args)
  print(f"  {'originals above them':<24} {path}")


def print_report(report: dict) -> None:
  """Prints the numbers of a report, one a line."""
  for key, value in report.items():
    if isinstance(value, dict):
      print(f"  {key}")
      for name, item in value.items():
        print(f"    {name:<22} {_number(item)}")
    else:
      print(f"  {key:<24} {_number(value)}")


def _number(value) -> str:
  if isinstance(value, float):
    return f"{value:.4g}" if abs(value) < 1e4 else f"{value:.0f}"
  return f"{value:,}" if isinstance(value, int) else str(value)


def _validation(found: restored.Restored) -> dict[str, float]:
  with meshes.use(found.run.mesh), loop.out_of_memory_advice():
    scores = train.held_out_loss(found.run).run(found.params)
  return {"validation_loss": scores["validation_loss"]}


def _likelihood(found: restored.Restored, args) -> losses.Loss:
  """Returns -log2 p of images per dimension, as levels of grey, as a loss."""
  flow = found.config.flow
  levels = args.levels or flow.levels
  if levels is None or flow.coupling.name == "pairs":
    raise errors.UserError(
      "--likelihood needs the number of values that a pixel has (--levels=17 "
      "for the 8x8 digits, 256 for images of 8 bits), and a flow from noise, "
      "not from images."
    )
  way = dataclasses.replace(flow.likelihood, steps=args.likelihood_steps)
  flow = dataclasses.replace(flow, levels=levels, likelihood=way)
  return flow.bits(found.run.network)


def _bits(found: restored.Restored, loss: losses.Loss) -> dict[str, float]:
  with meshes.use(found.run.mesh), loop.out_of_memory_advice():
    scores = train.held_out(found.run, loss).run(found.params)
  return {"bits_per_dimension": scores["validation_loss"]}


def _digits(
  found: restored.Restored,
  method: methods.SampleConfig,
  args,
  training: variations.Labelled,
  held_out: variations.Labelled,
) -> dict:
  """Scores samples of digits, with the guidance of the config and without."""
  judge = digits.Digits(*training, *held_out, seed=args.seed)
  _, train_labels = training
  labels = np.arange(args.num, dtype=np.int32) % judge.classes
  # As many unguided samples as training images, of the same classes: the two
  # distances to the held-out images are then estimated alike.
  total = len(labels) + len(train_labels)
  unguided = dataclasses.replace(method, guidance=methods.GuidanceConfig())
  with progress.counter("samples", total) as done:
    guided = found.draw(
      {"label": labels}, seed=args.seed, done=done, method=method
    )
    plain = found.draw(
      {"label": train_labels},
      seed=args.seed + 1,
      done=lambda count: done(len(labels) + count),
      method=unguided,
    )
  path = found.directory / "samples.png"
  if distributed.is_first():
    pictures.save_png(pictures.grid(guided[:100], columns=10), path)
  with_guidance = judge.score(guided, labels)
  without = judge.score(plain, train_labels)
  return {
    "samples": args.num,
    "guidance": method.guidance.scale,
    "classifier_accuracy": judge.accuracy,
    "sample_accuracy": with_guidance["sample_accuracy"],
    "sample_accuracy_unguided": without["sample_accuracy"],
    "frechet": with_guidance["frechet"],
    "frechet_unguided": without["frechet"],
    "frechet_real": judge.frechet_real,
    "nearest_neighbour": without["nearest_neighbour"],
  }
