"""Drops what Orbax prints, hundreds of lines, about what it also raises.

It logs a failure once per thread that hears of it; and as it closes the event
loop at the first one, whatever is still under way complains when it ends: at
the latest when it is collected, which may be when all else is done.
"""

import contextlib
import gc
import inspect
import logging
import os
import re
import sys
import threading
import traceback
from typing import Any

# What TensorStore appends to its errors, some of which no frame has seen.
_TENSORSTORE = re.compile("tensorstore_spec=|os_error_code=")

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
    if sys.unraisablehook is not _drop_stragglers:
      _hook, sys.unraisablehook = sys.unraisablehook, _drop_stragglers
    for name, keep in _FILTERS.items():  # One that is there is not added again.
      logging.getLogger(name).addFilter(keep)
  try:
    yield
  finally:
    with _lock:
      _depth -= 1
      if _depth == 0 and not _failed:
        for name, keep in _FILTERS.items():
          logging.getLogger(name).removeFilter(keep)
        if sys.unraisablehook is _drop_stragglers:
          sys.unraisablehook = _hook


def stay() -> None:
  """Stays quiet about Orbax for as long as the process lives.

  For when a call has failed: what is under way in its threads fails later, and
  they say it then.
  """
  global _failed
  _failed = True
  with orbax():
    pass


def let_go() -> None:
  """Collects what a failed call left."""
  stay()
  gc.collect()


def _is_no_echo(record: logging.LogRecord) -> bool:
  # The path may be absl's own: then the error says where it comes from.
  error = record.exc_info[1] if record.exc_info else None
  return error is None or not (
    _is_its_file(record.pathname) or _is_orbax(error)
  )


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
  return ours or _TENSORSTORE.search(str(error)) is not None


def _is_its_file(path: str) -> bool:
  return "orbax" in path.split(os.sep)


_FILTERS = {"absl": _is_no_echo, "asyncio": _is_no_straggler}
