"""Drops what Orbax prints, hundreds of lines, about what it also raises.

It logs a failure once per thread that hears of it; and as it closes the event
loop at the first one, whatever is still under way complains when it ends: at
the latest when it is collected, which may be when all else is done. Hence the
log of asyncio stays without what Orbax's own tasks raised, and that alone.
"""

import contextlib
import gc
import inspect
import logging
import os
import sys
import threading
import traceback
from typing import Any

_lock = threading.Lock()
_depth = 0
_hook: Any = sys.unraisablehook
# Whether a call failed, and threads may still end what it began.
_failed = False


@contextlib.contextmanager
def orbax():
  """Is quiet about Orbax, and nobody else, while one of its calls runs."""
  global _depth, _hook
  with _lock:
    _depth += 1
    if _depth == 1:
      if sys.unraisablehook is not _drop_stragglers:
        _hook, sys.unraisablehook = sys.unraisablehook, _drop_stragglers
      logging.getLogger("absl").addFilter(_is_no_echo)
      logging.getLogger("asyncio").addFilter(_is_no_straggler)
  try:
    yield
  finally:
    with _lock:
      _depth -= 1
      if _depth == 0:
        logging.getLogger("absl").removeFilter(_is_no_echo)
        if sys.unraisablehook is _drop_stragglers and not _failed:
          sys.unraisablehook = _hook


def let_go() -> None:
  """Collects what a failed call left, while it is still quiet.

  Reads that are under way end later, in threads of their own: of these nothing
  is heard either, for as long as the process lives.
  """
  global _failed
  _failed = True
  with orbax():
    gc.collect()


def _is_no_echo(record: logging.LogRecord) -> bool:
  # The path may be absl's own: only the error says where it comes from.
  error = record.exc_info[1] if record.exc_info else None
  return error is None or not _is_orbax(error)


def _is_no_straggler(record: logging.LogRecord) -> bool:
  error = record.exc_info[1] if record.exc_info else None
  lost = "exception was never retrieved" in record.getMessage()
  return not (lost and error is not None and _is_orbax(error))


def _drop_stragglers(report: Any) -> None:
  closed = str(report.exc_value) == "Event loop is closed"
  stray = inspect.iscoroutine(report.object) and _is_its_file(
    report.object.cr_code.co_filename
  )
  if not closed and not stray:
    _hook(report)


def _is_orbax(error: BaseException) -> bool:
  frames = traceback.walk_tb(error.__traceback__)
  ours = any(_is_its_file(frame.f_code.co_filename) for frame, _ in frames)
  return ours or "tensorstore_spec=" in str(error)


def _is_its_file(path: str) -> bool:
  return "orbax" in path.split(os.sep)
