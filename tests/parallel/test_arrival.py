"""What a process says when it has to leave."""

import contextlib
import socket
import types

import pytest

from flowjax.parallel import arrival


@pytest.fixture(name="place")
def _place():
  """A port of this machine at which somebody listens, until it is closed."""
  with socket.create_server(("127.0.0.1", 0)) as listening:
    yield listening


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


@pytest.mark.parametrize(
  "process, answers, lost",
  [
    (0, False, "another process"),
    (2, False, "process 0, where all meet"),
    (2, True, "another process"),
  ],
)
def test_it_is_said_who_is_lost_as_far_as_that_is_known(
  monkeypatch, place, process, answers, lost
):
  address = f"127.0.0.1:{place.getsockname()[1]}"
  with contextlib.closing(place) if not answers else contextlib.nullcontext():
    pass
  text = _ended(monkeypatch, process, address)
  assert f"process {process}: Lost {lost}" in text
