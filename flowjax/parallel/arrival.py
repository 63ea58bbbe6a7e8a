"""jax.distributed.initialize, with an answer to who did not arrive.

jax 0.10 gives its service an hour to wait, its clients less, and has them abort
the process when they give up, so that nobody is named. Here the service gives
up first and says whom it has not seen, and the clients raise.
"""

import contextlib
import ctypes
import logging
import os
import re
import socket
import time
from typing import Any

import jax

from flowjax import errors

_ADVICE = (
  "See whether they were started, and why they ended; with "
  "FLOWJAX_START_TIMEOUT they are waited for longer."
)
# What jax says when the name of process 0's machine has no address.
_NOWHERE = re.compile("Retry failed|Failed to recognize coordinator address")
# Seconds within which process 0 answers, if it is there.
_PATIENCE = 3.0

_terminate: Any = None  # What C++ calls must outlive the call that names it.
_met = False
_code: int | None = None


def state() -> Any:
  """Returns what jax knows of the job: its client has no public name."""
  from jax._src import distributed

  return distributed.global_state


def initialize(
  given: dict[str, Any] | None, *, timeout: int, heartbeat_timeout: int
) -> None:
  """Starts jax.distributed as `given`, or as jax finds it.

  Raises Lost if not all processes arrive within `timeout` seconds.
  """
  global _met
  from jax._src import distributed

  logging.info("Waiting for the other processes.")
  real = distributed._jax
  distributed._jax = _Jaxlib(real, timeout)  # type: ignore[assignment]
  try:
    _initialize(given or {}, timeout, heartbeat_timeout)
  except ValueError as error:
    if given is None and "coordinator_address" in str(error):
      _refuse_alone_in_kubernetes()
      return  # A machine for many, with but this process on it.
    raise errors.UserError(f"The processes cannot meet: {error}") from error
  finally:
    distributed._jax = real
  _met = True


def _initialize(given: dict[str, Any], timeout: int, heartbeat: int) -> None:
  begun = time.monotonic()
  while True:
    try:
      return jax.distributed.initialize(
        **given,
        # Longer than the service waits, so that its answer arrives.
        initialization_timeout=timeout + 10,
        heartbeat_timeout_seconds=heartbeat,
      )
    except RuntimeError as error:
      if state().client is not None:
        raise _not_met(error, timeout) from error
      if _NOWHERE.search(str(error)) is None:
        raise errors.UserError(f"The processes cannot meet: {error}") from error
      # A machine's name is known when the machine has started.
      if time.monotonic() - begun > timeout:
        raise errors.Lost(
          f"Process 0 was not found within {timeout} s: {error}. {_ADVICE}"
        ) from error
      time.sleep(1.0)


def _refuse_alone_in_kubernetes() -> None:
  if "JOB_COMPLETION_INDEX" in os.environ:
    raise errors.UserError(
      "This is one of several pods of Kubernetes, and jax finds the others "
      "only with its client: pip install 'flowjax[k8s]'. Or set "
      "FLOWJAX_COORDINATOR, FLOWJAX_PROCESSES and FLOWJAX_PROCESS."
    )


def expect_end(code: int) -> None:
  """Takes the end of process 0 from here on as that of all, with this code."""
  global _code
  _code = code


def _not_met(error: Exception, timeout: int) -> Exception:
  known, text = state(), str(error)
  where, count = known.coordinator_address, known.num_processes
  try:  # The client still knows what it could not say.
    known.client.shutdown()
  except RuntimeError as reason:
    text = f"{text}\n{reason}"
  known.client = known.service = None
  found = re.search(r"timed out task names:\s*((?:\d+\s+)+)", text)
  if found:
    missing = ", ".join(sorted(found[1].split(), key=int))
    return errors.Lost(
      f"Process {missing} of {count} did not arrive at {where} within "
      f"{timeout} s. {_ADVICE}"
    )
  if "DEADLINE_EXCEEDED" in text or "UNAVAILABLE" in text:
    return errors.Lost(
      f"Process 0 of {count} did not arrive at {where} within {timeout} s, or "
      f"cannot be reached from here. {_ADVICE}"
    )
  reasons = [line for line in text.splitlines() if line != "std::bad_cast"]
  return errors.UserError(f"The processes cannot meet at {where}: {reasons[0]}")


class _Jaxlib:
  """jaxlib, with a time limit for arrivals, and an error for an abort."""

  def __init__(self, real: Any, timeout: int):
    self._real, self._timeout = real, timeout

  def __getattr__(self, name: str) -> Any:
    return getattr(self._real, name)

  def get_distributed_runtime_service(self, *args, **kwargs) -> Any:
    """Returns a service that waits `timeout` for all to arrive."""
    return self._real.get_distributed_runtime_service(
      *args, **kwargs, cluster_register_timeout=self._timeout
    )

  def get_distributed_runtime_client(self, *args, **kwargs) -> Any:
    """Returns a client that does not abort the process when it fails."""
    _explain_terminate()
    return self._real.get_distributed_runtime_client(
      *args, **kwargs, missed_heartbeat_callback=_ended
    )


def _explain_terminate() -> None:
  """Has the C++ library call `_ended` where it would abort.

  jaxlib 0.10 cannot hand the callback of a client what has happened. While the
  client connects that is an exception in Python; later, in a thread of C++, it
  is std::terminate.
  """
  global _terminate
  _terminate = _terminate or ctypes.CFUNCTYPE(None)(_ended)
  with contextlib.suppress(OSError, AttributeError):
    ctypes.CDLL("libstdc++.so.6")._ZSt13set_terminatePFvvE(_terminate)


def _ended(*_: Any) -> None:
  """Leaves when the coordination service is gone, and nothing can be saved."""
  if not _met:
    return  # That is raised.
  known = state()
  if _code is not None:
    os._exit(_code)
  # All meet at process 0: where it still answers, it is another that is gone.
  lost = "another process"
  if known.process_id and not _answers(known.coordinator_address):
    lost = f"process 0, where all meet ({known.coordinator_address})"
  text = (
    f"flowjax: process {known.process_id}: Lost {lost}: it was killed, or its "
    "machine is gone. All processes end. Start all of them again: the same "
    "command goes on from the newest checkpoint.\n"
  )
  os.write(2, text.encode())
  os._exit(errors.Lost.exit_code)


def _answers(address: str) -> bool:
  """Tells whether the service at HOST:PORT is there and speaks.

  A connection alone says less: the kernel makes it for a process that hangs,
  or that is killed and whose sockets are not all closed yet. A service of gRPC
  begins to speak by itself.
  """
  host, _, port = address.rpartition(":")
  try:
    where = host.strip("[]"), int(port)
    with socket.create_connection(where, _PATIENCE) as there:
      return bool(there.recv(1))
  except OSError:
    return False
