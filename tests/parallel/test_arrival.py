"""What a process says when it has to leave."""

import contextlib
import socket
import types

import pytest
from jax._src import distributed

from flowjax import errors
from flowjax.parallel import arrival


def _ended(monkeypatch, process, address):
  said, codes = [], []
  known = types.SimpleNamespace(process_id=process, coordinator_address=address)
  monkeypatch.setattr(arrival, "_met", True)
  monkeypatch.setattr(arrival, "_code", None)
  monkeypatch.setattr(arrival, "state", lambda: known)
  monkeypatch.setattr(arrival.os, "write", lambda _, text: said.append(text))
  monkeypatch.setattr(arrival.os, "_exit", codes.append)
  arrival._ended()
  assert codes == [6]
  return said[0].decode()


@contextlib.contextmanager
def _place(state):
  """A port of this machine, and who is at it."""
  with socket.create_server(("127.0.0.1", 0)) as silent:
    port = silent.getsockname()[1]
    if state == "silent":
      yield port
  if state == "there":
    service = distributed._jax.get_distributed_runtime_service(
      f"127.0.0.1:{port}", 1
    )
    yield port
    service.shutdown()
  elif state == "gone":
    yield port


@pytest.mark.parametrize(
  "process, state, lost",
  [
    (0, "gone", "another process"),
    (2, "gone", "process 0, where all meet"),
    # It hangs, or was killed so lately that the kernel still takes calls.
    (2, "silent", "process 0, where all meet"),
    (2, "there", "another process"),
  ],
)
def test_it_is_said_who_is_lost_as_far_as_that_is_known(
  monkeypatch, process, state, lost
):
  monkeypatch.setattr(arrival, "_PATIENCE", 1.0)
  with _place(state) as port:
    text = _ended(monkeypatch, process, f"127.0.0.1:{port}")
  assert f"process {process}: Lost {lost}" in text


@pytest.fixture(name="asked")
def _asked(monkeypatch):
  """What jax.distributed.initialize is to say, one after the other."""
  asked, state = [], types.SimpleNamespace(client=None)

  def initialize(**options):
    del options
    said = asked.pop(0)
    if said is not None:
      raise said

  monkeypatch.setattr(arrival.jax.distributed, "initialize", initialize)
  monkeypatch.setattr(arrival, "state", lambda: state)
  monkeypatch.setattr(arrival.time, "sleep", lambda seconds: None)
  monkeypatch.setattr(arrival, "_met", False)
  return asked


def _initialize(timeout=60):
  arrival.initialize(None, timeout=timeout, heartbeat_timeout=10)


@pytest.mark.parametrize(
  "said",
  [
    "Retry failed with all attempts exhausted",
    "Failed to recognize coordinator address host-0",
  ],
)
def test_a_machine_that_has_no_address_yet_is_waited_for(asked, said):
  asked += [RuntimeError(said), RuntimeError(said), None]
  _initialize()
  assert not asked and arrival._met
  asked.append(RuntimeError(said))
  with pytest.raises(errors.Lost, match="Process 0 was not found within 0 s"):
    _initialize(timeout=0)


def test_rights_that_are_missing_are_a_mistake(asked):
  asked.append(RuntimeError("Kubernetes API Error: 403 - Forbidden"))
  with pytest.raises(errors.UserError, match="cannot meet.*403"):
    _initialize()


def test_one_of_several_pods_does_not_go_on_alone(asked, monkeypatch):
  said = ValueError("coordinator_address should be defined.")
  monkeypatch.delenv("JOB_COMPLETION_INDEX", raising=False)
  asked.append(said)
  _initialize()
  monkeypatch.setenv("JOB_COMPLETION_INDEX", "1")
  asked.append(said)
  with pytest.raises(errors.UserError, match=r"flowjax\[k8s\]"):
    _initialize()
