"""SIGTERM and Ctrl-C: finish the step, save, and leave with an own exit code.

A second signal leaves at once; the checkpoints that stand are sound. Of several
processes it is enough that one is given a signal: all stop after the same step.
"""

import contextlib
import os
import signal
import sys
import threading

from flowjax.parallel import distributed


class StopRequest:
  """Whether somebody asked the run to stop, and with which signal."""

  def __init__(self) -> None:
    self.signal: signal.Signals | None = None
    self._peers = distributed.peers()

  def begin(self, step: int) -> None:
    """Takes note that `step` is done, and none after it begun."""
    if self._peers is not None:
      self._peers.begin(step - 1)  # As if it were in this step.

  def after(self, step: int) -> str | None:
    """Returns why the run stops after this step, or None if it goes on."""
    if self._peers is not None:
      return self._peers.stop_after(step)
    return None if self.signal is None else self.signal.name

  def handle(self, number: int, frame: object) -> None:
    """Notes the first signal and leaves at the second."""
    del frame
    if self.signal is not None:
      print("\nStopped at once; nothing more was saved.", file=sys.stderr)
      os._exit(128 + number)
    self.signal = signal.Signals(number)
    print(
      f"\n{self.signal.name}: saving after this step. Once more: stop at once.",
      file=sys.stderr,
    )
    if self._peers is not None:
      # In a thread, as the one that is interrupted may hold what this needs.
      tell, why = self._peers.ask_to_stop, self.signal.name
      threading.Thread(target=tell, args=(why,), daemon=True).start()


@contextlib.contextmanager
def watch():
  """Yields the StopRequest that SIGTERM and Ctrl-C set within this context."""
  request = StopRequest()
  if threading.current_thread() is not threading.main_thread():
    # Only the main thread of a process is given signals.
    yield request
    return
  numbers = (signal.SIGTERM, signal.SIGINT)
  before = {n: signal.signal(n, request.handle) for n in numbers}
  try:
    yield request
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)
