"""Weights against their papers' formulas, and laws of t in exchange."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowjax.flow import paths, prediction, times, weights

STRAIGHT = paths.straight()
VP = paths.build("vp")
T = np.linspace(0.05, 0.95, 10, dtype=np.float32)


def near(found, expected, rtol=2e-5):
  np.testing.assert_allclose(found, expected, rtol=rtol)


def snr(path, t=T):
  return np.exp(np.asarray(jax.jit(path.log_snr)(t), np.float64))


@pytest.mark.parametrize(
  "name, space, expected",
  [
    # On the straight path: SNR = ((1 - t) / t)^2, and a velocity's error is
    # that of data over t, and of noise over 1 - t.
    ("unit", "velocity", lambda t: np.ones_like(t)),
    ("snr", "noise", lambda t: np.ones_like(t)),
    ("snr", "velocity", lambda t: (1.0 - t) ** 2),
    ("truncated_snr", "data", lambda t: np.maximum(((1 - t) / t) ** 2, 1.0)),
    ("min_snr", "data", lambda t: np.minimum(((1 - t) / t) ** 2, 5.0)),
    ("p2", "noise", lambda t: 1.0 / (1.0 + ((1 - t) / t) ** 2)),
    ("inverse_sigma_squared", "velocity", lambda t: np.ones_like(t)),
    ("inverse_sigma_squared", "data", lambda t: 1.0 / t**2),
    ("cosmap", "velocity", lambda t: 2.0 / (np.pi * (1 - 2 * t + 2 * t**2))),
    ("edm", "edm", lambda t: np.ones_like(t)),
    ("likelihood", "noise", lambda t: 1.0 / (t * (1.0 - t))),
    ("likelihood", "velocity", lambda t: (1.0 - t) / t),
  ],
)
def test_weights_on_the_straight_path(name, space, expected):
  near(weights.build(name, STRAIGHT, space)(T), expected(T.astype(np.float64)))


def test_min_snr_of_a_variance_preserving_path():
  ratio = snr(VP)
  least = np.minimum(ratio, 3.0)
  make = weights.build
  near(make("min_snr", VP, "noise", gamma=3.0)(T), least / ratio, 1e-4)
  near(make("min_snr", VP, "v", gamma=3.0)(T), least / (ratio + 1.0), 1e-4)


@pytest.mark.parametrize("path", [STRAIGHT, paths.build("edm"), VP])
def test_edm_weight_is_its_formula_on_every_path(path):
  sigma = snr(path) ** -0.5
  expected = (sigma**2 + 0.7**2) / (0.7 * sigma) ** 2
  near(weights.edm(path, "data", sigma_data=0.7)(T), expected, 1e-4)


def test_p2_of_other_parameters():
  weight = weights.build("p2", VP, "noise", gamma=0.5, k=2.0)
  near(weight(T), (2.0 + snr(VP)) ** -0.5, 1e-4)


@pytest.mark.parametrize("name", ["straight", "vp", "sub_vp", "edm", "gvp"])
def test_likelihood_weight_is_half_the_fall_of_the_log_snr(name):
  path = paths.build(name)

  @jax.jit
  def both(t):
    fall = -jax.vmap(jax.grad(path.log_snr))(t)
    return weights.likelihood(path, "noise")(t), 0.5 * fall

  near(*both(T), 1e-4)


def test_likelihood_weight_of_the_score_is_half_the_squared_diffusion():
  # g^2 = beta for the variance-preserving SDE.
  beta = 0.1 + 19.9 * T
  near(weights.likelihood(VP, "score")(T), 0.5 * beta, 1e-4)


@pytest.mark.slow
def test_likelihood_loss_of_a_gaussian_is_the_information_that_noise_destroys():
  """For data N(0, s^2), log((1 + s^2 SNR_low) / (1 + s^2 SNR_high)) / 2."""
  s = 0.6
  t = np.linspace(0.01, 0.99, 100_001, dtype=np.float32)

  @jax.jit
  def density(t):
    alpha, sigma = VP.alpha(t), VP.sigma(t)
    # What the best prediction of the noise leaves of it.
    error = (s * alpha) ** 2 / ((s * alpha) ** 2 + sigma**2)
    return weights.likelihood(VP, "noise")(t) * error

  loss = np.trapezoid(np.asarray(density(t)), t)
  low, high = snr(VP, t[[0, -1]])
  expected = 0.5 * math.log((1.0 + s**2 * low) / (1.0 + s**2 * high))
  assert loss == pytest.approx(expected, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("path", ["straight", "cosine", "edm"])
def test_conversion_is_the_slope_between_predictions(path):
  path = paths.build(path)
  t = jnp.asarray(T)
  one, zero = jnp.ones_like(t), jnp.zeros_like(t)

  @jax.jit
  def products():
    found = []
    for source, target in itertools.permutations(prediction.PREDICTIONS, 2):
      slope = prediction.convert(
        path, source, target, one, zero, t, sigma_data=0.7
      )
      weight = weights.converted(path, jnp.cos, source, target, 0.7)
      found.append(weight(t) * slope**2)
    return jnp.stack(found)

  near(products(), np.broadcast_to(np.cos(T), (30, 10)), 5e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
  "path, dtype",
  [
    ("straight", jnp.float32),
    ("straight", jnp.bfloat16),
    ("vp", jnp.float32),
  ],
)
def test_every_weight_is_finite_at_the_ends(path, dtype):
  path = paths.build(path)
  t = jnp.asarray([0.0, path.low, 0.5, path.high, 1.0], dtype)

  @jax.jit
  def everything(t):
    return {
      (name, space): weights.build(name, path, space)(t)
      for name in weights.WEIGHTS
      for space in prediction.PREDICTIONS
    }

  for key, weight in everything(t).items():
    assert weight.dtype == jnp.float32 and weight.shape == (5,), key
    assert np.all(np.isfinite(weight)) and np.all(weight >= 0.0), key


LAWS = {
  "uniform": times.uniform(),
  "logit_normal": times.logit_normal(0.3, 1.2),
  "mode": times.mode(0.8),
  "cosmap": times.cosmap(),
  "edm": times.log_normal_sigma(0.0, 1.4, path=STRAIGHT),
  "beta": times.beta(1.5, 1.2),
  "shifted": times.shifted(times.uniform(), 2.0),
}
# Middles of equal parts: the expectation of f is its mean over quantile(U).
U = (jnp.arange(20_000, dtype=jnp.float32) + 0.5) / 20_000


@pytest.mark.parametrize(
  "law, other",
  [
    ("logit_normal", "uniform"),
    ("uniform", "mode"),
    ("edm", "logit_normal"),
    ("beta", "cosmap"),
    ("cosmap", "shifted"),
  ],
)
def test_laws_and_weights_exchange(law, other):
  """The expected loss is the same under another law with the other weight."""
  law, other = LAWS[law], LAWS[other]

  def weight(t):
    return 1.0 + t**2

  @functools.partial(jax.jit, static_argnums=(0, 1))
  def expected(law, weight):
    t = law.quantile(U)
    # A loss that vanishes at the ends, as densities do not.
    return jnp.mean(weight(t) * jnp.sin(jnp.pi * t) ** 4 * (2.0 - t))

  same = weights.exchange(law, weight, other)
  near(expected(other, same), expected(law, weight), 2e-3)


def test_the_cosmap_weight_is_its_law():
  weight = weights.exchange(LAWS["cosmap"], jnp.ones_like, LAWS["uniform"])
  near(weight(jnp.asarray(T)), weights.cosmap(STRAIGHT, "velocity")(T))


@pytest.mark.parametrize("law", ["uniform", "logit_normal", "cosmap"])
def test_rectified_flow_is_the_weight_of_sd3(law):
  """Velocities under pi are w = t / (1 - t) pi(t) in -1/2 E[w lambda' |eps|^2].

  arXiv:2403.03206, section 3.
  """
  law = LAWS[law]
  uniform = weights.exchange(law, jnp.ones_like, times.uniform())
  found = weights.converted(STRAIGHT, uniform, "velocity", "noise")(T)
  w = T / (1.0 - T) * np.asarray(jax.jit(law.density)(T))
  slope = -2.0 / (T * (1.0 - T))
  near(found, -0.5 * slope * w)


def test_edm_is_the_weight_of_sd3():
  """w ~ N(lambda; -2 mean, (2 std)^2) (exp(-lambda) + s^2), in section 3."""
  law = times.log_normal_sigma(path=VP)
  uniform = weights.exchange(law, weights.edm(VP, "data"), times.uniform())
  found = weights.converted(VP, uniform, "data", "noise")(jnp.asarray(T))
  log_snr = np.asarray(VP.log_snr(jnp.asarray(T)), np.float64)
  slope = jax.vmap(jax.grad(VP.log_snr))(jnp.asarray(T))
  normal = np.exp(-0.5 * ((log_snr - 2.4) / 2.4) ** 2)
  w = normal * (np.exp(-log_snr) + 0.25)
  ratio = found / (-0.5 * np.asarray(slope) * w)
  near(ratio, ratio[4], 2e-3)


def test_an_exchange_is_finite_where_the_other_law_has_no_times():
  weight = weights.exchange(
    LAWS["uniform"], jnp.ones_like, LAWS["logit_normal"]
  )
  assert np.all(np.isfinite(weight(jnp.asarray([0.0, 1e-7, 1.0]))))


def test_learned_uncertainty_is_least_at_the_logarithm_of_the_loss():
  loss_B = np.float32([0.1, 1.0, 7.0])

  @jax.jit
  def slopes(loss_B, guess_B):
    each = jax.grad(weights.learned_uncertainty, argnums=(0, 1))
    return jax.vmap(each)(loss_B, guess_B)

  def gradient(guess_B):
    return np.asarray(slopes(loss_B, guess_B)[1])

  near(gradient(np.log(loss_B)) + 1.0, 1.0)
  assert np.all(gradient(np.log(loss_B) + 0.1) > 0.0)
  assert np.all(gradient(np.log(loss_B) - 0.1) < 0.0)
  # A guess of 0 is the plain loss, and the scale is that of the guess.
  near(weights.learned_uncertainty(loss_B, np.zeros(3, np.float32)), loss_B)
  near(slopes(loss_B, loss_B)[0], np.exp(-loss_B))


@pytest.mark.parametrize(
  "make, message",
  [
    (lambda: weights.build("minsnr", VP, "v"), "did you mean 'min_snr'"),
    (lambda: weights.build("snr", VP, "velocty"), "did you mean 'velocity'"),
    (lambda: weights.build("snr", VP, "v", gamma=2.0), "no option 'gamma'"),
    (lambda: weights.build("min_snr", VP, "v", gamma=0.0), "gamma must be abo"),
    (lambda: weights.build("p2", VP, "v", gamma=-1.0), "not be below 0"),
    (lambda: weights.build("p2", VP, "v", k=0.0), "k must be above 0, not 0.0"),
    (
      lambda: weights.build("edm", VP, "data", sigma_data=0.0),
      "sigma_data must be above 0, not 0.0",
    ),
  ],
)
def test_an_impossible_value_is_refused(make, message):
  with pytest.raises(ValueError, match=message):
    make()


@pytest.fixture
def training_utils():
  pytest.importorskip("diffusers")
  return pytest.importorskip("diffusers.training_utils")


@pytest.mark.slow
def test_the_weights_of_sd3_are_those_of_diffusers(training_utils):
  torch = pytest.importorskip("torch")
  theirs = training_utils.compute_loss_weighting_for_sd3
  sigmas = torch.from_numpy(T)
  # Their script's loss is that of data for the first.
  ours = weights.inverse_sigma_squared(STRAIGHT, "data")
  near(ours(T), theirs("sigma_sqrt", sigmas).numpy(), 1e-6)
  ours = weights.cosmap(STRAIGHT, "velocity")
  near(ours(T), theirs("cosmap", sigmas).numpy(), 1e-6)
  near(weights.unit(STRAIGHT, "velocity")(T), theirs("none", sigmas).numpy())


@pytest.mark.slow
def test_the_snr_of_a_table_is_that_of_diffusers(training_utils):
  torch = pytest.importorskip("torch")
  diffusers = pytest.importorskip("diffusers")
  scheduler = diffusers.DDPMScheduler()
  indices = torch.arange(0, 1000, 111)
  theirs = training_utils.compute_snr(scheduler, indices).numpy()
  # Their table is rounded to float32; ours is made of the same numbers.
  path = paths.table(scheduler.alphas_cumprod.double().numpy())
  t = (np.float32(indices.numpy()) + 1.0) / 1000
  near(weights.snr(path, "data")(t), theirs, 2e-4)
  ours = weights.min_snr(path, "noise")(t)
  near(ours, np.minimum(theirs, 5.0) / theirs, 2e-4)
  ours = weights.min_snr(path, "v")(t)
  near(ours, np.minimum(theirs, 5.0) / (theirs + 1.0), 2e-4)
