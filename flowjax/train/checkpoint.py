"""Checkpoints: asynchronous, atomic, sharded, and proved before they are used.

Orbax writes the arrays. One step of it holds three items, committed by one
rename: `state` (the arrays), `manifest` (shape, dtype and fingerprint of each)
and `extra` (JSON: data state, config). Beside the folder, `checkpoints.json`
says which step was saved last. The folder is on a POSIX file system that all
processes share.
"""

import collections.abc
import contextlib
import dataclasses
import itertools
import json
import logging
import os
import pathlib
import shutil
import threading
import time
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint._src.metadata import array_metadata_store

from flowjax.train import disk, lock, manifest, quiet, reading

# What is in the name of a folder that Orbax has not committed.
TEMPORARY = ".orbax-checkpoint-tmp"
# What follows the number of an unsound step that was saved again.
ASIDE = ".unsound"
# Devices that hold copies of an array write a part of it each, if the parts
# have so many bytes: to cut out smaller ones takes longer than to write them.
PART = 2**20


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
  """How often a checkpoint is saved, and which ones are kept.

  The newest `keep_last` are kept, and every step divisible by `keep_every`. A
  save that takes longer than `timeout` seconds counts as failed.
  """

  every: int = 1000
  keep_last: int = 3
  keep_every: int | None = None
  timeout: int = 1200

  def __post_init__(self):
    for name in ("every", "keep_last", "keep_every", "timeout"):
      value = getattr(self, name)
      if value is not None and value < 1:
        raise ValueError(f"{name} = {value} must be at least 1.")


class Checkpoints:
  """The checkpoints in a folder, for one writer or any number of readers.

  A reader changes nothing on disk. A writer should hold the lock of the folder
  or of the one above; then it also removes what an interrupted save left.
  """

  def __init__(
    self,
    directory: str | os.PathLike,
    config: CheckpointConfig | None = None,
    *,
    read_only: bool = False,
  ):
    self.directory = pathlib.Path(directory).absolute()
    self._reader = reading.Reader(self.directory)
    self._writer = None
    if not read_only:
      config = config or CheckpointConfig()
      self._writer = _Writer(self.directory, config, self._reader)

  def steps(self) -> list[int]:
    """Returns the committed steps on disk, sound or not, oldest first."""
    return self._reader.steps()

  def last_saved(self) -> int | None:
    """Returns the step that was saved last, there or not, None if none was.

    It is -1 where that cannot be told.
    """
    return self._reader.last_saved()

  def save(self, step: int, state: Any, extra: Any) -> bool:
    """Begins to save a state; when this returns its buffers may be donated.

    The arrays are on the host by then, and are written behind the training. A
    step that is there already is left alone. A save still running is waited
    for: no step is skipped, and never more than one copy is held. Returns False
    if the disk did not let the save begin, after saying so; if it fails later,
    that is said when it does, and shows in what `wait` returns. Any other
    error is a defect, and is raised here or by the next `save` or `wait`.

    An unsound step that is saved again stays beside it, as `3.unsound`, until
    a later step is saved.
    """
    assert self._writer is not None, "opened read-only"
    return self._writer.save(step, state, extra)

  def wait(self) -> bool:
    """Waits for a save in progress; returns whether the last is on disk."""
    return self._writer.wait() if self._writer else True

  def close(self) -> None:
    """Waits for a save in progress and lets go of all threads."""
    if self._writer is not None:
      self._writer.close()
    self._reader.close()

  def restore(
    self, abstract_state: Any, step: int | None = None
  ) -> reading.Restored | None:
    """Restores the newest sound step, or the given one, as `abstract_state`.

    That is a pytree of ShapeDtypeStruct with shardings on any mesh. Returns
    None if there was never a checkpoint. Raises CheckpointError if there are
    some and none is sound, or if they are gone, if the disk does not let one be
    read, and if the names, shapes or dtypes in a sound manifest are not those
    of `abstract_state`.
    """
    self.wait()
    return self._reader.restore(abstract_state, step, whole=True)

  def restore_subtree(
    self, abstract: dict[str, Any], step: int | None = None
  ) -> reading.Restored | None:
    """Restores only the parts of a state that `abstract` names at its top.

    Other leaves are neither read nor verified: `{"ema": ...}` is enough to
    sample. All else is as in `restore`.
    """
    self.wait()
    return self._reader.restore(abstract, step, whole=False)


