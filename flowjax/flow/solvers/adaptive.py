"""Adaptive Runge-Kutta methods of order 5, through diffrax.

They keep the estimated error of every step below atol + rtol |x|, in the mean
square over the whole state: all examples of a batch share their steps. Only the
ends of the grid matter; with a trajectory the states at its other times are
interpolated, and take no step of their own.

**What is not a number** is refused by the error control, which tries a smaller
step. Once the step is below 1e-9 of the whole, or after `max_steps` steps, the
solve stops. `solve` then raises, with the time that was reached. Inside of jit
it cannot: there it returns nan, all of it, so that no half-integrated state
passes for an end; `integrate` also returns a `Report`, to look at outside, and
from that `reason` says the same.

Gradients are those of reverse mode, through the steps that were taken.
"""

import dataclasses
import importlib.util
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from flowjax.flow import paths

# Of the whole interval.
FIRST_STEP = 0.01
SMALLEST_STEP = 1e-9

# By name: the class in diffrax, and evaluations per step; the last one of a
# step is the first one of the next.
_METHODS = {"dopri5": ("Dopri5", 6), "tsit5": ("Tsit5", 6)}


Field = Callable[[Any, jax.Array], Any]


class Report(NamedTuple):
  """How far a solve came: to the end, or to `time` with `state`."""

  finished: jax.Array
  time: jax.Array
  state: Any
  evaluations: jax.Array


@dataclasses.dataclass(frozen=True)
class Adaptive:
  """A method that chooses its steps to meet tolerances."""

  name: str
  rtol: float
  atol: float
  max_steps: int
  prediction: str = "velocity"

  def evaluations(self, count: int) -> int:
    """Refuses: the number is known when the solve is over."""
    raise ValueError(
      f"How often {self.name} evaluates the field depends on the field, not on "
      f"a grid of {count} steps; `integrate` reports it."
    )

  def run(
    self,
    field: Field,
    x: Any,
    times: jax.Array,
    trajectory: bool = False,
  ) -> Any:
    """Follows `field` from x at times[0] to times[-1]; see `integrate`.

    Raises ValueError if it stopped before, unless that is not known yet: inside
    of jit, where it returns nan.
    """
    states, report = self.integrate(field, x, times, trajectory)
    if isinstance(report.finished, jax.core.Tracer) or report.finished:
      return states
    raise ValueError(self.reason(field, times, report))

  def integrate(
    self,
    field: Field,
    x: Any,
    times: jax.Array,
    trajectory: bool = False,
  ) -> tuple[Any, Report]:
    """Returns the state at times[-1] and a report.

    With `trajectory`, the states at all times, on a new leading dim. If the end
    was not reached they are nan.
    """
    import diffrax

    x = jax.tree.map(lambda leaf: paths.wide(jnp.asarray(leaf)), x)
    times = jnp.asarray(times, jnp.result_type(*jax.tree.leaves(x)))
    span = times[-1] - times[0]
    method, per_step = _METHODS[self.name]
    saved = [diffrax.SubSaveAt(t1=True)]
    if trajectory:
      saved.append(diffrax.SubSaveAt(ts=times))

    def slope(t, x, args):
      del args
      return jax.tree.map(lambda v, x: v.astype(x.dtype), field(x, t), x)

    solution = diffrax.diffeqsolve(
      diffrax.ODETerm(slope),
      getattr(diffrax, method)(),
      t0=times[0],
      t1=times[-1],
      dt0=FIRST_STEP * span,
      y0=x,
      saveat=diffrax.SaveAt(subs=saved),
      stepsize_controller=diffrax.PIDController(
        rtol=self.rtol,
        atol=self.atol,
        dtmin=SMALLEST_STEP * jnp.abs(span),
        force_dtmin=False,
      ),
      max_steps=self.max_steps,
      throw=False,
    )
    time = solution.ts[0][0]
    state = jax.tree.map(lambda leaf: leaf[0], solution.ys[0])
    # Not the result code: it also tells of a last step that was tiny.
    finished = time == times[-1]
    states = jax.tree.map(
      lambda leaf: jnp.where(finished, leaf, jnp.nan),
      solution.ys[1] if trajectory else state,
    )
    evaluations = 1 + per_step * solution.stats["num_steps"]
    return states, Report(finished, time, state, evaluations)

  def reason(self, field: Field, times: Any, report: Report) -> str:
    """Says why the solve stopped, by a look at the field where it did."""
    span = float(times[-1] - times[0])
    where = (
      f"{self.name} stopped at t = {float(report.time):.7g}, after "
      f"{int(report.evaluations)} evaluations"
    )
    for beyond in (0.0, SMALLEST_STEP, 1e-6):
      t = report.time + beyond * span
      leaves = jax.tree.leaves(field(report.state, t))
      if not all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in leaves):
        return (
          f"{where}: from there on the field is not finite. Look for the nan "
          "or overflow of the network at this time, or end the grid before it."
        )
    return (
      f"{where}: rtol = {self.rtol} and atol = {self.atol} would take steps "
      f"below {SMALLEST_STEP} of the whole, or more than max_steps = "
      f"{self.max_steps} of them. Loosen the tolerances (float32 keeps 7 "
      "digits), raise max_steps, or take a solver with a fixed grid."
    )


def _build(name: str) -> Callable[..., Adaptive]:
  def build(
    path: paths.Path,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    max_steps: int = 4096,
  ) -> Adaptive:
    del path
    if importlib.util.find_spec("diffrax") is None:
      raise ValueError(
        f"The solver {name!r} needs diffrax: pip install -e '.[adaptive]'. "
        "Without it there are solvers with a fixed grid, such as 'rk4'."
      )
    if not (rtol >= 0.0 and atol >= 0.0 and 0.0 < rtol + atol < math.inf):
      raise ValueError(
        f"The error cannot be kept below atol + rtol |x| for rtol = {rtol}, "
        f"atol = {atol}; 1e-5 for both is usual."
      )
    if max_steps < 1:
      raise ValueError(
        f"max_steps must be at least 1, not {max_steps}; 4096 is usual."
      )
    return Adaptive(name, rtol, atol, max_steps)

  return build


SOLVERS = {name: _build(name) for name in _METHODS}
