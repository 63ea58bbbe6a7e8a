"""Adaptive solvers meet their tolerances, and stop where a field is nan."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowjax.flow import paths, solvers

pytest.importorskip("diffrax")

STRAIGHT = paths.straight()
DOWN = np.float32([1.0, 0.6, 0.0])


def wave(x, t):
  return jnp.sin(3.0 * x + 2.0 * t)


def broken(x, t):
  return jnp.where(t < 0.4, jnp.nan, -x)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dopri5", "tsit5"])
def test_the_error_follows_the_tolerance(name):
  with jax.enable_x64(True):
    x = jnp.linspace(-1.0, 1.0, 20)
    fine = np.linspace(1.0, 0.0, 2001)
    exact = solvers.solve(solvers.build("rk4", STRAIGHT), wave, x, fine)
    evaluations = []
    for tolerance in (1e-4, 1e-7):
      solver = solvers.build(name, STRAIGHT, rtol=tolerance, atol=tolerance)
      end, report = solver.integrate(wave, x, np.array([1.0, 0.0]))
      assert float(jnp.max(jnp.abs(end - exact))) < 10 * tolerance
      evaluations.append(int(report.evaluations))
    # Of order 5: 1000 times more precise costs about 1000^(1/5) = 4 times more.
    assert 2.0 < evaluations[1] / evaluations[0] < 6.0


@pytest.mark.slow
def test_dopri5_agrees_with_torchdiffeq():
  torch = pytest.importorskip("torch")
  torchdiffeq = pytest.importorskip("torchdiffeq")
  x = np.linspace(-1.0, 1.0, 20)
  times = np.array([1.0, 0.7, 0.2, 0.0])
  for tolerance in (1e-5, 1e-9):
    theirs = torchdiffeq.odeint(
      lambda t, x: torch.sin(3.0 * x + 2.0 * t),
      torch.tensor(x),
      torch.tensor(times),
      rtol=tolerance,
      atol=tolerance,
      method="dopri5",
    ).numpy()
    with jax.enable_x64(True):
      solver = solvers.build("dopri5", STRAIGHT, rtol=tolerance, atol=tolerance)
      ours = solvers.solve(solver, wave, jnp.asarray(x), times, trajectory=True)
    np.testing.assert_allclose(ours, theirs, atol=10 * tolerance)


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
  with pytest.raises(ValueError, match=r"stopped at t = 0\.4.*not finite"):
    solvers.solve(solver, broken, jnp.ones(3), DOWN)
  with pytest.raises(ValueError, match="stopped at t = 1, after .*not finite"):
    solvers.solve(solver, lambda x, t: x * jnp.nan, jnp.ones(3), DOWN)
  # A field that is too hard is another matter.
  short = solvers.build("dopri5", STRAIGHT, max_steps=3, rtol=1e-7, atol=1e-7)
  with pytest.raises(ValueError, match="max_steps = 3"):
    solvers.solve(short, lambda x, t: 9.0 * wave(x, t), jnp.ones(3), DOWN)


def test_inside_of_jit_a_nan_does_not_spin_and_leaves_nan():
  solver = solvers.build("dopri5", STRAIGHT)
  sample = jax.jit(
    lambda x: solvers.solve(solver, broken, x, DOWN, trajectory=True)
  )
  assert np.all(np.isnan(sample(jnp.ones(3))))
  _, report = jax.jit(lambda x: solver.integrate(broken, x, DOWN))(jnp.ones(3))
  assert not report.finished
  assert float(report.time) == pytest.approx(0.4, abs=1e-5)
  assert np.all(np.isfinite(report.state))
  assert int(report.evaluations) < 1000


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
    jax.grad(end)(jnp.float32(1.0)), -3.0 * np.exp(-1.0), rtol=1e-4
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
