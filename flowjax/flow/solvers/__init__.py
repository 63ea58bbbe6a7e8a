"""Solvers of dx/dt = field(x, t) on a grid of times, one file per family.

A solver is built for a path, and says in `prediction` what the field has to
return: a velocity for those that integrate it, data or noise for those that
are written in terms of these. Whatever the network predicts, the field that a
solver gets is converted to that (`flow/prediction.py`).
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from flowjax.flow import names, paths
from flowjax.flow.solvers import (
  adaptive,
  ancestral,
  dpm,
  edm,
  multistep,
  runge_kutta,
  sde,
  soundness,
  unipc,
)

check = soundness.check

# An array, or a tree of arrays that move together.
State = Any
# field(x, t) -> what `prediction` names; t is one number.
Field = Callable[[State, jax.Array], State]


class Step(NamedTuple):
  """One interval of the grid: step `number` of `total`, from t to t_next."""

  t: jax.Array
  t_next: jax.Array
  number: jax.Array  # From 0.
  total: int


class Solver(Protocol):
  """One step of a method, with whatever it must remember between steps.

  A solver may have `grid(times)`, the times that it follows in place of those
  that it is given. One that chooses its own steps has `run(field, x, times,
  trajectory)` in place of `init` and `step`. One that evaluates another number
  of times on a grid that starts below the path's end has `begun()`, which
  returns the solver for that. Two more default to no:
  `stochastic`, if it draws noise on the way down and cannot go up, and
  `learns_variance`, if the field is to return (prediction, v), as a network
  does that learned both (flow/variance.py).
  """

  name: str
  prediction: str  # What the field returns, as named in flow/prediction.py.

  def init(self, x: State, rng: jax.Array | None) -> Any:
    """Returns the memory before the first step, as a tree of arrays.

    Raises ValueError where the method draws noise and there is no rng.
    """

  def step(
    self, field: Field, x: State, memory: Any, step: Step
  ) -> tuple[State, Any]:
    """Moves x from step.t to step.t_next; returns it and the new memory."""

  def evaluations(self, count: int) -> int:
    """Returns how often `count` steps evaluate the field."""


# Factories of solvers, factory(path, **options), by the name in a config.
SOLVERS: dict[str, Callable[..., Any]] = {
  **runge_kutta.SOLVERS,
  **sde.SOLVERS,
  **edm.SOLVERS,
  **adaptive.SOLVERS,
  **multistep.SOLVERS,
  **ancestral.SOLVERS,
  **dpm.SOLVERS,
  **unipc.SOLVERS,
}


def build(name: str, path: paths.Path, **options: Any) -> Solver:
  """Builds the solver `name` for a path, with the options that it takes.

  Raises ValueError for an unknown name or an option that it does not take.
  """
  factory = names.choose("solver", SOLVERS, name, options, given=("path",))
  return factory(path, **options)


def solve(
  solver: Solver,
  field: Field,
  x: State,
  times: jax.Array,
  *,
  rng: jax.Array | None = None,
  trajectory: bool = False,
) -> State:
  """Follows `field` from x at times[0] to times[-1], through every time.

  The times may rise or fall: down from 1 to 0 samples, up from 0 to 1 encodes.
  One scan, so the field is compiled once however many steps there are. The
  state is carried in float32 (or wider) whatever the field returns. With
  `trajectory`, returns the states at all times, stacked on a new leading dim.
  `rng` is for methods that draw noise.
  """
  times = jnp.asarray(times)
  if hasattr(solver, "run"):
    return solver.run(field, x, times, trajectory)
  if hasattr(solver, "grid"):
    times = solver.grid(times)
  count = len(times) - 1
  x = jax.tree.map(lambda leaf: paths.wide(jnp.asarray(leaf)), x)

  def body(carry, now):
    x, memory = solver.step(field, *carry, Step(*now, count))
    return (x, memory), (x if trajectory else None)

  steps = (times[:-1], times[1:], jnp.arange(count))
  (end, _), states = jax.lax.scan(body, (x, solver.init(x, rng)), steps)
  if not trajectory:
    return end
  return jax.tree.map(
    lambda first, rest: jnp.concatenate([first[None], rest]), x, states
  )
