"""The errors a user can meet, each with the exit code of the command.

0 is a finished command and 1 a defect of ours. The text of an error says the
value that is wrong, why, and what would do.
"""

import contextlib
import re


class UserError(ValueError):
  """A mistake in a flag, a config or an argument."""

  exit_code = 2


class DataError(UserError):
  """Data that is missing, empty, corrupt or out of range."""

  exit_code = 3


class CheckpointError(UserError):
  """A checkpoint that cannot be trusted or does not fit."""

  exit_code = 4


class NumericError(RuntimeError):
  """Training that no longer produces finite numbers."""

  exit_code = 5


class Lost(RuntimeError):
  """A process of several that is gone or hangs; start all of them again."""

  exit_code = 6


class Preempted(RuntimeError):
  """A run that was asked to stop, saved, and can be started again."""

  exit_code = 42


KNOWN = (UserError, NumericError, Lost, Preempted)


@contextlib.contextmanager
def naming(where: str):
  """Turns what is wrong with a value into a UserError that says where it is.

  One of a kind of its own stays of that kind.
  """
  try:
    yield
  except UserError as error:
    raise type(error)(f"{where}: {error}") from error
  except (ValueError, re.error) as error:
    raise UserError(f"{where}: {error}") from error