def _handlers() -> ocp.CheckpointHandlerRegistry:
  """Returns Orbax's own handlers, but for who writes small arrays."""
  arrays = ocp.type_handlers.ArrayHandler(
    min_slice_bytes_for_replica_parallel=PART,
    # As in the handler that Orbax makes by itself; it keeps the kind of a key.
    array_metadata_store=array_metadata_store.Store(),
  )
  registry = ocp.DefaultCheckpointHandlerRegistry()
  state = ocp.PyTreeCheckpointHandler(
    type_handler_registry=ocp.type_handlers.create_type_handler_registry(
      (jax.Array, arrays)
    )
  )
  registry.add("state", ocp.args.PyTreeSave, state)
  return registry


class _Writer:
  """Saves through Orbax, and outlives a disk that fails."""

  def __init__(
    self,
    directory: pathlib.Path,
    config: CheckpointConfig,
    reader: reading.Reader,
  ):
    self._directory, self._reader = directory, reader
    self._failures = 0  # Since the last save that did not fail.
    self._failed: set[int] = set()
    self._defect: Exception | None = None
    self._watch: threading.Thread | None = None
    self._orbax = ocp.CheckpointManager(
      directory,
      handler_registry=_handlers(),
      options=ocp.CheckpointManagerOptions(
        preservation_policy=_Preservation(config, reader),
        async_options=ocp.AsyncOptions(timeout_secs=config.timeout),
        lightweight_initialize=True,
      ),
    )
    if lock.is_ours(directory):
      self._remove_temporaries(lambda step: True)

  def save(self, step: int, state: Any, extra: Any) -> bool:
    if jax.process_index() == 0:
      lock.require_no_other(self._directory)
    self._wait_for_previous()
    with contextlib.ExitStack() as stack:
      # Until its end: what runs behind may fail before it is waited for.
      stack.enter_context(quiet.orbax())
      try:
        if step in self._reader.steps() and step not in self._reader.unsound:
          return True
        self._begin(step, state, json.loads(json.dumps(extra)))
      except Exception as error:
        self._note_failure(step)
        if not disk.cannot_write(error):
          raise
        self._say_failure(step, error)
        return False
      self._watch = threading.Thread(
        target=self._see_through,
        args=(step, stack.pop_all()),
        name="checkpoint_watch",
      )
      self._watch.start()
    return True

  def wait(self) -> bool:
    if self._watch is not None:
      self._watch.join()
      self._watch = None
    if self._defect is not None:
      defect, self._defect = self._defect, None
      raise defect
    return self._failures == 0

  def close(self) -> None:
    try:
      self.wait()
    finally:
      self._forget_failure()
      with quiet.orbax():
        self._orbax.close()

  def _begin(self, step: int, state: Any, extra: Any) -> None:
    items = ocp.args.Composite(
      state=ocp.args.PyTreeSave(manifest.nested(manifest.named_leaves(state))),
      manifest=ocp.args.JsonSave(manifest.write(step, state, extra)),
      extra=ocp.args.JsonSave(extra),
    )
    self._make_way(step)
    self._orbax.save(step, args=items, force=True)

  def _wait_for_previous(self) -> None:
    started = time.monotonic()
    self.wait()
    waited = time.monotonic() - started
    if waited > 1.0:
      logging.warning(
        "Training waited %.1f s for the previous checkpoint to be written. A "
        "larger config.checkpoint.every would avoid that.", waited,
      )  # fmt: skip
    self._forget_failure()

  def _forget_failure(self) -> None:
    """Lets Orbax raise in this thread what has been reported already."""
    if self._failures:
      for ask in (
        self._orbax.wait_until_finished, self._orbax.check_for_errors,
      ):  # fmt: skip
        with contextlib.suppress(Exception), quiet.orbax():
          ask()
      quiet.let_go()
    self._remove_temporaries(self._failed.__contains__)

  def _make_way(self, step: int) -> None:
    """Moves aside an unsound step that is to be saved again."""
    refused = None
    if jax.process_index() == 0:
      try:
        self._move_aside(step)
      except OSError as error:
        refused = error
    if jax.process_count() > 1:  # None goes on before it is moved.
      failed = multihost_utils.process_allgather(np.array(refused is not None))
      if failed.any() and refused is None:
        refused = OSError(f"process 0 cannot move the unsound step {step} away")
    if refused is not None:
      raise refused
    self._orbax.reload()
    self._reader.unsound.pop(step, None)

  def _move_aside(self, step: int) -> None:
    path = self._directory / str(step)
    if not os.path.lexists(path):
      return
    names = (f"{step}{ASIDE}{'' if i == 1 else i}" for i in itertools.count(1))
    free = next(n for n in names if not os.path.lexists(path.with_name(n)))
    os.rename(path, path.with_name(free))
    logging.warning("The unsound checkpoint %d is now in %s.", step, free)

  def _remove_outlived(self, step: int) -> None:
    """Removes what was set aside, once `step` is saved and is the newer one.

    Of what was set aside from `step` itself, the last stays.
    """
    aside = []
    for path in self._directory.glob(f"*{ASIDE}*"):
      number, _, turn = path.name.partition(ASIDE)
      if number.isdecimal() and (turn or "1").isdecimal():
        aside.append((int(number), int(turn or 1), path))
    same = sorted(entry for entry in aside if entry[0] == step)
    older = [entry for entry in aside if entry[0] < step]
    for _, _, path in older + same[:-1]:
      shutil.rmtree(path, ignore_errors=True)

  def _see_through(self, step: int, hushed: contextlib.ExitStack) -> None:
    """Follows a save behind the training, and says at once if it failed."""
    with hushed:
      try:
        self._orbax.wait_until_finished()
      except Exception as error:
        self._note_failure(step)
        if disk.cannot_write(error):
          self._say_failure(step, error)
        else:
          self._defect = error
      else:
        self._failures = 0
        if jax.process_index() == 0:
          for work in self._remove_outlived, self._reader.record:
            with contextlib.suppress(OSError):
              work(step)

  def _note_failure(self, step: int) -> None:
    quiet.stay()
    self._failures += 1
    self._failed.add(step)

  def _say_failure(self, step: int, error: Exception) -> None:
    # Orbax gives up at the first error, with other files still being written:
    # those bring their folders back for a moment.
    calm = 0
    for _ in range(100):
      found = self._remove_temporaries(self._failed.__contains__)
      calm = 0 if found else calm + 1
      if calm == 5:
        break
      time.sleep(0.05)
    logging.error(
      "CHECKPOINT %d WAS NOT SAVED (failure %d in a row): %s. %s. The "
      "next save, if there is one, tries again.",
      step, self._failures, reading.brief(error), self._what_stands(),
    )  # fmt: skip

  def _what_stands(self) -> str:
    try:
      free = shutil.disk_usage(self._directory).free / 1e6
      return (
        f"{free:.1f} MB are free in {self._directory}; the checkpoints "
        f"{self._reader.steps()} stand"
      )
    except OSError as error:
      return f"{self._directory} cannot be looked at: {reading.brief(error)}"

  def _remove_temporaries(
    self, chosen: collections.abc.Callable[[int], bool]
  ) -> bool:
    """Removes what saves of some steps left uncommitted, if there is any."""
    if jax.process_index() != 0:
      return False
    try:
      found = list(self._directory.glob(f"*{TEMPORARY}*"))
    except OSError:  # What cannot be listed now is removed some other time.
      return False
    paths = [
      path
      for path in found
      if (number := path.name.partition(TEMPORARY)[0]).isdecimal()
      and chosen(int(number))
    ]
    for path in paths:
      shutil.rmtree(path, ignore_errors=True)
    return bool(paths)


@dataclasses.dataclass
class _Preservation:
  """Tells Orbax which steps stay once the one being saved is committed.

  Only sound steps count. One that is not, and is newer, stays to be looked at
  until training saves it again or outlives it.
  """

  config: CheckpointConfig
  reader: reading.Reader

  def should_preserve(self, checkpoints, *, context) -> list[bool]:
    """Returns for each step whether to keep it; the last is being saved."""
    del context
    numbers = [info.step for info in checkpoints]
    sound = {*self.reader.steps(), numbers[-1]} - self.reader.unsound.keys()
    newest = sorted(sound)[-self.config.keep_last :]
    every = self.config.keep_every
    return [
      number in newest
      or (number in sound and every is not None and number % every == 0)
      or (number not in sound and number > newest[0])
      for number in numbers
    ]
