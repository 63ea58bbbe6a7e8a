"""Every path: its ends, its derivative, its signal-to-noise ratio."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowjax.flow import paths

PATHS = sorted(paths.PATHS)


def draw():
  x, eps = np.random.default_rng(0).standard_normal((2, 5, 3, 2, 2), np.float32)
  return jnp.asarray(x), jnp.asarray(eps)


@pytest.mark.parametrize("name", PATHS)
def test_the_ends_are_data_and_noise(name):
  path = paths.PATHS[name]()
  x, eps = draw()
  np.testing.assert_array_equal(path.interpolate(x, eps, 0.0), x)
  np.testing.assert_array_equal(path.interpolate(x, eps, 1.0), eps)


@pytest.mark.parametrize("name", PATHS)
def test_velocity_is_the_derivative_of_the_path(name):
  path = paths.PATHS[name]()
  x, eps = draw()
  t_B = jnp.array([0.0, 0.2, 0.5, 0.9, 1.0])
  _, tangent = jax.jvp(
    lambda t: path.interpolate(x, eps, t), (t_B,), (jnp.ones_like(t_B),)
  )
  np.testing.assert_allclose(path.velocity(x, eps, t_B), tangent, atol=1e-6)


@pytest.mark.parametrize("name", PATHS)
def test_each_example_has_its_own_time(name):
  path = paths.PATHS[name]()
  x, eps = draw()
  t_B = jnp.linspace(0.1, 0.9, 5)
  for method in (path.interpolate, path.velocity):
    rows = [method(x[i], eps[i], t_B[i]) for i in range(5)]
    np.testing.assert_allclose(method(x, eps, t_B), np.stack(rows), rtol=1e-6)


@pytest.mark.parametrize("name", PATHS)
def test_log_snr_falls_from_infinity_to_minus_infinity(name):
  path = paths.PATHS[name]()
  lambdas = np.asarray(path.log_snr(jnp.linspace(0.0, 1.0, 101)))
  assert lambdas[0] == np.inf and lambdas[-1] == -np.inf
  assert np.all(np.diff(lambdas) < 0.0)


def test_the_straight_path_is_that_of_rectified_flow():
  x, eps = draw()
  path = paths.straight()
  np.testing.assert_allclose(
    path.interpolate(x, eps, 0.25), 0.75 * x + 0.25 * eps, rtol=1e-6
  )
  np.testing.assert_allclose(path.velocity(x, eps, 0.25), eps - x, rtol=1e-6)
  np.testing.assert_allclose(path.log_snr(0.25), 2 * np.log(3.0), rtol=1e-6)


def test_half_precision_is_widened():
  x, eps = draw()
  half = x.astype(jnp.bfloat16), eps.astype(jnp.bfloat16)
  for t in (0.3, jnp.full((5,), 0.3)):
    assert paths.straight().interpolate(*half, t).dtype == jnp.float32
    assert paths.straight().velocity(*half, t).dtype == jnp.float32
