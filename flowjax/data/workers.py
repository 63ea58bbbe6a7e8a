"""What a reading process does at its start, and how its death is told."""

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator

import numpy as np

from flowjax import errors


def start(index: int, count: int) -> None:
  """Sets up worker `index` of `count`, before it opens its source.

  Grain imports jax, which must not take the accelerator a second time. Signals
  to the whole process group are for the trainer to answer: it saves first and
  ends its workers itself. Should it be killed, they end too.
  """
  del index, count
  os.environ["JAX_PLATFORMS"] = "cpu"
  if "jax" in sys.modules:
    sys.modules["jax"].config.update("jax_platforms", "cpu")
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  signal.signal(signal.SIGTERM, signal.SIG_IGN)
  threading.Thread(target=_end_with_parent, daemon=True).start()


def let_grain_read_its_flags() -> None:
  """Takes the defaults of absl's flags where no command line was parsed."""
  from absl import flags

  if not flags.FLAGS.is_parsed():
    flags.FLAGS.mark_as_parsed()


def own(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Copies what lies in memory that Grain shares with a worker.

  Grain unmaps it when the array goes, though a device may still read it: on a
  CPU jax takes over an aligned array without a copy.
  """
  return {
    key: array if type(array) is np.ndarray else np.array(array)
    for key, array in batch.items()
  }


@contextlib.contextmanager
def deaths_explained() -> Iterator[None]:
  """Turns Grain's report of a dead worker into one that says what to do."""
  try:
    yield
  except RuntimeError as error:
    if "terminated unexpectedly" not in str(error):
      raise
    raise errors.DataError(
      f"A process that reads the data died. {error} Exit code -9 is often the "
      "system running out of memory: lower config.data.workers or prefetch."
    ) from error


def _end_with_parent() -> None:
  multiprocessing.parent_process().join()  # type: ignore[union-attr]
  os._exit(1)
