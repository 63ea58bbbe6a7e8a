"""Laws against their closed forms, the shift, and the grids."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from flowjax.flow import times

LAWS = {
  "uniform": times.uniform(),
  "logit_normal": times.logit_normal(),
  "logit_normal_towards_noise": times.logit_normal(1.0, 0.7),
  "logit_normal_wide": times.logit_normal(-0.5, 1.8),
  "shifted_uniform": times.shifted(times.uniform(), 3.0),
  "shifted_back": times.shifted(times.uniform(), 0.4),
  "shifted_logit_normal": times.shifted(times.logit_normal(), 3.0),
}
laws = pytest.mark.parametrize("law", LAWS.values(), ids=LAWS.keys())


def normal_logit(u, mean, std):
  z = mean + std * scipy.stats.norm.ppf(u)
  return 1.0 / (1.0 + np.exp(-z))


QUANTILES = {
  "uniform": lambda u: u,
  "logit_normal": lambda u: normal_logit(u, 0.0, 1.0),
  "logit_normal_towards_noise": lambda u: normal_logit(u, 1.0, 0.7),
  "logit_normal_wide": lambda u: normal_logit(u, -0.5, 1.8),
  "shifted_uniform": lambda u: 3.0 * u / (1.0 + 2.0 * u),
  "shifted_back": lambda u: 0.4 * u / (1.0 - 0.6 * u),
  # log odds are shifted by log 3
  "shifted_logit_normal": lambda u: normal_logit(u, math.log(3.0), 1.0),
}


# Compiles in half of the time that threefry takes.
RNG = jax.random.key(0, impl="rbg")


@functools.cache
def samples(law):
  return jax.jit(law.sample, static_argnums=1)(RNG, (400, 500))


@pytest.mark.parametrize("name", LAWS)
def test_quantiles_of_samples_are_those_of_the_closed_form(name):
  t = samples(LAWS[name])
  assert t.shape == (400, 500) and t.dtype == jnp.float32
  assert float(t.min()) > 0.0 and float(t.max()) < 1.0
  u = np.linspace(0.01, 0.99, 50)
  # Seen through the inverse, the error is that of 200,000 uniform numbers.
  below = np.mean(np.asarray(t).reshape(-1, 1) < QUANTILES[name](u), axis=0)
  np.testing.assert_allclose(below, u, atol=0.005)


@laws
def test_density_integrates_to_one(law):
  t = jnp.linspace(0.0, 1.0, 100_001)
  total = np.trapezoid(jax.jit(law.density)(t), dx=1e-5)
  assert total == pytest.approx(1.0, abs=1e-4)


@laws
def test_density_is_that_of_the_samples(law):
  t = np.asarray(samples(law))
  counts, edges = np.histogram(t, bins=20, range=(0.0, 1.0))
  inner = np.linspace(edges[:-1], edges[1:], 41, axis=1).astype(np.float32)
  expected = np.mean(law.density(inner), axis=1)
  np.testing.assert_allclose(counts / t.size * 20, expected, atol=0.05)


@laws
def test_density_is_the_slope_of_the_quantile(law):
  u = jnp.linspace(0.02, 0.98, 30)

  @jax.jit
  def probability(u):
    t, slope = jax.jvp(law.quantile, (u,), (jnp.ones_like(u),))
    return law.density(t) * slope

  np.testing.assert_allclose(probability(u), 1.0, rtol=1e-3)


def test_density_of_the_logit_normal_vanishes_at_the_ends():
  ends = times.logit_normal().density(jnp.array([0.0, 1.0]))
  np.testing.assert_array_equal(ends, jnp.zeros(2))


def test_a_positive_mean_leans_towards_noise():
  t = samples(times.logit_normal(1.0, 1.0))
  assert float(jnp.mean(t > 0.5)) == pytest.approx(0.8413, abs=0.005)


def test_the_least_and_the_greatest_uniform_number_stay_inside():
  law = times.logit_normal(0.0, 1.0)
  for u in (2.0**-24, 1.0 - 2.0**-24):
    t = float(law.quantile(jnp.float32(u)))
    assert 0.0 < t < 1.0


@laws
def test_shift_one_is_the_identity(law):
  same = times.shifted(law, 1.0)
  t = jnp.linspace(0.01, 0.99, 50)
  np.testing.assert_array_equal(same.quantile(t), law.quantile(t))
  np.testing.assert_allclose(same.density(t), law.density(t), rtol=1e-5)


def test_shift_one_changes_no_bit():
  t = np.random.default_rng(0).random(10_000, np.float32)
  np.testing.assert_array_equal(times.shift_times(t, 1.0), t)


@pytest.mark.parametrize("shift", [0.3, 1.7, 3.0, math.exp(1.15)])
def test_shift_is_equation_23(shift):
  t = np.linspace(0.0, 1.0, 101)
  expected = shift * t / (1.0 + (shift - 1.0) * t)
  found = times.shift_times(t, shift)
  np.testing.assert_allclose(found, expected, rtol=1e-12)
  assert found[0] == 0.0 and found[-1] == 1.0
  np.testing.assert_allclose(
    times.shift_times(jnp.float32(t), shift), expected, rtol=1e-6
  )


def test_shift_lowers_the_log_snr_by_twice_its_logarithm():
  t = np.linspace(0.1, 0.9, 9)

  def log_snr(t):
    return 2.0 * np.log((1.0 - t) / t)

  fall = log_snr(t) - log_snr(times.shift_times(t, 3.0))
  np.testing.assert_allclose(fall, 2.0 * math.log(3.0))


def test_shifts_compose():
  t = np.linspace(0.0, 1.0, 11)
  twice = times.shift_times(times.shift_times(t, 2.0), 1.5)
  np.testing.assert_allclose(twice, times.shift_times(t, 3.0))


def test_resolution_shift():
  assert times.resolution_shift(4096, 1024) == 2.0
  assert times.resolution_shift(256, 256) == 1.0
  assert times.resolution_shift(64, 256) == 0.5


@pytest.mark.parametrize("steps", [1, 2, 7, 50, 1000])
@pytest.mark.parametrize("shift", [0.2, 1.0, 1.7, 3.0, 12.0])
def test_grids_fall_from_exactly_one_to_exactly_zero(steps, shift):
  grid = times.uniform_grid(steps, shift)
  assert grid.shape == (steps + 1,) and grid.dtype == np.float32
  assert grid[0] == 1.0 and grid[-1] == 0.0
  assert np.all(np.diff(grid) < 0.0)


def test_grid_without_shift_is_equidistant():
  np.testing.assert_array_equal(
    times.uniform_grid(4), np.float32([1.0, 0.75, 0.5, 0.25, 0.0])
  )


@pytest.mark.parametrize(
  "tokens, inner",
  [
    (256, (0.831824, 0.622459, 0.354661)),
    (1024, (0.849235, 0.652489, 0.384945)),
    (4096, (0.904531, 0.759511, 0.512844)),
  ],
)
def test_grids_of_flux(tokens, inner):
  # mu runs from 0.5 at 256 tokens to 1.15 at 4096.
  mu = 0.5 + (1.15 - 0.5) * (tokens - 256) / (4096 - 256)
  grid = times.uniform_grid(4, shift=math.exp(mu))
  np.testing.assert_allclose(grid, (1.0, *inner, 0.0), atol=1e-6)


@pytest.mark.parametrize(
  "make, message",
  [
    (lambda: times.uniform_grid(0), "at least 1 step, not 0"),
    (lambda: times.uniform_grid(4, shift=0.0), "above 0, not 0.0"),
    (lambda: times.shifted(times.uniform(), -1.0), "above 0, not -1.0"),
    (lambda: times.logit_normal(0.0, 0.0), "above 0, not 0.0"),
  ],
)
def test_an_impossible_value_is_refused(make, message):
  with pytest.raises(ValueError, match=message):
    make()


@pytest.mark.parametrize("name", sorted(times.LAWS))
def test_laws_by_name_build_with_their_defaults(name):
  law = times.LAWS[name]()
  t = law.quantile(jnp.array([0.1, 0.5, 0.9]))
  assert np.all(np.asarray(law.density(t)) > 0.0)
