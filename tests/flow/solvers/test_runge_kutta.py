"""A tableau keeps what it claims."""

import fractions
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate

from flowjax.flow import paths, solvers
from flowjax.flow.solvers import runge_kutta

TABLEAUX = [build(paths.straight()) for build in runge_kutta.SOLVERS.values()]
tableaux = pytest.mark.parametrize("solver", TABLEAUX, ids=lambda s: s.name)


@tableaux
def test_the_tableau_is_consistent(solver):
  assert math.fsum(solver.weights) == pytest.approx(1.0, abs=1e-15)
  for i, (node, row) in enumerate(
    zip(solver.nodes, solver.matrix, strict=True)
  ):
    assert len(row) == i
    assert math.fsum(row) == pytest.approx(node, abs=1e-15)


# Neither linear nor autonomous, so that no order condition is void.
@functools.cache
def wave(solver):
  return jax.jit(
    lambda x, times: solvers.solve(
      solver, lambda x, t: jnp.sin(x + 2.0 * t), x, times
    )
  )


@tableaux
@pytest.mark.parametrize("ends", [(0.0, 1.0), (1.0, 0.0)])
def test_the_measured_order_is_the_claimed_one(solver, ends):
  # Many starts, so that a change of sign of one error does not look like
  # progress.
  x = np.linspace(-1.0, 1.0, 30)
  exact = scipy.integrate.solve_ivp(
    lambda t, x: np.sin(x + 2.0 * t),
    ends,
    x,
    method="DOP853",
    rtol=1e-13,
    atol=1e-13,
  ).y[:, -1]
  errors, steps = [], np.array([20, 40, 80])
  for n in steps:
    # Steps of no length at the end make one program of all three.
    times = np.pad(np.linspace(*ends, n + 1), (0, 80 - n), mode="edge")
    with jax.enable_x64(True):
      errors.append(np.linalg.norm(wave(solver)(x, times) - exact))
  slope = -np.polyfit(np.log(steps), np.log(errors), 1)[0]
  assert slope == pytest.approx(solver.order, abs=0.1), errors


@tableaux
def test_one_step_on_a_straight_line_is_exact(solver):
  x, eps = np.random.default_rng(0).standard_normal((2, 50), np.float32)
  start, grid = eps, np.float32([1.0, 0.0])
  end = jax.jit(
    lambda start: solvers.solve(solver, lambda _, t: eps - x, start, grid)
  )(start)
  np.testing.assert_allclose(end, x, atol=1e-6)


@tableaux
def test_stages_stand_on_the_grid_exactly(solver):
  # A stage at t < 0 or t > 1 would leave the domain of a path.
  seen = []

  def field(x, t):
    jax.debug.callback(lambda t: seen.append(float(t)), t, ordered=True)
    return x

  grid = np.float32([1.0, 0.7, 0.1, 0.0])
  jax.jit(lambda x: solvers.solve(solver, field, x, grid))(np.float32([1.0]))
  jax.effects_barrier()
  assert len(seen) == 3 * len(solver.weights)
  expected = [
    float(
      fractions.Fraction(float(t))
      + fractions.Fraction(node) * fractions.Fraction(float(after - t))
    )
    for t, after in zip(grid[:-1], grid[1:], strict=True)
    for node in solver.nodes
  ]
  np.testing.assert_allclose(seen, expected, atol=1e-7)
  at_ends = [t for t in seen if min(abs(t - g) for g in grid) < 1e-6]
  assert at_ends and all(np.float32(t) in grid for t in at_ends)
