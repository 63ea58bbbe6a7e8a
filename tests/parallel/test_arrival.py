"""What a process says when it has to leave."""

import types

import pytest

from flowjax.parallel import arrival


@pytest.mark.parametrize(
  "process, lost", [(0, "another process"), (2, "process 0, where all meet")]
)
def test_no_process_says_that_it_is_itself_lost(monkeypatch, process, lost):
  said, codes = [], []
  known = types.SimpleNamespace(
    process_id=process, coordinator_address="here:1"
  )
  monkeypatch.setattr(arrival, "_met", True)
  monkeypatch.setattr(arrival, "_code", None)
  monkeypatch.setattr(arrival, "state", lambda: known)
  monkeypatch.setattr(arrival.os, "write", lambda _, text: said.append(text))
  monkeypatch.setattr(arrival.os, "_exit", codes.append)
  arrival._ended()
  assert f"process {process}: Lost {lost}" in said[0].decode()
  assert codes == [6]
