"""One sitting of a run: batches in, steps, metrics, looks and saves."""

import collections.abc
import contextlib
import dataclasses
import logging
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flowjax import errors, schema
from flowjax.data import loader, sources
from flowjax.parallel import chips, placing, programs
from flowjax.parallel import mesh as meshes
from flowjax.train import (
  checkpoint,
  metrics,
  parts,
  progress,
  signals,
  watchdog,
)
from flowjax.train import state as states

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


@contextlib.contextmanager
def outlived(what: str):
  """Says that the disk failed where the run does not depend on it."""
  try:
    yield
  except OSError as error:
    logging.error(
      "%s: %s: %s. The run goes on without.", what, type(error).__name__, error
    )


class Session:
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
    # As the last checkpoint has it, over all sittings.
    self.seconds = self.seconds_before = before["train_seconds"]
    self._timed = first
    self.started = time.monotonic()
    self.behind = metrics.Behind()
    self.first, self.bar = first, self._progress(first)
    # What an earlier FlowJAX did not count begins with 0.
    self.counts = {name: before.get(name, 0) for name in COUNTED}
    self.skipped_in_row = 0
    self.watchdog = watchdog.Watchdog(run.experiment.log.hung_after)
    self._sum = jax.jit(jnp.sum, out_shardings=meshes.replicated(run.mesh))

  def go(
    self,
    state: states.TrainState,
    stop: signals.StopRequest,
    compiled: collections.abc.Callable[[programs.Told], Any],
  ) -> states.TrainState:
    """Steps from `first` to the end, or until it is asked to stop.

    `compiled(told)` gives the step, and is called where there is one to be
    taken.
    """
    if self.first >= self.config.steps:
      logging.info("Nothing to do: step %d is the last.", self.first)
      return state
    stop.begin(self.first)
    if why := stop.after(self.first):
      raise errors.Preempted(
        f"{why}: no step was taken after {self.first}, and there is nothing to "
        "save. The same command begins again."
      )
    with (
      self._batches(self.first) as batches,
      self.bar,
      self.watchdog,
    ):
      step = compiled(self._compiling)
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

  def _compiling(self, what: str) -> None:
    self.bar.say(what)
    self.watchdog.beat()

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
    if number != self._timed:  # A step is saved again where that failed.
      self._timed = number
      self.seconds = self.seconds_before + time.monotonic() - self.started
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
