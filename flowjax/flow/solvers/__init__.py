"""Solvers of dx/dt = field(x, t) on a grid of times, one file per family."""

from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from flowjax.flow import paths
from flowjax.flow.solvers import runge_kutta

# An array, or a tree of arrays that move together.
State = Any
Field = Callable[[State, jax.Array], State]


class Solver(Protocol):
  """One step of a method, with whatever it must remember between steps."""

  def init(self, x: State) -> Any:
    """Returns the memory before the first step, as a tree of arrays."""

  def step(
    self, field: Field, x: State, memory: Any, t: jax.Array, t_next: jax.Array
  ) -> tuple[State, Any]:
    """Moves x from t to t_next; returns it and the new memory."""


# Solvers by the name that a config gives them.
SOLVERS: dict[str, Solver] = {
  solver.name: solver
  for solver in (
    runge_kutta.euler,
    runge_kutta.midpoint,
    runge_kutta.heun,
    runge_kutta.rk4,
  )
}


def solve(
  solver: Solver,
  field: Field,
  x: State,
  times: jax.Array,
  *,
  trajectory: bool = False,
) -> State:
  """Follows `field` from x at times[0] to times[-1], through every time.

  The times may rise or fall: down from 1 to 0 samples, up from 0 to 1 encodes.
  One scan, so the field is compiled once however many steps there are. The
  state is carried in float32 (or wider) whatever the field returns. With
  `trajectory`, returns the states at all times, stacked on a new leading dim.
  """
  times = jnp.asarray(times)
  x = jax.tree.map(lambda leaf: paths.wide(jnp.asarray(leaf)), x)

  def body(carry, t_and_next):
    x, memory = solver.step(field, *carry, *t_and_next)
    return (x, memory), (x if trajectory else None)

  steps = (times[:-1], times[1:])
  (end, _), states = jax.lax.scan(body, (x, solver.init(x)), steps)
  if not trajectory:
    return end
  return jax.tree.map(
    lambda first, rest: jnp.concatenate([first[None], rest]), x, states
  )
