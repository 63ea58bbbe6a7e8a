"""Whether an error speaks of the disk, of what lies on it, or of neither.

Python's own calls raise OSError. TensorStore raises ValueError, whose text has
the status and, where the system refused a call, `os_error_code='5'`.
"""

import collections.abc
import errno
import os
import pathlib
import re

import jax

# The system says these of a sound disk too, where a file is lost or damaged.
_LOST = (
  errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EINVAL, errno.ENAMETOOLONG,
)  # fmt: skip
_REFUSED = re.compile(
  "RESOURCE_EXHAUSTED|PERMISSION_DENIED|UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|"
  "No space left on device|Input/output error"
)
# What a process hears when another has not come to write its part.
_LATE = re.compile("UNAVAILABLE|DEADLINE_EXCEEDED")


def cannot_read(error: BaseException) -> bool:
  """Tells whether a read failed in a way that says nothing about the file."""
  for cause in _causes(error):
    code = _code(cause)
    if isinstance(cause, TimeoutError) or code not in (None, *_LOST):
      return True
  return False


def cannot_write(error: BaseException) -> bool:
  """Tells whether it was the disk, and not a mistake of ours, that failed."""
  if isinstance(error, BaseExceptionGroup):
    return all(map(cannot_write, error.exceptions))
  for cause in _causes(error):
    if isinstance(cause, OSError) or _code(cause) is not None:
      return True
    if isinstance(cause, ValueError) and _REFUSED.search(str(cause)):
      return True
    # Of one alone: its RESOURCE_EXHAUSTED is a device out of memory.
    if isinstance(cause, jax.errors.JaxRuntimeError):
      return _LATE.search(str(cause)) is not None
  return False


def unreadable(folder: pathlib.Path) -> OSError | None:
  """Returns why some file below a folder cannot be read, if that is so now.

  Whoever asks `os.path.exists` hears "no" of a disk that fails.
  """
  found: list[OSError] = []
  for root, _, names in os.walk(folder, onerror=found.append):
    for name in names:
      try:
        with open(os.path.join(root, name), "rb") as file:
          file.read(1)
      except OSError as error:
        found.append(error)
  return next(filter(cannot_read, found), None)


def _causes(error: BaseException) -> collections.abc.Iterator[BaseException]:
  cause: BaseException | None = error
  while cause is not None:
    yield cause
    cause = cause.__cause__


def _code(error: BaseException) -> int | None:
  """Returns the number of the system's error, if it was one."""
  if isinstance(error, OSError):
    return error.errno
  if not isinstance(error, ValueError):
    return None
  found = re.search(r"os_error_code='(\d+)'", str(error))
  return int(found[1]) if found else None
