"""What processes of a job wait for each other with."""

import types

import numpy as np
import pytest

from flowjax import errors
from flowjax.parallel import distributed


@pytest.fixture(autouse=True)
def _roomy(monkeypatch):
  monkeypatch.setattr(distributed.room, "require", lambda program: None)


class Jitted:
  """A jitted function that notes what becomes of it."""

  def __init__(self, said):
    self.said = said

  def lower(self, x):
    del x
    compiled = lambda: self.said.append("compiled")  # noqa: E731
    return types.SimpleNamespace(compile=compiled)

  def __call__(self, x):
    self.said.append("run")
    return x


def test_a_program_runs_when_all_have_compiled_it(monkeypatch):
  said = []

  def met(name, seconds):
    del seconds
    said.append(name.split("/")[0])
    return True

  monkeypatch.setattr(distributed, "_peers", types.SimpleNamespace(meet=met))
  function = distributed.together(Jitted(said))
  assert (function(np.zeros(2)) == 0).all()
  first = ["compiled", "meet", "run"]
  assert said == first
  function(np.ones(2))
  assert said == [*first, "run"]
  # Of other shapes it is another program.
  function(np.zeros(3))
  assert said == [*first, "run", *first]


def test_who_waits_in_vain_is_lost(monkeypatch):
  alone = types.SimpleNamespace(meet=lambda name, seconds: False)
  monkeypatch.setattr(distributed, "_peers", alone)
  with pytest.raises(errors.Lost, match="Not all processes came"):
    distributed.meet()


def test_one_process_waits_for_nobody():
  said = []
  function = distributed.together(Jitted(said))
  for size in (2, 2, 3):
    function(np.zeros(size))
  assert said == ["compiled", "run", "run", "run"]
