"""Trains a network from a config, into a workdir.

Started again on the same workdir it goes on from the newest checkpoint that is
sound, exactly as if it had not been stopped.

example:
  flowjax train --config=configs/digits_dit.py --workdir=runs/digits \\
    --config.optim.learning_rate=1e-4
"""

import functools
import logging
import pathlib
from typing import Any

import jax
import numpy as np

from flowjax import schema
from flowjax.commands import configs, drawing, encode, flags
from flowjax.data import canvas, loader, sources
from flowjax.evaluate import pictures, validation
from flowjax.flow import losses
from flowjax.parallel import compiler_flags, distributed, placing, programs
from flowjax.parallel import mesh as meshes
from flowjax.train import aspects, latents, loop, parts, session
from flowjax.train import state as states


def add_flags(parser) -> None:
  """Adds the flags of `train`."""
  parser.add_argument("--config", required=True, help=configs.HELP)
  parser.add_argument(
    "--workdir",
    type=flags.path,
    required=True,
    help="the folder for checkpoints, metrics and pictures",
  )
  parser.add_argument(
    "--allow_config_change",
    action="store_true",
    help="go on in a workdir that was made with another config",
  )
  flags.add_compiler_flags(parser)


def run(args) -> None:
  """Trains, and prints where the results are."""
  config = configs.load(args.config, args.overrides)
  if args.compiler_flags:
    print(compiler_flags.apply())
  distributed.agree("config", schema.to_dict(config))
  encode.refuse_others(config, args.workdir)
  result = loop.train(
    config,
    args.workdir,
    evaluators=lambda built: evaluators(built, args.workdir),
    allow_config_change=args.allow_config_change,
  )
  step = int(result.state.step)
  print(f"Step {step}, after {result.seconds:.0f} s of training in all.")
  if result.corrupt:
    print(
      f"{result.corrupt} times a corrupt record was passed over; each is named "
      "above, once."
    )
  if result.truncated:
    print(
      f"{result.truncated} times a caption was cut: it has more tokens than "
      f"config.data.tokens = {config.data.tokens}."
    )
  for name in ("checkpoints", "samples", "curves.png", "metrics.jsonl"):
    if (args.workdir / name).exists():
      print(f"  {name:<14} {args.workdir / name}")


def evaluators(
  built: parts.Parts, directory: pathlib.Path
) -> list[session.Evaluator]:
  """Returns what is looked at while training: held-out loss, and pictures."""
  log, found = built.experiment.log, []
  if log.validation_every:
    found.append(session.Evaluator(log.validation_every, _validation(built)))
  if log.samples_every:
    look = _samples
    if built.experiment.is_autoencoder:
      look = _reconstructions
    found.append(session.Evaluator(log.samples_every, look(built, directory)))
  return found


def held_out_loss(
  built: parts.Parts, *, ahead: bool = False
) -> validation.Validation:
  """Returns what evaluates weights on the held-out split, at fixed times."""
  loss = built.experiment.validation_loss(built.network)
  return held_out(built, loss, ahead=ahead)


def held_out(
  built: parts.Parts, loss: losses.Loss, *, ahead: bool = False
) -> validation.Validation:
  """Returns what evaluates a loss on the held-out split.

  `ahead` compiles it now for each bucket, and for averages as they are trained.
  """
  config = built.experiment
  loss = config.task.prepared(loss)
  loss = aspects.prepared(config.model, config.data, loss)
  loss = latents.evaluation(config.encoded, config.data, loss)
  source = sources.open(config.data, "held_out")
  size = meshes.padded(min(config.data.batch_size, len(source)), built.mesh)
  rows = placing.rows(built.mesh, size)
  return validation.Validation(
    loss,
    lambda: (
      canvas.of(batch, config.data)
      for batch in loader.epoch_batches(
        source, size, rows=rows, on_corrupt=config.data.on_corrupt
      )
    ),
    seed=config.seed,
    put=placing.put_part(built.mesh, size),
    together=functools.partial(_ahead, built, source, size)
    if ahead and config.data.buckets and not config.data.padded_patch
    else distributed.together,
  )


def _ahead(built: parts.Parts, source: sources.Source, size: int, jitted: Any):
  """Returns the jitted loss of held-out batches, compiled for each bucket."""
  params = states.averaged(built.abstract)
  sharding = meshes.batch_sharding(built.mesh)
  mask = {"mask": jax.ShapeDtypeStruct((size,), np.float32)}
  kinds = [
    (
      params,
      programs.abstract({**batch, **mask}, sharding),
      jax.eval_shape(lambda: jax.random.key(0)),
      jax.ShapeDtypeStruct((), np.int32),
    )
    for batch in loop.shapes(source, built.experiment.data, size)
  ]
  with meshes.use(built.mesh):
    return programs.ahead(
      jitted, kinds, lambda what: logging.info("Validation: %s.", what)
    )


def _validation(built: parts.Parts):
  evaluator = held_out_loss(built, ahead=True)

  def look(state: states.TrainState):
    return evaluator.run(states.averaged(state)), {}

  return look


def _samples(built: parts.Parts, directory: pathlib.Path):
  config = built.experiment
  count = config.log.sample_count
  draw = drawing.build(built, config.sample, count)
  cond = drawing.conditions(built, count)
  named = drawing.captions(built, count)
  beside = drawing.beside(built, cond)

  def look(state: states.TrainState):
    def stopped(reason: str) -> None:
      logging.warning("Samples of step %d: %s", int(state.step), reason)

    images = draw(
      states.averaged(state),
      cond,
      seed=config.seed,
      stopped=stopped,
      count=count,
    )
    grid = pictures.sheet(images, named, beside=beside)
    _save(grid, directory, state)
    return {}, {"samples": grid[None]}

  return look


def _reconstructions(built: parts.Parts, directory: pathlib.Path):
  """Shows held-out images, and below them what is made of their latents."""
  reconstruct = drawing.reconstructor(built, built.experiment.log.sample_count)

  def look(state: states.TrainState):
    pair = reconstruct(states.averaged(state))
    grid = pictures.pairs(*pair)
    _save(grid, directory, state)
    return {}, {"samples": grid[None]}

  return look


def _save(grid, directory: pathlib.Path, state: states.TrainState) -> None:
  if not distributed.is_first():
    return
  folder = directory / "samples"
  with session.outlived("THE SAMPLES WERE NOT WRITTEN"):
    folder.mkdir(exist_ok=True)
    pictures.save_png(grid, folder / f"step_{int(state.step):07d}.png")
