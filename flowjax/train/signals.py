"""SIGTERM and Ctrl-C: finish the step, save, and leave with an own exit code.

A second signal leaves at once; the checkpoints that stand are sound.
"""

import contextlib
import os
import signal
import sys
import threading


class StopRequest:
  """Whether somebody asked the run to stop, and with which signal."""

  def __init__(self):
    self.signal: signal.Signals | None = None

  def __bool__(self) -> bool:
    return self.signal is not None

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
