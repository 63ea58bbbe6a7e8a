"""Laws against their closed forms, the shift, and the grids."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from flowjax.flow import paths, times

LAWS = {
  "uniform": times.uniform(),
  "logit_normal": times.logit_normal(),
  "logit_normal_towards_noise": times.logit_normal(1.0, 0.7),
  "logit_normal_wide": times.logit_normal(-0.5, 1.8),
  "shifted_uniform": times.shifted(times.uniform(), 3.0),
  "shifted_back": times.shifted(times.uniform(), 0.4),
  "shifted_logit_normal": times.shifted(times.logit_normal(), 3.0),
  "stratified": times.build("stratified"),
  "mode": times.mode(1.29),
  "mode_at_the_ends": times.mode(-0.9),
  "cosmap": times.cosmap(),
  "edm": times.log_normal_sigma(path=paths.straight()),
  "edm_on_vp": times.log_normal_sigma(path=paths.build("vp")),
  "u_shaped": times.u_shaped(),
  "beta_towards_data": times.beta(2.0, 5.0),
  "beta_at_the_ends": times.beta(0.6, 0.6),
  "mirrored": times.mirrored(times.beta(2.0, 5.0)),
}
laws = pytest.mark.parametrize("law", LAWS.values(), ids=LAWS.keys())


def normal_logit(u, mean, std):
  z = mean + std * scipy.stats.norm.ppf(u)
  return 1.0 / (1.0 + np.exp(-z))


def falling_mode(u, s):
  """Returns SD3's f_mode as the paper writes it."""
  return 1.0 - u - s * (np.cos(np.pi * u / 2.0) ** 2 - 1.0 + u)


def log_normal(u):
  return np.exp(-1.2 + 1.2 * scipy.stats.norm.ppf(u))


def vp_time_of_sigma(sigma):
  """Solves exp(0.1 t + 9.95 t^2) - 1 = sigma^2 for t."""
  total = np.log1p(sigma**2)
  return (np.sqrt(0.01 + 4.0 * 9.95 * total) - 0.1) / (2.0 * 9.95)


QUANTILES = {
  "uniform": lambda u: u,
  "logit_normal": lambda u: normal_logit(u, 0.0, 1.0),
  "logit_normal_towards_noise": lambda u: normal_logit(u, 1.0, 0.7),
  "logit_normal_wide": lambda u: normal_logit(u, -0.5, 1.8),
  "shifted_uniform": lambda u: 3.0 * u / (1.0 + 2.0 * u),
  "shifted_back": lambda u: 0.4 * u / (1.0 - 0.6 * u),
  # log odds are shifted by log 3
  "shifted_logit_normal": lambda u: normal_logit(u, math.log(3.0), 1.0),
  "stratified": lambda u: u,
  "mode": lambda u: falling_mode(1.0 - u, 1.29),
  "mode_at_the_ends": lambda u: falling_mode(1.0 - u, -0.9),
  "cosmap": lambda u: 1.0 - 1.0 / (np.tan(np.pi * u / 2.0) + 1.0),
  # On the straight path sigma / alpha are the odds of t.
  "edm": lambda u: normal_logit(u, -1.2, 1.2),
  "edm_on_vp": lambda u: vp_time_of_sigma(log_normal(u)),
  "beta_towards_data": lambda u: scipy.stats.beta.ppf(u, 2.0, 5.0),
  "beta_at_the_ends": lambda u: scipy.stats.beta.ppf(u, 0.6, 0.6),
  "mirrored": lambda u: scipy.stats.beta.ppf(u, 5.0, 2.0),
}


# Compiles in half of the time that threefry takes.
RNG = jax.random.key(0, impl="rbg")


@functools.cache
def samples(law):
  return np.asarray(jax.jit(law.sample, static_argnums=1)(RNG, (200, 200)))


@functools.cache
def quantile(law):
  return jax.jit(law.quantile)


@functools.cache
def density(law):
  return jax.jit(law.density)


@functools.cache
def distribution(law):
  """Returns times and the integrals of the density up to them."""
  # Times are dense at both ends, where a density may be infinite.
  s = np.linspace(0.0, 1.0, 50_001)
  t = np.float32(s**2 * (3.0 - 2.0 * s))
  slope = np.asarray(density(law)(t), np.float64) * 6.0 * s * (1.0 - s)
  parts = 0.5 * (slope[1:] + slope[:-1]) / 50_000
  return t, np.append(0.0, np.cumsum(parts))


@pytest.mark.parametrize("name", QUANTILES)
def test_quantiles_of_samples_are_those_of_the_closed_form(name):
  t = samples(LAWS[name])
  assert t.shape == (200, 200) and t.dtype == jnp.float32
  assert float(t.min()) > 0.0 and float(t.max()) < 1.0
  u = np.linspace(0.01, 0.99, 50)
  # Seen through the inverse, the error is that of 40,000 uniform numbers.
  below = np.mean(t.reshape(-1, 1) < QUANTILES[name](u), axis=0)
  np.testing.assert_allclose(below, u, atol=0.01)


