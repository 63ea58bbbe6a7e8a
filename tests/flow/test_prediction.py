"""Every prediction becomes every other, and comes back, on any affine path."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from flowjax.flow import paths, prediction

# Three paths that differ in what makes conversion hard: alpha + sigma = 1,
# alpha^2 + sigma^2 = 1, and noise that is added to data which never fades.
PATHS = {
  "straight": paths.straight(),
  "trigonometric": paths.Path(
    name="trigonometric",
    log_snr=lambda t: -2.0 * jnp.log(jnp.tan(jnp.pi / 2 * t)),
    log_snr_inverse=lambda y: 2.0 / jnp.pi * jnp.arctan(jnp.exp(-0.5 * y)),
    alpha=lambda t: jnp.cos(jnp.pi / 2 * t),
    sigma=lambda t: jnp.sin(jnp.pi / 2 * t),
    alpha_dot=lambda t: -jnp.pi / 2 * jnp.sin(jnp.pi / 2 * t),
    sigma_dot=lambda t: jnp.pi / 2 * jnp.cos(jnp.pi / 2 * t),
  ),
  "exploding": paths.Path(
    name="exploding",
    log_snr=lambda t: -2.0 * jnp.log(9.0 * t),
    log_snr_inverse=lambda y: jnp.exp(-0.5 * y) / 9.0,
    alpha=lambda t: jnp.ones_like(t),
    sigma=lambda t: 9.0 * t,
    alpha_dot=lambda t: jnp.zeros_like(t),
    sigma_dot=lambda t: jnp.full_like(t, 9.0),
  ),
}
TIMES = (0.001, 0.03, 0.5, 0.97, 0.999)
SHAPE = (len(TIMES), 4, 3)
OTHERS = [name for name in prediction.PREDICTIONS if name != "data"]
PAIRS = list(itertools.product(prediction.PREDICTIONS, repeat=2))


def normal(*shape, seed=0):
  random = np.random.default_rng(seed)
  return jnp.asarray(random.standard_normal(shape, np.float32))


def truth(path):
  """Returns x_t, t and each prediction at them, written out."""
  x, eps = normal(2, *SHAPE)
  t = jnp.array(TIMES)
  values = {
    "data": x,
    "noise": eps,
    "velocity": path.velocity(x, eps, t),
    "score": -eps / path.sigma(t)[:, None, None],
  }
  return path.interpolate(x, eps, t), t, values


def tolerance(path, t):
  """Bounds what rounding costs where a coefficient divides."""
  smallest = jnp.minimum(path.alpha(t), path.sigma(t))
  return np.asarray(2e-6 / smallest)[:, None, None]


@pytest.mark.parametrize("source, target", PAIRS)
@pytest.mark.parametrize("name", PATHS)
def test_each_from_each(name, source, target):
  path = PATHS[name]
  x_t, t, values = truth(path)
  found = prediction.convert(path, source, target, values[source], x_t, t)
  scale = 1.0 / path.sigma(t)[:, None, None] if target == "score" else 10.0
  error = np.abs(found - values[target]) / scale
  assert np.all(error < tolerance(path, t)), np.max(error, axis=(1, 2))


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("others", itertools.permutations(OTHERS))
def test_there_and_back_through_all(name, others):
  path = PATHS[name]
  x_t, t, values = truth(path)
  start = value = values["data"]
  for source, target in itertools.pairwise(("data", *others, "data")):
    value = prediction.convert(path, source, target, value, x_t, t)
  scale = jnp.maximum(jnp.abs(start), 1.0)
  # Each conversion may divide by what the one before multiplied with.
  smallest = jnp.minimum(path.alpha(t), path.sigma(t))[:, None, None]
  error = np.abs(value - start) / scale
  assert np.all(error < 1e-5 / smallest), np.max(error, axis=(1, 2))


@pytest.mark.parametrize("source, target", PAIRS)
@pytest.mark.parametrize("end", [0.0, 1e-9, 1.0 - 2.0**-24, 1.0])
def test_finite_up_to_the_ends(end, source, target):
  for path in PATHS.values():
    value, x_t = normal(2, 6)
    found = prediction.convert(path, source, target, value, x_t, end)
    assert np.all(np.isfinite(found))


def test_a_velocity_determines_both_at_both_ends():
  path = paths.straight()
  x, eps = normal(2, 50)
  for t in (0.0, 1e-7, 1.0 - 2.0**-24, 1.0):
    x_t, v = path.interpolate(x, eps, t), path.velocity(x, eps, t)
    for target, value in (("data", x), ("noise", eps)):
      found = prediction.convert(path, "velocity", target, v, x_t, t)
      np.testing.assert_allclose(found, value, atol=1e-6)


def test_without_noise_its_mean_is_predicted():
  x = normal(50)
  for path in PATHS.values():
    for target in ("noise", "score"):
      found = prediction.convert(path, "data", target, x, x, 0.0)
      np.testing.assert_array_equal(found, jnp.zeros_like(x))


def test_expectations_convert_as_samples_do():
  # x ~ N(m, s^2): the score of x_t and E[x | x_t] are both known.
  path, mean, std = paths.straight(), 0.7, 0.4
  x_t = jnp.linspace(-2.0, 2.0, 7)
  for t in (0.1, 0.5, 0.9):
    variance = ((1 - t) * std) ** 2 + t**2
    score = -(x_t - (1 - t) * mean) / variance
    posterior = mean + (1 - t) * std**2 * -score
    found = prediction.convert(path, "score", "data", score, x_t, t)
    np.testing.assert_allclose(found, posterior, atol=5e-6)


def test_half_precision_is_widened_first():
  path = paths.straight()
  x, eps = normal(2, 50).astype(jnp.bfloat16)
  x_t = path.interpolate(x, eps, 0.01)
  found = prediction.convert(path, "data", "noise", x, x_t, 0.01)
  assert found.dtype == jnp.float32
  np.testing.assert_allclose(found, eps.astype(jnp.float32), atol=1e-4)


def test_an_unknown_name_says_what_there_is():
  x = jnp.ones(2)
  for names in (("data", "flow"), ("flow", "data"), ("flow", "flow")):
    with pytest.raises(ValueError, match="'flow'.*data, noise, velocity"):
      prediction.convert(paths.straight(), *names, x, x, 0.5)
