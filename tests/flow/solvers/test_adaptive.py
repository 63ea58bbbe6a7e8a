"""Adaptive solvers meet their tolerances, and stop where a field is nan."""

import dataclasses
import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowjax.flow import paths, solvers

pytest.importorskip("diffrax")

STRAIGHT = paths.straight()
DOWN = np.float32([1.0, 0.6, 0.0])
X = np.linspace(-1.0, 1.0, 20)


def wave(x, t):
  return jnp.sin(3.0 * x + 2.0 * t)


def broken(x, t):
  return jnp.where(t < 0.4, jnp.nan, -x)


@functools.cache
def exact():
  """Returns where `wave` takes X from 1 to 0."""
  rk4, fine = solvers.build("rk4", STRAIGHT), np.linspace(1.0, 0.0, 2001)
  return np.asarray(solvers.solve(rk4, wave, X, fine))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dopri5", "tsit5"])
def test_the_error_follows_the_tolerance(name):
  with jax.enable_x64(True):
    solver = solvers.build(name, STRAIGHT)

    @jax.jit
    def run(tolerance):
      given = dataclasses.replace(solver, rtol=tolerance, atol=tolerance)
      end, report = given.integrate(wave, X, np.array([1.0, 0.0]))
      return end, report.evaluations

    evaluations = []
    for tolerance in (1e-4, 1e-7):
      end, count = jax.device_get(run(tolerance))
      assert np.max(np.abs(end - exact())) < 10 * tolerance
      evaluations.append(int(count))
    # Of order 5: 1000 times more precise costs about 1000^(1/5) = 4 times more.
    assert 2.0 < evaluations[1] / evaluations[0] < 6.0


@pytest.mark.slow
def test_dopri5_agrees_with_torchdiffeq():
  torch = pytest.importorskip("torch")
  torchdiffeq = pytest.importorskip("torchdiffeq")
  times = np.array([1.0, 0.7, 0.2, 0.0])
  tolerances = {"rtol": 1e-9, "atol": 1e-9}
  theirs = torchdiffeq.odeint(
    lambda t, x: torch.sin(3.0 * x + 2.0 * t),
    torch.tensor(X),
    torch.tensor(times),
    **tolerances,
    method="dopri5",
  ).numpy()
  with jax.enable_x64(True):
    solver = solvers.build("dopri5", STRAIGHT, **tolerances)
    ours = solvers.solve(solver, wave, X, times, trajectory=True)
  np.testing.assert_allclose(ours, theirs, atol=1e-8)


@pytest.mark.slow
def test_it_goes_both_ways_over_trees_and_tells_the_times_between():
  solver = solvers.build("tsit5", STRAIGHT, rtol=1e-6, atol=1e-6)
  state = {"x": jnp.ones((3, 2), jnp.bfloat16), "clock": jnp.zeros(())}

  def field(state, t):
    return {"x": (-state["x"]).astype(jnp.bfloat16), "clock": jnp.ones(())}

  states = solvers.solve(solver, field, state, DOWN, trajectory=True)
  assert states["x"].shape == (3, 3, 2) and states["x"].dtype == jnp.float32
  np.testing.assert_allclose(states["clock"], DOWN - 1.0, atol=1e-6)
  # The slopes have 8 bits.
  np.testing.assert_allclose(states["x"][-1], np.exp(1.0), rtol=5e-3)
  up = solvers.solve(solver, lambda x, t: -x, jnp.ones(2), DOWN[::-1])
  np.testing.assert_allclose(up, np.exp(-1.0), rtol=1e-5)


@pytest.mark.slow
def test_a_nan_stops_the_solve_and_says_when():
  solver = solvers.build("dopri5", STRAIGHT)
  with pytest.raises(ValueError, match="stopped at t = 1, after .*not finite"):
    solvers.solve(solver, lambda x, t: x * jnp.nan, jnp.ones(3), DOWN)
  # A field that is too hard is another matter.
  short = solvers.build("dopri5", STRAIGHT, max_steps=3, rtol=1e-7, atol=1e-7)
  with pytest.raises(ValueError, match="max_steps = 3"):
    solvers.solve(short, lambda x, t: 9.0 * wave(x, t), jnp.ones(3), DOWN)


@pytest.mark.slow(1)
def test_inside_of_jit_a_nan_does_not_spin_and_leaves_nan():
  solver = solvers.build("dopri5", STRAIGHT)

  @jax.jit
  def both(x):
    states = solvers.solve(solver, broken, x, DOWN, trajectory=True)
    return states, solver.integrate(broken, x, DOWN)[1]

  states, report = jax.device_get(both(np.ones(3, np.float32)))
  assert states.shape == (3, 3) and np.all(np.isnan(states))
  said = solver.reason(broken, DOWN, report)
  assert "stopped at t = 0.4" in said and "not finite" in said
  assert not report.finished
  assert float(report.time) == pytest.approx(0.4, abs=1e-5)
  assert np.all(np.isfinite(report.state))
  assert int(report.evaluations) < 1000


@pytest.mark.slow(1)
@pytest.mark.parametrize("name", ["dopri5", "tsit5"])
def test_the_report_counts_the_evaluations(name):
  seen = []

  def field(x, t):
    jax.debug.callback(lambda: seen.append(None))
    return -x

  solver = solvers.build(name, STRAIGHT)
  end, report = solver.integrate(field, jnp.ones(2), DOWN)
  jax.effects_barrier()
  assert int(report.evaluations) == len(seen)
  assert report.finished and float(report.time) == 0.0
  np.testing.assert_array_equal(end, report.state)
  with pytest.raises(ValueError, match="`integrate` reports it"):
    solver.evaluations(10)


@pytest.mark.slow
def test_gradients_flow_through_the_steps():
  solver = solvers.build("dopri5", STRAIGHT, rtol=1e-6, atol=1e-6)

  def end(k):
    return jnp.sum(solvers.solve(solver, lambda x, t: k * x, jnp.ones(3), DOWN))

  # 3 exp(-k).
  np.testing.assert_allclose(
    jax.jit(jax.grad(end))(1.0), -3.0 * np.exp(-1.0), rtol=1e-4
  )


def test_bad_input_is_refused(monkeypatch):
  with pytest.raises(ValueError, match="1e-5 for both is usual"):
    solvers.build("dopri5", STRAIGHT, rtol=-1.0)
  with pytest.raises(ValueError, match="1e-5 for both is usual"):
    solvers.build("dopri5", STRAIGHT, rtol=0.0, atol=0.0)
  with pytest.raises(ValueError, match="max_steps must be at least 1"):
    solvers.build("tsit5", STRAIGHT, max_steps=0)
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with pytest.raises(ValueError, match=r"pip install .*\[adaptive\]"):
    solvers.build("tsit5", STRAIGHT)
