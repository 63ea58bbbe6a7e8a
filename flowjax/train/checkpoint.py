"""Checkpoints: asynchronous, atomic, sharded, and proved before they are used.

Orbax writes the arrays. One step of it holds three items, committed by one
rename: `state` (the arrays), `manifest` (shape, dtype and fingerprint of each)
and `extra` (JSON: data state, config). The folder is on a POSIX file system
that all processes share.
"""

import collections.abc
import contextlib
import dataclasses
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

from flowjax.train import lock, manifest, reading

# What is in the name of a folder that Orbax has not committed.
TEMPORARY = ".orbax-checkpoint-tmp"


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

  @property
  def failures(self) -> int:
    """How many saves failed since the last one that did not."""
    return self._writer.failures if self._writer else 0

  def steps(self) -> list[int]:
    """Returns the committed steps on disk, sound or not, oldest first."""
    return self._reader.steps()

  def save(self, step: int, state: Any, extra: Any) -> bool:
    """Begins to save a state; when this returns its buffers may be donated.

    The arrays are on the host by then, and are written behind the training. A
    step that is there already is left alone. A save still running is waited
    for: no step is skipped, and never more than one copy is held. Returns False
    if the save could not begin, after saying so; what fails later is said when
    it does, counts in `failures`, and shows in what `wait` returns.
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

  def read_extra(self, step: int | None = None) -> Any:
    """Returns the JSON saved with a step, by default with the newest sound one.

    The arrays are not looked at. Returns None if there is no checkpoint.
    """
    self.wait()
    return self._reader.extra(step)

  def restore(
    self, abstract_state: Any, step: int | None = None
  ) -> reading.Restored | None:
    """Restores the newest sound step, or the given one, as `abstract_state`.

    That is a pytree of ShapeDtypeStruct with shardings on any mesh. Returns
    None if there is no checkpoint at all. Raises CheckpointError if there are
    some and none is sound, and if the names, shapes or dtypes in a sound
    manifest are not those of `abstract_state`.
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


class _Writer:
  """Saves through Orbax, and outlives its failures."""

  def __init__(
    self,
    directory: pathlib.Path,
    config: CheckpointConfig,
    reader: reading.Reader,
  ):
    self.failures = 0
    self._directory, self._reader = directory, reader
    self._failed: set[int] = set()
    self._watch: threading.Thread | None = None
    self._orbax = ocp.CheckpointManager(
      directory,
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
    if step in self._reader.steps() and step not in self._reader.unsound:
      return True
    extra = json.loads(json.dumps(extra))
    items = ocp.args.Composite(
      state=ocp.args.PyTreeSave(manifest.nested(manifest.named_leaves(state))),
      manifest=ocp.args.JsonSave(manifest.write(step, state, extra)),
      extra=ocp.args.JsonSave(extra),
    )
    try:
      self._make_way(step)
      self._orbax.save(step, args=items, force=True)
    except Exception as error:
      self._note_failure(step, error)
      return False
    self._watch = threading.Thread(
      target=self._see_through, args=(step,), name="checkpoint_watch"
    )
    self._watch.start()
    return True

  def wait(self) -> bool:
    if self._watch is not None:
      self._watch.join()
      self._watch = None
    return self.failures == 0

  def close(self) -> None:
    self.wait()
    self._forget_failure()
    self._orbax.close()

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
    if self.failures:
      for ask in (
        self._orbax.wait_until_finished, self._orbax.check_for_errors,
      ):  # fmt: skip
        with contextlib.suppress(Exception):
          ask()
    self._remove_temporaries(self._failed.__contains__)

  def _make_way(self, step: int) -> None:
    """Deletes an unsound step that is to be saved again."""
    self._orbax.reload()
    stands = np.array(step in self._orbax.all_steps())
    if jax.process_count() > 1:  # All look before the first one deletes.
      stands = multihost_utils.process_allgather(stands).any()
    if stands:
      self._orbax.delete(step)
    self._reader.unsound.pop(step, None)

  def _see_through(self, step: int) -> None:
    """Follows a save behind the training, and says at once if it failed."""
    try:
      self._orbax.wait_until_finished()
    except Exception as error:
      self._note_failure(step, error)
    else:
      self.failures = 0

  def _note_failure(self, step: int, error: Exception) -> None:
    self.failures += 1
    self._failed.add(step)
    # Orbax gives up at the first error, with other files still being written:
    # those bring their folders back for a moment.
    calm = 0
    for _ in range(100):
      found = self._remove_temporaries(self._failed.__contains__)
      calm = 0 if found else calm + 1
      if calm == 5:
        break
      time.sleep(0.05)
    free = shutil.disk_usage(self._directory).free
    logging.error(
      "CHECKPOINT %d WAS NOT SAVED (failure %d in a row): %s. %.1f MB are free "
      "in %s; the checkpoints %s stand. Training goes on, and the next save "
      "tries again.",
      step, self.failures, reading.brief(error), free / 1e6, self._directory,
      self._reader.steps(),
    )  # fmt: skip

  def _remove_temporaries(
    self, chosen: collections.abc.Callable[[int], bool]
  ) -> bool:
    """Removes what saves of some steps left uncommitted, if there is any."""
    if jax.process_index() != 0:
      return False
    paths = [
      path
      for path in self._directory.glob(f"*{TEMPORARY}*")
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
