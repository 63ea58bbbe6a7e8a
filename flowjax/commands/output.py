"""What becomes of a command whose output nobody takes."""

import os
import sys

from flowjax import errors

# The exit code where nobody reads on: that of a process ended by SIGPIPE.
UNREAD = 141


def written(code: int) -> int:
  """Returns the exit code of a command once all that it printed is written."""
  if sys.stdout is not None:  # It was closed before the command began.
    sys.stdout.flush()
  return code


def failed(error: OSError) -> int:
  """Returns the exit code where it was the output that failed.

  What is left of it is dropped. Raises any other error again.
  """
  try:
    print(flush=True)
  except OSError as refusal:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)
    if isinstance(refusal, BrokenPipeError):  # As after `| head`.
      return UNREAD
    text = f"flowjax: What is printed cannot be written: {refusal.strerror}."
    print(text, file=sys.stderr)
    return errors.UserError.exit_code
  raise error
