"""Every deterministic solver, on every path, on its whole default grid.

But for those that choose their steps: a grid is nothing to them.

Normal data with the field known exactly: the flow is linear, and what the
samples deviate by is what the solver makes of the noise. The paths are not cut
short, so that their ends are in it.
"""

import jax
import jax.numpy as jnp
import pytest

from flowjax.flow import grids, paths, prediction, solvers
from flowjax.flow.solvers import adaptive

STD = 0.85
STEPS = 32
STRAIGHT = paths.straight()
SOLVERS = [
  name
  for name in solvers.SOLVERS
  if name not in adaptive.SOLVERS
  and not getattr(solvers.build(name, STRAIGHT), "stochastic", False)
]
LOOSE = {"euler": 0.06, "ddim": 0.09}
# Their sigma rises exponentially in t, and a velocity in t is that steep.
STEEP = {"ve": 0.13, "edm": 0.13}


def sampled(solver, path, steps):
  """Returns the deviation of samples."""

  def field(x, t):
    c = path.at(t, x)
    share = c.alpha * STD**2 / ((c.alpha * STD) ** 2 + c.sigma**2)
    return prediction.convert(
      path, "v", solver.prediction, _v(c, share * x, x), x, t
    )

  high = jnp.float32(path.high)
  start = jnp.hypot(path.alpha(high) * STD, path.sigma(high))
  grid = jnp.asarray(grids.build("uniform", path, steps))
  run = jax.jit(lambda x: solvers.solve(solver, field, x, grid))
  return float(run(start[None])[0])


def _v(c, data, x):
  share = c.sigma / ((c.alpha * STD) ** 2 + c.sigma**2)
  return c.alpha * share * x - c.sigma * data


@pytest.mark.slow
@pytest.mark.parametrize("name", SOLVERS)
def test_the_samples_deviate_as_the_data_do(name):
  for path_name in paths.PATHS:
    path = paths.build(path_name)
    solver = solvers.build(name, path)
    bound = LOOSE.get(name, 0.03)
    if solver.prediction == "velocity" and name != "rk4":
      bound = max(bound, STEEP.get(path_name, 0.0))
      if name == "euler" and path_name in STEEP:
        continue  # Half of the deviation is lost: as 32 steps of order 1 do.
    found = sampled(solver, path, STEPS)
    assert abs(found - STD) < bound * STD, (path_name, found)


@pytest.mark.parametrize("steps", [16, 64])
@pytest.mark.parametrize("name", ["dpmpp_2m", "dpmpp_3m", "unipc"])
@pytest.mark.parametrize("low", [1e-5, 1e-3])
@pytest.mark.parametrize("path", ["vp", "cosine"])
def test_a_leap_to_the_end_extrapolates_nothing(path, low, name, steps):
  path = paths.build(path, low=low)
  options = {} if name != "unipc" else {"lower_order_final": False}
  solver = solvers.build(name, path, **options)
  assert abs(sampled(solver, path, steps) - STD) < 0.05 * STD
