"""The story of a run: claim the workdir, restore or begin, step, save, end."""

import collections.abc
import contextlib
import dataclasses
import logging
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flowjax import errors, models, schema
from flowjax.data import loader, sources
from flowjax.parallel import chips, distributed, placing, rules, sums
from flowjax.parallel import mesh as meshes
from flowjax.train import (
  checkpoint,
  curves,
  experiment,
  latents,
  lock,
  metrics,
  optim,
  parts,
  progress,
  signals,
  watchdog,
  workdir,
)
from flowjax.train import state as states
from flowjax.train import step as steps

# What is counted in batches: the key of its marks, and the metric.
COUNTED = {
  "corrupt": ("skipped", "corrupt_records"),
  "truncated": ("truncated", "truncated_captions"),
}


@dataclasses.dataclass(frozen=True)
class Evaluator:
  """Something to look at every so many steps, and at the last.

  `run(state)` returns scalars and images [N, H, W, C] in uint8, by name.
  """

  every: int
  run: collections.abc.Callable[
    [states.TrainState], tuple[dict[str, float], dict[str, np.ndarray]]
  ]


@dataclasses.dataclass(frozen=True)
class Result:
  """How a run ended: its state, and the seconds it has trained in all.

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
  evaluators: collections.abc.Callable[[parts.Parts], list[Evaluator]],
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
    num_classes=None if nothing else config.model.num_classes,
    channels=config.model.channels,
    image_size=config.model.image_size,
    text_width=getattr(config.model, "text_width", None),
    pooled_width=getattr(config.model, "pooled_width", None),
  )
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
    session = _Session(run, source, saved, writer, looks, before, first)
    state = session.go(state, stop)
    with outlived("THE CURVES WERE NOT DRAWN"):
      if distributed.is_first():
        curves.draw(directory / "metrics.jsonl", directory / "curves.png")
    counts = {name: int(count) for name, count in session.counts.items()}
    return Result(state, session.seconds, *counts.values())


@contextlib.contextmanager
def out_of_memory_advice():
  """Says what to turn down when a device has too little memory."""
  try:
    yield
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    cause = str(error).splitlines()[0]
    raise errors.UserError(
      f"A device ran out of memory: {cause}\nTurn down "
      "config.data.batch_size, or turn up config.optim.accumulate, "
      "config.mesh.fsdp, or config.model.remat ('dots', then 'full'). "
      "`flowjax describe` shows the memory per device before a run."
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
  loss = config.loss(network)
  step = steps.build(
    latents.training(config.encoded, config.data, loss),
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


def lower_step(run: parts.Parts):
  """Lowers the step for a batch of the config's shapes; nothing is run."""
  sharding = meshes.batch_sharding(run.mesh)
  batch = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
    batch_shapes(run),
  )
  with meshes.use(run.mesh):
    return jit_step(run).lower(run.abstract, batch)


def batch_shapes(run: parts.Parts) -> dict[str, Any]:
  """Returns a batch of the config in the abstract, as its source gives it."""
  config, count = run.experiment, run.experiment.data.batch_size
  encoded = latents.shapes(config.data, count)
  if encoded is not None:
    return encoded
  size = (count, *config.model.image_size, config.model.channels)
  image = jax.ShapeDtypeStruct(size, np.float32)
  cond = jax.eval_shape(lambda: run.network.example(count))
  paired = config.data.pair_source is not None
  return {"image": image, **cond, **({"source": image} if paired else {})}


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


@contextlib.contextmanager
def outlived(what: str):
  """Says that the disk failed where the run does not depend on it."""
  try:
    yield
  except OSError as error:
    logging.error(
      "%s: %s: %s. The run goes on without.", what, type(error).__name__, error
    )


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