@laws
def test_density_integrates_to_one(law):
  _, total = distribution(law)
  assert total[-1] == pytest.approx(1.0, abs=2e-4)


@laws
def test_samples_follow_the_density(law):
  """Kolmogorov-Smirnov, against the integral of the density."""
  t, total = distribution(law)
  found = scipy.stats.kstest(
    np.ravel(samples(law)), lambda x: np.interp(x, t, total)
  )
  # Of 40,000 samples, and stratified ones are nearer still.
  assert found.statistic < 0.009


@laws
def test_density_is_the_slope_of_the_quantile(law):
  u = np.linspace(0.02, 0.98, 30, dtype=np.float32)

  @jax.jit
  def probability(u):
    t, slope = jax.jvp(law.quantile, (u,), (jnp.ones_like(u),))
    return law.density(t) * slope

  np.testing.assert_allclose(probability(u), 1.0, rtol=1e-3)


def test_density_of_the_logit_normal_vanishes_at_the_ends():
  ends = density(times.logit_normal())(np.float32([0.0, 1.0]))
  np.testing.assert_array_equal(ends, np.zeros(2))


def test_a_positive_mean_leans_towards_noise():
  t = samples(times.logit_normal(1.0, 1.0))
  assert np.mean(t > 0.5) == pytest.approx(0.8413, abs=0.005)


def test_the_least_and_the_greatest_uniform_number_stay_inside():
  law = times.logit_normal(0.0, 1.0)
  for u in (2.0**-24, 1.0 - 2.0**-24):
    assert 0.0 < float(quantile(law)(np.float32(u))) < 1.0


@pytest.mark.parametrize("name", ["logit_normal", "mode", "stratified"])
def test_shift_one_is_the_identity(name):
  law = LAWS[name]
  same = times.shifted(law, 1.0)
  t = np.linspace(0.01, 0.99, 50, dtype=np.float32)
  # To the bit, which a compiler that fuses both does not keep.
  np.testing.assert_array_equal(same.quantile(t), law.quantile(t))
  np.testing.assert_allclose(density(same)(t), density(law)(t), rtol=1e-5)


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


@pytest.mark.parametrize("law", ["beta_at_the_ends", "edm_on_vp", "u_shaped"])
def test_laws_hold_their_quantiles_to_the_ends_of_float32(law):
  u = np.float32([2.0**-24, 1e-4, 1.0 - 1e-4, 1.0 - 2.0**-24])
  t = np.asarray(quantile(LAWS[law])(u))
  assert np.all(np.diff(t) > 0.0) and t[0] >= 0.0 and t[-1] <= 1.0
  assert np.all(np.isfinite(density(LAWS[law])(t)))


def test_u_shaped_is_its_formula():
  t = np.linspace(0.0, 1.0, 11)
  both = np.exp(4.0 * t) + np.exp(4.0 * (1.0 - t))
  expected = both * 4.0 / (2.0 * (math.exp(4.0) - 1.0))
  found = density(times.u_shaped(4.0))(t)
  np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("path", ["edm", "scaled_linear"])
def test_edm_law_is_normal_in_log_sigma_on_every_path(path):
  path = paths.build(path)
  law = times.build("log_normal_sigma", path, mean=-0.8, std=0.7)
  draw = jax.jit(lambda rng: path.log_snr(law.sample(rng, (5000,))))
  log_sigma = -0.5 * np.asarray(draw(RNG))
  found = scipy.stats.kstest(log_sigma, scipy.stats.norm(-0.8, 0.7).cdf)
  assert found.statistic < 0.025


def test_sigmas_beyond_the_path_are_cut_and_not_heaped_on_its_end():
  path = paths.build("edm", sigma_min=0.1, sigma_max=1.0)
  law = times.build("log_normal_sigma", path)
  t = samples(law)
  assert np.mean(t < 1e-3) < 0.01 and np.mean(t > 0.999) < 0.01
  grid = np.linspace(0.0, 1.0, 1001, dtype=np.float32)
  whole = np.trapezoid(np.asarray(density(law)(grid)), grid)
  assert whole == pytest.approx(1.0, abs=1e-3)


def test_stratified_draws_have_one_time_in_every_stratum():
  law = times.build("logit_normal", stratified=True, shift=3.0)
  t = np.asarray(jax.jit(law.sample, static_argnums=1)(RNG, (10, 12)))
  u = scipy.stats.norm.cdf(np.log(t / (1.0 - t)) - math.log(3.0))
  gaps = np.diff(np.sort(np.ravel(u)))
  np.testing.assert_allclose(gaps, 1.0 / 120, atol=2e-5)


def test_every_stratified_time_follows_the_law():
  sample = jax.jit(
    jax.vmap(lambda key: times.build("stratified").sample(key, (7,)))
  )
  t = np.asarray(sample(jax.random.split(jax.random.key(0), 4000)))
  for i in range(7):
    assert scipy.stats.kstest(t[:, i], "uniform").statistic < 0.03


