"""Every prediction becomes every other, and comes back, on any affine path."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowjax.flow import paths, prediction

PATHS = {name: paths.build(name) for name in paths.PATHS} | {
  "straight with noise left": paths.build("straight", sigma_min=0.1),
  "zero terminal snr": paths.build("scaled_linear", zero_terminal_snr=True),
  "cosine table": paths.build("cosine", steps=50),
}
every_path = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
# What makes a conversion hard: each end without noise or without data, slopes
# that are infinite there, a path that stands still, noise that drowns all.
HARD = ("straight", "polynomial", "vp", "zero terminal snr", "edm")
hard_paths = pytest.mark.parametrize(
  "path", [PATHS[name] for name in HARD], ids=HARD
)
TIMES = (0.001, 0.03, 0.5, 0.97, 0.999)
SHAPE = (len(TIMES), 4, 3)
NAMES = prediction.PREDICTIONS
PAIRS = list(itertools.product(NAMES, repeat=2))
SIGMA_DATA = 0.7
MEAN, STD = 0.3, 0.6


def normal(*shape, seed=0):
  random = np.random.default_rng(seed)
  return jnp.asarray(random.standard_normal(shape, np.float32))


def convert(*args):
  return prediction.convert(*args, sigma_data=SIGMA_DATA)


def truth(path, dtype=np.float64):
  """Returns x_t, t and each prediction at them, written out."""
  x, eps = np.random.default_rng(0).standard_normal((2, *SHAPE)).astype(dtype)
  t = jnp.asarray(np.array(TIMES, dtype))
  alpha, sigma = (np.asarray(c) for c in path.at(t, x)[:2])
  level = sigma / alpha  # EDM's, whose x has alpha = 1.
  root = np.sqrt(level**2 + SIGMA_DATA**2)
  skip, out = SIGMA_DATA**2 / root**2, level * SIGMA_DATA / root
  values = {
    "data": x,
    "noise": eps,
    "velocity": path.velocity(x, eps, t),
    "v": alpha * eps - sigma * x,
    "score": -eps / sigma,
    "edm": (x - skip * (x + level * eps)) / out,
  }
  return path.interpolate(x, eps, t), t, values


@every_path
def test_each_from_each_in_float64(path):
  with jax.enable_x64(True):
    x_t, t, values = truth(path)
    for source, target in PAIRS:
      found = convert(path, source, target, values[source], x_t, t)
      expected = np.asarray(values[target])
      scale = np.max(np.abs(expected), axis=(1, 2), keepdims=True)
      error = np.max(np.abs(np.asarray(found) - expected) / scale)
      assert error < 1e-10, (source, target, error)


@hard_paths
def test_each_from_each_in_float32(path):
  x_t, t, values = truth(path, np.float32)
  alpha, sigma = (np.asarray(c) for c in path.at(t, x_t)[:2])
  # What rounding costs where a coefficient divides, or where x_t is large.
  level = sigma / alpha
  tolerance = 1e-5 * np.maximum(level, 1.0 / level) * np.maximum(sigma, 1.0)
  for source, target in PAIRS:
    found = convert(path, source, target, values[source], x_t, t)
    scale = np.max(np.abs(values[target]), axis=(1, 2), keepdims=True)
    error = np.abs(found - values[target]) / scale
    assert np.all(error < tolerance), (source, target, error / tolerance)


def test_there_and_back():
  path = PATHS["ddpm"]
  with jax.enable_x64(True):
    x_t, t, values = truth(path)
    for others in itertools.permutations(NAMES[1:], 2):
      value = values["data"]
      for source, target in itertools.pairwise(("data", *others, "data")):
        value = convert(path, source, target, value, x_t, t)
      np.testing.assert_allclose(value, values["data"], atol=1e-9)


# bfloat16 is widened first: it only has other slopes to give back.
@pytest.mark.slow(1)
@pytest.mark.parametrize(
  "path, dtype",
  [
    *((PATHS[name], jnp.float32) for name in HARD),
    (PATHS["zero terminal snr"], jnp.bfloat16),
  ],
  ids=[*HARD, "zero terminal snr in bfloat16"],
)
def test_finite_with_its_gradients_up_to_the_ends(path, dtype):
  t = jnp.array([0.0, 1e-9, path.low, 1.0 - 2.0**-24, 1.0])
  value, x_t = normal(2, *SHAPE).astype(dtype)

  def everything(value, x_t):
    return [convert(path, *pair, value, x_t, t) for pair in PAIRS]

  found, pull = jax.vjp(everything, value, x_t)
  # Each pair is linear: cotangents of 1e-9 keep the sum of all from
  # overflowing, as a sum, where each is finite by itself.
  grads = pull([jnp.full_like(one, 1e-9) for one in found])
  for array in (*found, *grads):
    assert np.all(np.isfinite(np.asarray(array, np.float32)))


@every_path
def test_velocity_v_and_edm_determine_both_at_both_ends(path):
  x, eps = normal(2, *SHAPE)
  t = jnp.array([0.0, path.low, 0.5, 1.0 - 2.0**-20, 1.0])
  x_t, c = path.interpolate(x, eps, t), path.at(t, x)
  v = path.velocity(x, eps, t)
  # Where the path stands still its velocity says nothing.
  moves = c.alpha * c.sigma_dot - c.sigma * c.alpha_dot > 1e-3
  size = jnp.maximum(c.sigma, 1.0)
  for target, value in (("data", x), ("noise", eps)):
    found = convert(path, "velocity", target, v, x_t, t)
    assert np.all((np.abs(found - value) < 2e-4 * size) | ~moves)
    for name in ("v", "edm"):
      other = convert(path, "velocity", name, v, x_t, t)
      found = convert(path, name, target, other, x_t, t)
      assert np.all((np.abs(found - value) < 2e-4 * size) | ~moves)


def test_without_noise_its_mean_is_predicted():
  x = normal(*SHAPE)
  for path in (paths.straight(), paths.gvp(), paths.vp(), paths.ddpm()):
    for target in ("noise", "score"):
      found = prediction.convert(path, "data", target, x, x, 0.0)
      np.testing.assert_array_equal(found, jnp.zeros_like(x))


def test_on_the_unit_circle_edm_is_minus_v():
  # With sigma_data = 1; and v is the velocity in the angle of (alpha, sigma).
  path, (value, x_t), t = paths.gvp(), normal(2, *SHAPE), jnp.array(TIMES)
  found = prediction.convert(path, "v", "edm", value, x_t, t, sigma_data=1.0)
  np.testing.assert_allclose(found, -value, atol=1e-6)
  found = prediction.convert(path, "velocity", "v", value, x_t, t)
  np.testing.assert_allclose(found, value / (math.pi / 2), atol=1e-6)


@hard_paths
def test_expectations_convert_as_samples_do(path):
  # x ~ N(m, s^2): the score of x_t and E[x | x_t] are both known.
  with jax.enable_x64(True):
    x_t, t = jnp.linspace(-2.0, 2.0, 5), jnp.asarray(TIMES)
    alpha, sigma, *_ = path.at(t, x_t)
    variance = (alpha * STD) ** 2 + sigma**2
    score = -(x_t - alpha * MEAN) / variance
    posterior = MEAN + alpha * STD**2 * -score
    found = convert(path, "score", "data", score, x_t, t)
  np.testing.assert_allclose(found, posterior, rtol=1e-7, atol=1e-10)


def test_half_precision_is_widened_first():
  path = paths.straight()
  x, eps = normal(2, *SHAPE).astype(jnp.bfloat16)
  x_t = path.interpolate(x, eps, 0.01)
  found = prediction.convert(path, "data", "noise", x, x_t, 0.01)
  assert found.dtype == jnp.float32
  np.testing.assert_allclose(found, eps.astype(jnp.float32), atol=1e-4)


def test_a_network_of_one_prediction_is_a_field_of_another():
  path, x_t, t = paths.vp(), normal(*SHAPE), jnp.array(TIMES)

  def noise(x, t, label, *, scale):
    return scale * x + label

  field = prediction.field(noise, path, "noise", "edm", SIGMA_DATA)
  expected = convert(path, "noise", "edm", noise(x_t, t, 3, scale=2), x_t, t)
  np.testing.assert_array_equal(field(x_t, t, 3, scale=2), expected)


@hard_paths
def test_preconditioning_is_that_of_edm(path):
  # D(x) = c_skip x + c_out F(c_in x, c_noise) at x = x_t / alpha: eq. 7.
  x_t, t = normal(*SHAPE), jnp.array(TIMES)

  def network(params, x, t_B, cond, rng):
    assert (params, cond, rng) == ("params", "cond", "rng")
    return jnp.sin(3.0 * x) + 0.1 * t_B[:, None, None]

  raw = prediction.preconditioned(network, path, "edm", sigma_data=SIGMA_DATA)
  f = raw("params", x_t, t, "cond", "rng")
  found = convert(path, "edm", "data", f, x_t, t)

  alpha, sigma = (np.asarray(c, np.float64) for c in path.at(t, x_t)[:2])
  level, x = sigma / alpha, x_t / alpha
  root = np.sqrt(level**2 + SIGMA_DATA**2)
  low, high = (math.log(bound) / 4 for bound in (0.002, 80.0))
  c_noise = (np.log(level[:, 0, 0]) / 4 - low) / (high - low)
  inner = np.sin(3.0 * x / root) + 0.1 * c_noise[:, None, None]
  expected = SIGMA_DATA**2 / root**2 * x + level * SIGMA_DATA / root * inner
  np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-6)


def test_the_noise_time_of_edm_goes_from_0_to_1():
  path, times = paths.edm(), np.linspace(0.0, 1.0, 5, dtype=np.float32)
  found = np.asarray(prediction.noise_time(path, times))
  np.testing.assert_allclose(found[[0, -1]], [0.0, 1.0], atol=1e-6)
  for path in PATHS.values():
    found = np.asarray(prediction.noise_time(path, times))
    assert np.all(np.isfinite(found)) and np.all(np.diff(found) > 0.0)


def test_a_network_of_any_other_prediction_is_left_alone():
  def network(params, x, t_B, cond, rng):
    return x

  for name in NAMES:
    raw = prediction.preconditioned(network, paths.straight(), name)
    assert (raw is network) == (name != "edm")


def gaussian(path, target="velocity"):
  """Returns the field of data N(MEAN, STD^2), which is known on any path."""

  def field(x, t):
    c = path.at(t, x)
    variance = (c.alpha * STD) ** 2 + c.sigma**2
    score = -(x - c.alpha * MEAN) / variance
    return prediction.convert(path, "score", target, score, x, t)

  return field


@pytest.mark.parametrize(
  "name, target",
  [("straight", "velocity"), ("vp", "velocity"), ("ve", "velocity")]
  + [("vp", "data"), ("ve", "edm")],
)
def test_a_field_on_the_schedule_of_another_path(name, target):
  path = PATHS[name]
  with jax.enable_x64(True):
    x, r = np.random.default_rng(0).standard_normal(5), jnp.asarray(TIMES)
    bounds = path.log_snr(jnp.asarray([path.low, path.high]))
    for on in PATHS.values():
      x_r = x * np.hypot(on.alpha(r), on.sigma(r))
      field = prediction.rescheduled(path, gaussian(path, target), on, target)
      found, expected = field(x_r, r), gaussian(on, target)(x_r, r)
      # Only as far as `path` has such noise.
      met = (bounds[1] < on.log_snr(r)) & (on.log_snr(r) < bounds[0])
      assert np.any(met)
      error = np.where(met, found - expected, 0.0)
      np.testing.assert_allclose(
        error / np.max(np.abs(expected)), 0.0, atol=1e-9
      )


def test_the_change_of_variables_is_that_of_the_paper():
  # u_on(x, r) = (s' / s) x + s t' u(x / s, t), derivatives by automatic ones.
  path, on = paths.straight(), paths.vp()

  def of_r(r):
    t = path.log_snr_inverse(on.log_snr(r))
    return on.alpha(r) / path.alpha(t), t

  def velocity(x, t):
    return jnp.sin(x) * (1.0 + t) + x

  with jax.enable_x64(True):
    x, r = jnp.linspace(-2.0, 2.0, 5), jnp.asarray(TIMES)

    @jax.jit
    def both(x, r):
      (s, t), (s_dot, t_dot) = jax.jvp(of_r, (r,), (jnp.ones_like(r),))
      expected = s_dot / s * x + s * t_dot * velocity(x / s, t)
      return expected, prediction.rescheduled(path, velocity, on)(x, r)

    expected, found = both(x, r)
  np.testing.assert_allclose(found, expected, rtol=1e-10)


def heun(field, x, times):
  def step(x, now):
    t, t_next = now
    slope = field(x, t)
    end = field(x + (t_next - t) * slope, t_next)
    return x + (t_next - t) * (slope + end) / 2, None

  return jax.lax.scan(step, x, (times[:-1], times[1:]))[0]


@pytest.mark.parametrize("on", ["gvp", "polynomial", "zero terminal snr"])
def test_the_same_samples_on_another_schedule(on):
  # Trained on the straight path, sampled on it and on another: from the same
  # noise to the same data, which is also known.
  path, on = paths.straight(), PATHS[on]
  eps = np.linspace(-2.0, 2.0, 5, dtype=np.float32)
  times = np.linspace(1.0, 0.0, 801, dtype=np.float32)

  @jax.jit
  def both(eps):
    field = gaussian(path)
    fields = field, prediction.rescheduled(path, field, on)
    return [heun(each, eps, times) for each in fields]

  along, moved = both(eps)
  np.testing.assert_allclose(along, MEAN + STD * eps, atol=2e-4)
  np.testing.assert_allclose(moved, MEAN + STD * eps, atol=2e-3)


@hard_paths
def test_a_rescheduled_field_is_finite_at_the_ends(path):
  x, r = normal(*SHAPE), jnp.array([0.0, 1e-6, 0.5, 1.0 - 2.0**-24, 1.0])
  for on in (PATHS["straight"], PATHS["vp"], PATHS["edm"]):
    for one, other in ((path, on), (on, path)):
      field = prediction.rescheduled(one, lambda x, t: x, other)
      assert np.all(np.isfinite(field(x, r)))


@pytest.mark.parametrize("source", ["noise", "score"])
def test_noise_says_nothing_where_there_is_no_data(source):
  for name in ("straight", "cosine", "gvp", "zero terminal snr"):
    for target in ("velocity", "data"):
      with pytest.raises(ValueError, match=f"'{source}'.*alpha is.*'v'"):
        prediction.check(PATHS[name], source, target)
  for name in ("vp", "ddpm", "edm", "scaled_linear", "sub_vp"):
    prediction.check(PATHS[name], source, "velocity")
  prediction.check(PATHS["straight"], source, source)
  narrowed = paths.build("straight", high=0.999)
  prediction.check(narrowed, source, "velocity")


def test_all_other_predictions_can_be_sampled_as_a_velocity():
  for path in PATHS.values():
    for source in ("data", "v", "velocity", "edm"):
      prediction.check(path, source, "velocity")


def test_an_unknown_name_says_what_there_is():
  x = jnp.ones(2)
  for names in (("data", "flow"), ("flow", "data"), ("flow", "flow")):
    with pytest.raises(ValueError, match="'flow'.*data, noise, velocity"):
      prediction.convert(paths.straight(), *names, x, x, 0.5)
  with pytest.raises(ValueError, match="Did you mean 'noise'"):
    prediction.convert(paths.straight(), "noises", "data", x, x, 0.5)
  with pytest.raises(ValueError, match="above 0, not 0.0"):
    prediction.convert(
      paths.straight(), "data", "edm", x, x, 0.5, sigma_data=0.0
    )


def test_beyond_the_noisiest_end_the_data_are_kept():
  # An error of the noise is one of the data, 151 times as large at the end of
  # this path, and would be 1,000 times as large where the other goes on.
  path, on = paths.vp(), paths.build("straight", high=0.999)
  x, r = np.full(1, 0.3, np.float32), 0.999
  wrong = prediction.rescheduled(path, lambda x, t: x + 1e-3, on, "noise")
  right = prediction.rescheduled(path, lambda x, t: x, on, "noise")

  @jax.jit
  def both(t):
    return [
      prediction.convert(on, "noise", "data", field(x, t), x, t)
      for field in (wrong, right)
    ]

  away = jax.device_get(both(np.float32(r)))
  np.testing.assert_allclose(abs(away[0] - away[1]), 0.151, rtol=0.05)