class _Session:
  """One sitting of a run, from restore to end, stop or signal."""

  def __init__(
    self,
    run: parts.Parts,
    source: sources.Source,
    saved: checkpoint.Checkpoints,
    writer: metrics.Writer,
    evaluators: list[Evaluator],
    before: dict[str, Any],
    first: int,
  ):
    self.run, self.saved, self.writer = run, saved, writer
    self.config = run.experiment
    self.source, self.evaluators = source, evaluators
    self.seconds_before = before["train_seconds"]
    self.started = time.monotonic()
    self.behind = metrics.Behind()
    self.first, self.bar = first, self._progress(first)
    # What an earlier FlowJAX did not count begins with 0.
    self.counts = {name: before.get(name, 0) for name in COUNTED}
    self.skipped_in_row = 0
    self.watchdog = watchdog.Watchdog(run.experiment.log.hung_after)
    self._sum = jax.jit(jnp.sum, out_shardings=meshes.replicated(run.mesh))

  @property
  def seconds(self) -> float:
    """Seconds trained, over all sittings."""
    return self.seconds_before + time.monotonic() - self.started

  def go(
    self, state: states.TrainState, stop: signals.StopRequest
  ) -> states.TrainState:
    """Steps from `first` to the end, or until it is asked to stop."""
    if self.first >= self.config.steps:
      logging.info("Nothing to do: step %d is the last.", self.first)
      return state
    stop.begin(self.first)
    if why := stop.after(self.first):
      raise errors.Preempted(
        f"{why}: no step was taken after {self.first}, and there is nothing to "
        "save. The same command begins again."
      )
    step = distributed.together(jit_step(self.run))
    with (
      self._batches(self.first) as batches,
      self.bar,
      self.watchdog,
    ):
      for number in range(self.first + 1, self.config.steps + 1):
        with self.bar.waiting():
          batch, marks = next(batches)
        state, values = step(state, batch)
        for name, marks_B in marks.items():
          self.counts[name] = self.counts[name] + self._sum(marks_B)
        counts = {COUNTED[name][1]: n for name, n in self.counts.items()}
        self._report(number, {**values, **counts})
        self.watchdog.beat()
        last = number == self.config.steps
        if last:
          self._catch_up()
        if self._is_stuck():
          self._give_up(number, state)
        # Before evaluators look at it: whatever befalls them, it is safe.
        if last or number % self.config.checkpoint.every == 0:
          self._save(number, state)
        self._look(number, state)
        if why := stop.after(number):
          self._save_for_good(number, state)
          raise errors.Preempted(
            f"{why}: saved at step {number}. The same command goes on from "
            "there."
          )
      self._save_for_good(self.config.steps, state)
    return state

  def _progress(self, first: int) -> progress.Progress:
    images = self.config.data.batch_size
    return progress.Progress(
      self.config.steps,
      images,
      flops_per_step=self.run.flops * images,
      peak_flops=chips.peak_flops(jax.devices()[0]),
      device_count=self.run.mesh.size,
      start_step=first,
    )

  @contextlib.contextmanager
  def _batches(self, first: int):
    """Yields batches on the devices, and marks of what is counted in them.

    They are read ahead: only a batch that is trained on may be counted, and
    only this thread may compute, as all processes must in the same order.
    """
    mesh, count = self.run.mesh, self.config.data.batch_size
    host = loader.batches(
      self.source,
      self.config.data,
      start_step=first,
      rows=placing.rows(mesh, count),
    )

    place = placing.put_part(mesh, count)

    def put(batch):
      batch = place(batch)
      marks = {
        name: batch.pop(key)
        for name, (key, _) in COUNTED.items()
        if key in batch
      }
      return batch, marks

    with contextlib.closing(
      loader.to_device(host, put, self.config.data.prefetch)
    ) as batches:
      yield batches

  def _report(self, number: int, values: dict) -> None:
    """Writes the metrics of earlier steps, whose values have arrived."""
    self.behind.push(number, values)
    for done, scalars in self.behind.ready():
      self._note(done, scalars)

  def _catch_up(self) -> None:
    """Writes the metrics of every step taken so far."""
    for done, scalars in self.behind.rest():
      self._note(done, scalars)

  def _note(self, number: int, scalars: dict[str, float]) -> None:
    self.bar.update(number, scalars["loss"])
    self.skipped_in_row = int(scalars["skipped_in_row"])
    last = number == self.config.steps
    if number % self.config.log.metrics_every == 0 or last:
      for _, name in COUNTED.values():
        if not scalars[name]:
          del scalars[name]
      self.writer.write_scalars(number, {**scalars, **self.bar.rates()})

  def _is_stuck(self) -> bool:
    """Tells whether the newest updates, up to the last, were not finite."""
    most = self.config.optim.max_skipped
    if self.skipped_in_row >= most:
      self._catch_up()  # What is known is a step old: that one may be finite.
    return self.skipped_in_row >= most

  def _look(self, number: int, state: states.TrainState) -> None:
    """Runs the evaluators that are due."""
    last = number == self.config.steps
    for evaluator in self.evaluators:
      if not evaluator.every or not (last or number % evaluator.every == 0):
        continue
      # Of several processes, all must come to the end of what they evaluate.
      alone = jax.process_count() == 1
      lenient = outlived if alone else contextlib.nullcontext
      with lenient(f"AN EVALUATION AT STEP {number} FAILED"):
        with self.bar.paused(), self.watchdog.paused():
          scalars, images = evaluator.run(state)
        if scalars:
          self.writer.write_scalars(number, scalars)
        if images:
          self.writer.write_images(number, images)

  def _save(self, number: int, state: states.TrainState) -> bool:
    # A kill after this save must not lose what was measured before it.
    self._catch_up()
    extra: dict[str, Any] = {
      "config": schema.to_dict(self.config),
      "data": loader.state(self.config.data, number, self.source),
      "train_seconds": self.seconds,
      **{name: int(count) for name, count in self.counts.items()},
    }
    return self.saved.save(number, state, extra)

  def _save_for_good(self, number: int, state: states.TrainState) -> None:
    """Saves what must not be lost, and waits until it is on disk."""
    with self.watchdog.paused():  # A save has a time limit of its own.
      saved = self._save(number, state) and self.saved.wait()
    if not saved:
      raise errors.CheckpointError(
        f"The state of step {number} could not be saved, for the reason above. "
        f"The checkpoints {self.saved.steps()} stand; mend the disk and run "
        "the same command again."
      )

  def _give_up(self, number: int, state: states.TrainState):
    """Saves the last good state, which no skipped step has touched."""
    self._save_for_good(number, state)
    raise errors.NumericError(
      f"The last {self.skipped_in_row} updates were not finite, and "
      f"none was applied; the last good state is saved at step {number}. Try a "
      "lower config.optim.learning_rate, config.optim.clip_norm=1.0, a longer "
      "config.optim.warmup_steps or config.model.dtype='float32', with "
      "--allow_config_change; earlier checkpoints are "
      f"{self.saved.steps()[:-1]}: to go on from one of them, move the later "
      "ones out of the workdir."
    )
