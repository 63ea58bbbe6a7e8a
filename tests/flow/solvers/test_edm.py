"""EDM's sampler is Algorithm 2, on every path."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowjax.flow import paths, solvers
from flowjax.flow.solvers import noise

MEAN, STD = 0.7, 0.5
STRAIGHT = paths.straight()


def denoiser(x, s):
  """E[data | x = data + s noise] of data from N(MEAN, STD^2)."""
  return (STD**2 * x + s**2 * MEAN) / (STD**2 + s**2)


def on(path):
  """That denoiser as a field on a path."""

  def field(x, t):
    c = path.at(t, x)
    variance = (c.alpha * STD) ** 2 + c.sigma**2
    return (c.alpha * STD**2 * x + c.sigma**2 * MEAN) / variance

  return field


def karras(steps, low, high, rho=7.0):
  ramp = np.linspace(high ** (1 / rho), low ** (1 / rho), steps)
  return np.append(ramp**rho, 0.0)


def algorithm(x, draws, sigma, churn, s_min, s_max, s_noise):
  """Algorithm 2, in float64 and x + sigma noise."""
  count = len(sigma) - 1
  for i, (t, after) in enumerate(zip(sigma[:-1], sigma[1:], strict=True)):
    gamma = min(churn / count, 2**0.5 - 1) if s_min <= t <= s_max else 0.0
    raised = t + gamma * t
    x = x + np.sqrt(raised**2 - t**2) * s_noise * draws[i]
    slope = (x - denoiser(x, raised)) / raised
    end = x + (after - raised) * slope
    if after != 0.0:
      far = (end - denoiser(end, after)) / after
      end = x + (after - raised) * (slope + far) / 2
    x = end
  return x


@pytest.mark.parametrize(
  "name, churn, s_min, s_max, s_noise",
  [
    ("straight", 0.0, 0.0, np.inf, 1.0),
    ("straight", 40.0, 0.0, np.inf, 1.0),  # As much as sqrt(2) - 1 allows.
    ("straight", 3.0, 0.05, 50.0, 1.003),
    ("edm", 3.0, 0.05, 50.0, 1.003),
  ],
)
def test_it_is_algorithm_2(name, churn, s_min, s_max, s_noise):
  with jax.enable_x64(True):
    path = paths.build(name, **({"sigma_max": 200.0} if name == "edm" else {}))
    sigma = karras(9, 0.002, 80.0)
    level = -2.0 * np.log(sigma[:-1])
    times = np.append(jax.jit(path.log_snr_inverse)(level), path.low)
    if name == "edm":  # Its grid ends with sigma_min at t = 0, and then data.
      times[-2] = 1e-12
    alpha = float(path.alpha(times[0]))
    x = 80.0 * np.random.default_rng(0).standard_normal((4, 3))
    solver = solvers.build(
      "edm_heun",
      path,
      churn=churn,
      s_min=s_min,
      s_max=s_max,
      s_noise=s_noise,
    )
    rng = jax.random.key(1)
    end = solvers.solve(solver, on(path), alpha * x, times, rng=rng)
    draw = jax.jit(lambda number: noise.normal(rng, number, x))
    draws = [np.asarray(draw(i)) for i in range(9)]
    expected = algorithm(x, draws, sigma, churn, s_min, s_max, s_noise)
    np.testing.assert_allclose(end, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["straight", "vp", "edm", "ddpm"])
def test_mean_and_variance_are_those_of_the_data(name):
  # The field is linear, so that the end is a x + b + the sum of c_i z_i, z_i
  # the noise of step i: each coefficient is the end of a particle of its own.
  path = paths.build(name, **({"sigma_max": 20.0} if name == "edm" else {}))
  solver = solvers.build("edm_heun", path, churn=20.0, s_max=10.0)

  @jax.jit
  def run(axes):
    # Steps even in log sigma, from 20 (or what there is) down to 0.01.
    log_s = jnp.linspace(np.log(20.0), np.log(0.01), 60)
    times = jnp.append(path.log_snr_inverse(-2.0 * log_s), path.low)
    c = path.at(times[0], jnp.ones(()))
    std = jnp.sqrt((c.alpha * STD) ** 2 + c.sigma**2)
    given = dataclasses.replace(
      solver, draw=lambda rng, number, x: axes[number]
    )
    x = c.alpha * MEAN + std * axes[60]
    return solvers.solve(given, on(path), x, times, rng=jax.random.key(1))

  end = np.asarray(run(np.eye(62, dtype=np.float32)))
  assert float(end[-1]) == pytest.approx(MEAN, abs=1e-3)
  spread = np.linalg.norm(end[:-1] - end[-1])
  assert float(spread) == pytest.approx(STD, rel=0.015)


def evaluated(solver, grid):
  seen = []

  def field(x, t):
    jax.debug.callback(lambda t: seen.append(float(t)), t, ordered=True)
    return 0.5 * x

  end = solvers.solve(solver, field, jnp.ones(2), grid)
  jax.effects_barrier()
  assert np.all(np.isfinite(end))
  return seen


def test_the_last_step_and_one_from_pure_noise_evaluate_once():
  solver = solvers.build("edm_heun", paths.build("straight", high=0.9))
  seen = evaluated(solver, np.float32([0.9, 0.5, 0.25, 0.0]))
  np.testing.assert_allclose(seen, [0.9, 0.5, 0.5, 0.25, 0.25], rtol=1e-6)
  assert len(seen) == solver.evaluations(3)
  # Also where it ends in noise, above the data.
  seen = evaluated(solver, np.float32([0.9, 0.5, 0.25]))
  np.testing.assert_allclose(seen, [0.9, 0.5, 0.5], rtol=1e-6)
  # At t = 1 nothing is left of the data, and sigma / alpha is infinite.
  solver = solvers.build("edm_heun", STRAIGHT)
  for times, wanted in (
    ([1.0, 0.5, 0.25, 0.0], [1.0, 0.5, 0.25, 0.25]),
    ([1.0, 0.0], [1.0]),
  ):
    seen = evaluated(solver, np.float32(times))
    np.testing.assert_allclose(seen, wanted, rtol=1e-6)
    assert len(seen) == solver.evaluations(len(times) - 1)


def test_it_is_of_second_order():
  def error(steps):
    t = np.linspace(0.8, 0.1, steps + 1)
    x = np.linspace(-1.0, 1.0, 9)
    end = np.asarray(
      solvers.solve(solvers.build("edm_heun", STRAIGHT), on(STRAIGHT), x, t)
    )

    def std(t):
      return np.sqrt(((1 - t) * STD) ** 2 + t**2)

    exact = 0.9 * MEAN + std(0.1) / std(0.8) * (x - 0.2 * MEAN)
    return float(np.max(np.abs(end - exact)))

  # The last step is one of Euler: of second order by itself.
  with jax.enable_x64(True):
    assert np.log2(error(40) / error(80)) == pytest.approx(2.0, abs=0.2)


def test_it_goes_from_data_to_noise_too():
  x = np.linspace(-1.0, 2.0, 9, dtype=np.float32)
  solver = solvers.build("edm_heun", STRAIGHT)
  grid = np.linspace(0.0, 0.9, 200)
  noise = solvers.solve(solver, on(STRAIGHT), x, grid)
  std = np.sqrt((0.1 * STD) ** 2 + 0.9**2)
  exact = 0.1 * MEAN + std / STD * (x - MEAN)
  np.testing.assert_allclose(noise, exact, atol=0.02)


def test_the_state_may_be_a_tree():
  solver = solvers.build("edm_heun", STRAIGHT, churn=4.0)
  state = {"a": jnp.ones(3), "b": jnp.ones(3)}
  grid = np.float32([0.9, 0.4, 0.0])
  end = solvers.solve(
    solver,
    lambda state, t: jax.tree.map(lambda x: 0.5 * x, state),
    state,
    grid,
    rng=jax.random.key(0),
  )
  assert not np.any(np.asarray(end["a"]) == np.asarray(end["b"]))


def test_bad_input_is_refused():
  with pytest.raises(ValueError, match="amounts of noise"):
    solvers.build("edm_heun", STRAIGHT, churn=-1.0)
  with pytest.raises(ValueError, match="amounts of noise"):
    solvers.build("edm_heun", STRAIGHT, s_noise=-1.0)
  with pytest.raises(ValueError, match="which is nowhere"):
    solvers.build("edm_heun", STRAIGHT, s_min=2.0, s_max=1.0)
  churned = solvers.build("edm_heun", STRAIGHT, churn=1.0)
  with pytest.raises(ValueError, match="random key"):
    solvers.solve(churned, on(STRAIGHT), jnp.ones(2), np.float32([0.9, 0.0]))
