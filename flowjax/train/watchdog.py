"""Notices that a run no longer steps, and says where every thread stands.

Neither jax nor a scheduler sees a process that lives and waits for ever: for a
disk that is gone, a worker, a collective that others never came to.
"""

import collections.abc
import contextlib
import faulthandler
import os
import sys
import threading
import time

from flowjax import errors
from flowjax.parallel import distributed


class Watchdog:
  """Ends the process when `beat` was not called for so many seconds.

  With 0 it never does. What takes long by itself is done in `paused`.
  """

  def __init__(
    self,
    seconds: float,
    leave: collections.abc.Callable[[int], None] = os._exit,
  ):
    self._seconds, self._leave = seconds, leave
    self._pauses, self._heard = 0, time.monotonic()
    self._stop = threading.Event()
    self._thread = threading.Thread(
      target=self._watch, name="watchdog", daemon=True
    )

  def __enter__(self) -> "Watchdog":
    self._heard = time.monotonic()
    if self._seconds:
      self._thread.start()
    return self

  def __exit__(self, *_: object) -> None:
    self._stop.set()
    if self._thread.is_alive():
      self._thread.join()

  def beat(self) -> None:
    """Takes note that there is progress."""
    self._heard = time.monotonic()

  @contextlib.contextmanager
  def paused(self):
    """Does not count the time within."""
    self._pauses += 1
    try:
      yield
    finally:
      self.beat()
      self._pauses -= 1

  def _watch(self) -> None:
    while not self._stop.wait(min(self._seconds / 10, 10.0)):
      if self._pauses or time.monotonic() - self._heard < self._seconds:
        continue
      text = (
        f"No step has ended for {self._seconds:.0f} seconds "
        "(config.log.hung_after): above is where each thread stands. Start it "
        "again: the same command goes on from the newest checkpoint."
      )
      faulthandler.dump_traceback(sys.__stderr__ or 2, all_threads=True)
      print(f"flowjax: {text}", file=sys.stderr, flush=True)
      peers = distributed.peers()
      if peers is not None:
        with contextlib.suppress(Exception):
          peers.tell(kind="failed", code=errors.Lost.exit_code, text=text)
      self._leave(errors.Lost.exit_code)
      return
