"""The story of a run: claim the workdir, restore or begin, step, save, end."""

import collections.abc
import contextlib
import dataclasses
import functools
import logging
import pathlib
from typing import Any

import jax
import numpy as np

from flowjax import errors, models, schema
from flowjax.data import buckets, loader, sources
from flowjax.data import config as data_config
from flowjax.parallel import distributed, programs, room, rules, sums
from flowjax.parallel import mesh as meshes
from flowjax.train import (
  aspects,
  checkpoint,
  curves,
  experiment,
  latents,
  lock,
  metrics,
  optim,
  parts,
  signals,
  tasks,
  workdir,
)
from flowjax.train import session as sessions
from flowjax.train import state as states
from flowjax.train import step as steps

Evaluator = sessions.Evaluator


@dataclasses.dataclass(frozen=True)
class Result:
  """How a run ended: its state, and the seconds of training that were saved.

  `corrupt` counts how often a corrupt record was passed over, in all sittings,
  and `truncated` how often a caption was cut.
  """

  state: states.TrainState
  seconds: float
  corrupt: int
  truncated: int = 0


def train(
  config: experiment.Experiment,
  directory: pathlib.Path,
  *,
  evaluators: collections.abc.Callable[[parts.Parts], list[sessions.Evaluator]],
  allow_config_change: bool = False,
) -> Result:
  """Trains until `config.steps`, from the newest sound checkpoint if any.

  Raises Preempted after a signal, NumericError after too many updates in a row
  that were not finite, CheckpointError if no checkpoint is sound, and
  UserError before any work for what cannot be trained.
  """
  source = sources.open(config.data, "train")
  nothing = models.told(config.model) == "nothing"
  sources.check(
    source,
    batch_size=config.data.batch_size,
    # Who is told nothing, or an image, has no use for what is said of it.
    num_classes=None
    if nothing or config.embedding.size
    else config.model.num_classes,
    channels=config.model.channels,
    image_size=config.model.image_size,
    text_width=getattr(config.model, "text_width", None),
    pooled_width=getattr(config.model, "pooled_width", None),
    embedding=0 if config.embedding.depth else config.embedding.size,
  )
  aspects.check_sizes(config.model, source)
  config.require_context()
  workdir.require_no_other(directory)
  run = parts.build(config)
  looks = evaluators(run)
  _warn_of_whole_parameters(run)
  with (
    signals.watch() as stop,
    lock.WorkdirLock(directory),
    out_of_memory_advice(),
    contextlib.ExitStack() as stack,
  ):
    saved = checkpoint.Checkpoints(directory / "checkpoints", config.checkpoint)
    stack.callback(saved.close)
    # A run that never saved has nothing that another config could spoil.
    if saved.steps() and not allow_config_change:
      workdir.refuse_changes(directory, workdir.changes(directory, config))
    state, before = _restore_or_begin(run, saved, source)
    if distributed.is_first():
      workdir.claim(directory, config)
    stack.enter_context(meshes.use(run.mesh))
    first = int(state.step)
    writer = metrics.Writer(
      directory,
      tensorboard=config.log.tensorboard,
      backend=config.log.backend,
      resume_step=first,
    )
    stack.callback(writer.close)
    writer.write_hparams(schema.to_dict(config))
    session = sessions.Session(run, source, saved, writer, looks, before, first)
    state = session.go(state, stop, functools.partial(compiled, run, source))
    with sessions.outlived("THE CURVES WERE NOT DRAWN"):
      if distributed.is_first():
        curves.draw(directory / "metrics.jsonl", directory / "curves.png")
    counts = {name: int(count) for name, count in session.counts.items()}
    return Result(state, session.seconds, *counts.values())


@contextlib.contextmanager
def out_of_memory_advice():
  """Says what to turn down when a device has too little memory."""
  try:
    yield
  except (jax.errors.JaxRuntimeError, room.NoRoom) as error:
    cause = str(error).splitlines()[0]
    if isinstance(error, room.NoRoom):
      cause = f"There is too little memory: {cause}"
    elif "RESOURCE_EXHAUSTED" in str(error):
      cause = f"A device ran out of memory: {cause}"
    else:
      raise
    raise errors.UserError(
      f"{cause}\nTurn down config.data.batch_size or the size of config.model, "
      "or turn up config.optim.accumulate, config.mesh.fsdp, or "
      "config.model.remat ('dots', then 'full'). `flowjax describe` shows the "
      "memory per device before a run."
    ) from error


