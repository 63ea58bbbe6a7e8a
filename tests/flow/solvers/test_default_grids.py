"""Every deterministic solver, on every path, on its whole default grid.

But for those that choose their steps: a grid is nothing to them.

Normal data with the field known exactly: the flow is linear, and what the
samples deviate by is what the solver makes of the noise. The paths are not cut
short, so that their ends are in it.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowjax.flow import grids, paths, prediction, solvers
from flowjax.flow.solvers import adaptive

STD = 0.85
STEPS = 32
STRAIGHT = paths.straight()
PATHS = {name: paths.build(name) for name in paths.PATHS}
SOLVERS = [
  name
  for name in solvers.SOLVERS
  if name not in adaptive.SOLVERS
  and not getattr(solvers.build(name, STRAIGHT), "stochastic", False)
]
PREDICTIONS = {solvers.build(name, STRAIGHT).prediction for name in SOLVERS}
LOOSE = {"euler": 0.06, "ddim": 0.09}
# Their sigma rises exponentially in t, and a velocity in t is that steep.
STEEP = {"ve": 0.13, "edm": 0.13}


def field_of(path, predicted):
  """Returns the field of the data, known exactly, as a prediction."""

  def field(x, t):
    c = path.at(t, x)
    share = c.alpha * STD**2 / ((c.alpha * STD) ** 2 + c.sigma**2)
    return prediction.convert(path, "v", predicted, _v(c, share * x, x), x, t)

  return field


def _v(c, data, x):
  share = c.sigma / ((c.alpha * STD) ** 2 + c.sigma**2)
  return c.alpha * share * x - c.sigma * data


def deviation(path, t):
  return jnp.hypot(path.alpha(t) * STD, path.sigma(t))


def sampled(solver, path):
  """Returns the deviation of samples."""
  grid = grids.build("uniform", path, STEPS)
  start, t_K, slopes = multiples(path)
  return float(along(solver)(grid, start, t_K, slopes[solver.prediction]))


@functools.cache
def along(solver):
  """Returns a program, which all paths share that a solver knows none of."""

  @jax.jit
  def run(grid, start, t_K, slope_K):
    def field(x, t):
      return slope_K[jnp.argmin(jnp.abs(t_K - t))] * x

    return solvers.solve(solver, field, start, grid)[0]

  return run


@functools.cache
def multiples(path):
  """Returns the start, and what each prediction is where a stage may be.

  Of x of mean 0 it is a multiple. All stages are at the times of the grid, or
  in their middle.
  """
  grid = grids.build("uniform", path, STEPS)
  t_K = np.sort(np.append(grid, 0.5 * (grid[:-1] + grid[1:])))

  @jax.jit
  def run(t_K):
    slopes = {
      predicted: field_of(path, predicted)(jnp.ones_like(t_K), t_K)
      for predicted in PREDICTIONS
    }
    return deviation(path, t_K[-1:]), t_K, slopes

  return run(t_K)


@pytest.mark.slow
@pytest.mark.parametrize("name", SOLVERS)
def test_the_samples_deviate_as_the_data_do(name):
  for path_name, path in PATHS.items():
    solver = solvers.build(name, path)
    bound = LOOSE.get(name, 0.03)
    if solver.prediction == "velocity" and name != "rk4":
      bound = max(bound, STEEP.get(path_name, 0.0))
      if name == "euler" and path_name in STEEP:
        continue  # Half of the deviation is lost: as 32 steps of order 1 do.
    found = sampled(solver, path)
    assert abs(found - STD) < bound * STD, (path_name, found)


@pytest.mark.parametrize("name", ["dpmpp_2m", "dpmpp_3m", "unipc"])
@pytest.mark.parametrize("path, low", [("vp", 1e-5), ("cosine", 1e-3)])
def test_a_leap_to_the_end_extrapolates_nothing(path, low, name):
  path = paths.build(path, low=low)
  options = {} if name != "unipc" else {"lower_order_final": False}
  solver = solvers.build(name, path, **options)
  field = field_of(path, solver.prediction)

  @jax.jit
  def move(state, t, t_next, number):
    # Of so many steps that none is one of the few that end at a lower order.
    step = solvers.Step(t, t_next, number, 10**6)
    return solver.step(field, *state, step)

  # Step by step, so that both grids share one program.
  for steps in (16, 64):
    grid = grids.build("uniform", path, steps)
    x = deviation(path, grid[:1])
    state = x, solver.init(x, None)
    for number in range(steps):
      state = move(state, *grid[number : number + 2], np.int32(number))
    assert abs(float(state[0][0]) - STD) < 0.05 * STD, steps
