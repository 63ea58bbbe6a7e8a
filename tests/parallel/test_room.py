"""A program that is too large for the machine is refused before it runs."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from flowjax.parallel import distributed, room


def _compiled(devices: int) -> jax.stages.Compiled:
  """Compiles the sum of 1 MiB and a number, whole on so many devices."""
  mesh = Mesh(jax.devices()[:devices], "x")
  whole = NamedSharding(mesh, PartitionSpec())
  x = jax.ShapeDtypeStruct((2**18,), jnp.float32, sharding=whole)
  return jax.jit(lambda x: x + 1, out_shardings=whole).lower(x).compile()


@pytest.mark.parametrize("devices", [1, 4])
def test_a_host_holds_what_each_of_its_devices_holds(devices):
  needed = room.needs(_compiled(devices))
  assert needed == pytest.approx(devices * 2 * 2**20, rel=0.01)


def test_what_is_given_away_is_not_counted_twice():
  x = jax.ShapeDtypeStruct((2**18,), jnp.float32)
  program = jax.jit(lambda x: x + 1, donate_argnums=0).lower(x).compile()
  assert room.needs(program) == pytest.approx(2**20, rel=0.01)


def test_the_first_call_is_refused_where_it_finds_no_room(monkeypatch):
  monkeypatch.setattr(room, "of_machine", lambda: 2**20)
  ran = []
  call = distributed.together(
    jax.jit(lambda x: jax.debug.callback(ran.append, x[0]) or x + 1)
  )
  with pytest.raises(room.NoRoom, match=r"0\.0 GB of this machine's 0\.0 GB"):
    call(jnp.zeros(2**18))
  jax.effects_barrier()
  assert not ran
  monkeypatch.setattr(room, "of_machine", lambda: 2**22)
  assert float(call(jnp.zeros(2**18))[0]) == 1.0


def test_a_program_larger_than_any_machine_ends_with_an_error(monkeypatch):
  """Which jaxlib begins on a CPU, and then waits for without an end."""
  monkeypatch.setattr(room, "of_machine", lambda: 2**36)

  def make():
    draws = jax.random.normal(jax.random.key(0), (2**15, 2**22))
    return jnp.int32(0), draws

  with pytest.raises(room.NoRoom, match=r"\d,\d{3}\.\d GB"):
    distributed.together(jax.jit(make))()


def test_a_container_may_have_less_than_its_machine(tmp_path, monkeypatch):
  monkeypatch.setattr(room, "_LIMITS", ())
  whole = room.of_machine()
  assert whole > 2**28
  for text, found in (("max\n", whole), ("1048576\n", 2**20)):
    path = tmp_path / "memory.max"
    path.write_text(text)
    monkeypatch.setattr(room, "_LIMITS", (str(path), "/nowhere"))
    assert room.of_machine() == found