def jit_step(run: parts.Parts):
  """Returns the step, jitted with its shardings and donating its state."""
  config, network = run.experiment, run.network
  # One part is summed once as it is; and an autoencoder's loss is more than a
  # mean over examples, which shares of a batch could find apart.
  apart = config.optim.accumulate > 1 and not config.is_autoencoder
  summing = sums.Sums(
    config.optim.reduce_dtype,
    run.mesh.shape["data"] if apart else 1,
    run.rules,
  )
  if summing.shares > 1:
    network = models.over_shares(network, summing.over)
  loss = config.task.prepared(config.loss(network))
  step = steps.build(
    latents.training(
      config.encoded,
      config.data,
      aspects.prepared(config.model, config.data, loss),
    ),
    run.optimizer,
    seed=config.seed,
    ema_config=config.ema,
    accumulate=config.optim.accumulate,
    schedule=optim.schedule(config.optim, config.steps),
    frozen=run.frozen,
    summing=summing,
    opt_places=parts.shardings_of(run.abstract.opt_state),
  )
  return jax.jit(
    step,
    donate_argnums=0,
    out_shardings=(
      parts.shardings_of(run.abstract),
      meshes.replicated(run.mesh),
    ),
  )


def compiled(
  run: parts.Parts, source: sources.Source, told: programs.Told
) -> collections.abc.Callable[..., Any]:
  """Returns the step for the batches of a source.

  Where these have several shapes it is compiled for all of them, now.
  """
  kinds = shapes(source, run.experiment.data, run.experiment.data.batch_size)
  if len(kinds) == 1:
    return distributed.together(jit_step(run))
  sharding = meshes.batch_sharding(run.mesh)
  for batch in kinds:  # What is counted is counted before the step.
    for key, _ in sessions.COUNTED.values():
      batch.pop(key, None)
  batches = (programs.abstract(batch, sharding) for batch in kinds)
  return programs.ahead(
    jit_step(run), [(run.abstract, batch) for batch in batches], told
  )


def shapes(
  source: sources.Source, data: data_config.DataConfig, count: int
) -> list[dict[str, Any]]:
  """Returns batches of so many records in the abstract, one of each bucket.

  Without buckets, and on canvases, it is one.
  """
  parts = (source,) if data.padded_patch else buckets.parts_of(source)
  batches = []
  for part in parts:
    blank = {key: np.asarray(leaf) for key, leaf in sources.blank(part).items()}
    batch = {
      key: jax.ShapeDtypeStruct((count, *leaf.shape), leaf.dtype)
      for key, leaf in blank.items()
    }
    batches.append(aspects.on_canvas(batch, data))
  return batches


def lower_step(run: parts.Parts):
  """Lowers the step for a batch of the config's shapes; nothing is run."""
  sharding = meshes.batch_sharding(run.mesh)
  batch = programs.abstract(batch_shapes(run), sharding)
  with meshes.use(run.mesh):
    return jit_step(run).lower(run.abstract, batch)


def batch_shapes(run: parts.Parts) -> dict[str, Any]:
  """Returns a batch of the config in the abstract, as its source gives it."""
  config, count = run.experiment, run.experiment.data.batch_size
  batch = latents.shapes(config.data, count)
  if batch is None:
    size = (count, *config.model.image_size, config.model.channels)
    image = jax.ShapeDtypeStruct(size, np.float32)
    cond = jax.eval_shape(lambda: run.network.example(count))
    for key in tasks.MADE:
      cond.pop(key, None)
    paired = config.data.pair_source is not None
    batch = {"image": image, **cond, **({"source": image} if paired else {})}
  return aspects.on_canvas(batch, config.data)


def _warn_of_whole_parameters(run: parts.Parts) -> None:
  """Says which large parameters a mesh was to divide and cannot."""
  places = rules.places(run.rules, run.abstract.params, run.mesh).values()
  whole = [place for place in places if place.undivided]
  if whole:
    size = sum(place.bytes_per_device for place in whole)
    names = ", ".join(f"{place.name} {place.shape}" for place in whole)
    logging.warning(
      "These parameters stay whole where their dims do not divide over the "
      "mesh, %.1f MiB on every device: %s.", size / 2**20, names,
    )  # fmt: skip


def _restore_or_begin(run, saved, source):
  """Returns the state to go on from, and what earlier sittings add up to."""
  restored = saved.restore(run.abstract)
  if restored is None:
    return run.initial_state(), {"train_seconds": 0.0}
  # Not config.json: it names the new data from the moment the change was
  # allowed, and a run killed before its next save has seen only the old.
  rows = workdir.difference(restored.extra["config"], run.experiment)
  seen = restored.extra["data"]  # Nothing by weights that were imported.
  if seen and not any(row.startswith("config.data") for row in rows):
    loader.check_state(seen, run.experiment.data, source)
  logging.info("Going on from step %d.", restored.step)
  state = restored.state
  if int(state.skipped_in_row) >= run.experiment.optim.max_skipped:
    # The user started again after the stop: give it as many tries anew.
    state = state._replace(skipped_in_row=state.skipped_in_row * 0)
  return state, restored.extra