def test_build_shifts_and_stratifies():
  law = times.build("logit_normal", mean=0.5, std=0.8, shift=2.0)
  same = times.shifted(times.logit_normal(0.5, 0.8), 2.0)
  u = np.linspace(0.1, 0.9, 9, dtype=np.float32)
  np.testing.assert_array_equal(quantile(law)(u), quantile(same)(u))
  assert not law.stratified
  # A mirrored or shifted law stays stratified.
  law = times.mirrored(times.shifted(times.stratified(same), 2.0))
  assert law.stratified


def test_shift_of_flux():
  assert math.log(times.flux_shift(256)) == pytest.approx(0.5)
  assert math.log(times.flux_shift(1024)) == pytest.approx(0.63)
  assert math.log(times.flux_shift(4096)) == pytest.approx(1.15)
  assert math.log(times.flux_shift(7936)) == pytest.approx(1.8)


@pytest.mark.parametrize(
  "make, message",
  [
    (lambda: times.uniform_grid(0), "at least 1 step, not 0"),
    (lambda: times.uniform_grid(4, shift=0.0), "above 0, not 0.0"),
    (lambda: times.shifted(times.uniform(), -1.0), "above 0, not -1.0"),
    (lambda: times.build("uniform", shift=math.nan), "above 0, not nan"),
    (lambda: times.logit_normal(0.0, 0.0), "above 0, not 0.0"),
    (lambda: times.mode(1.8), "between -1 and .* not 1.8"),
    (lambda: times.mode(-1.1), "between -1 and .* not -1.1"),
    (lambda: times.u_shaped(0.0), "above 0 and at most 100, not 0.0"),
    (lambda: times.beta(0.0, 1.0), "at most 1000, not a = 0.0"),
    (lambda: times.build("log_normal_sigma"), "depends on the path"),
    (
      lambda: times.build("log_normal_sigma", paths.straight(), std=-1.0),
      "above 0, not -1.0",
    ),
    (
      lambda: times.build("log_normal_sigma", paths.build("ve"), mean=20.0),
      "do not occur on the path 've'",
    ),
    (lambda: times.build("logitnormal"), "did you mean 'logit_normal'"),
    (lambda: times.build("mode", std=1.0), "no option 'std'; it takes scale"),
    (lambda: times.resolution_shift(0, 256), "at least 1 token"),
  ],
)
def test_an_impossible_value_is_refused(make, message):
  with pytest.raises(ValueError, match=message):
    make()


@pytest.mark.parametrize("name", sorted(times.LAWS))
def test_laws_by_name_build_with_their_defaults(name):
  law = times.build(name, paths.straight())
  t = quantile(law)(np.float32([0.1, 0.5, 0.9]))
  assert np.all(np.asarray(density(law)(t)) > 0.0)


def diffusers_times(scheme, **options):
  """Returns the times that diffusers draws, and its random numbers."""
  torch = pytest.importorskip("torch")
  pytest.importorskip("diffusers")
  training = pytest.importorskip("diffusers.training_utils")
  draw = training.compute_density_for_timestep_sampling
  generator = torch.Generator().manual_seed(0)
  t = draw(scheme, batch_size=1000, generator=generator, **options)
  return t.numpy(), torch.Generator().manual_seed(0), torch


@pytest.mark.slow
def test_mode_is_that_of_diffusers():
  expected, generator, torch = diffusers_times("mode", mode_scale=1.29)
  u = torch.rand(size=(1000,), generator=generator).numpy()
  # There the quantile function falls.
  t = quantile(times.mode(1.29))(1.0 - u)
  np.testing.assert_allclose(t, expected, atol=1e-6)


@pytest.mark.slow
def test_logit_normal_is_that_of_diffusers():
  expected, generator, torch = diffusers_times(
    "logit_normal", logit_mean=0.5, logit_std=0.8
  )
  z = torch.normal(0.0, 1.0, size=(1000,), generator=generator).double()
  with jax.enable_x64(True):
    u = scipy.stats.norm.cdf(z.numpy())
    t = quantile(times.logit_normal(0.5, 0.8))(u)
  np.testing.assert_allclose(t, expected, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_compat_is_what_diffusers_makes_of_a_mean(shift):
  u, *_ = diffusers_times("logit_normal", logit_mean=1.0, logit_std=1.0)
  diffusers = pytest.importorskip("diffusers")
  scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
  sigma = scheduler.sigmas.numpy()[(u * 1000).astype(np.int64)]
  law = times.build("logit_normal", mean=1.0, compat=True, shift=shift)
  t, total = distribution(law)
  statistic = scipy.stats.kstest(sigma, lambda x: np.interp(x, t, total))
  assert statistic.statistic < 0.06
  other = times.build("logit_normal", mean=1.0, shift=shift)
  t, total = distribution(other)
  statistic = scipy.stats.kstest(sigma, lambda x: np.interp(x, t, total))
  assert statistic.statistic > 0.3
