"""Losses against oracles: fields whose loss is known in closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowjax.flow import distances, losses, paths, prediction, times

SHAPE = (4, 4, 3)
LAW = times.logit_normal()


def key(seed=0):
  # Compiles in a fifth of the time that threefry takes.
  return jax.random.key(seed, impl="rbg")


def images(count, seed=0, shape=SHAPE):
  random = np.random.default_rng(seed)
  return random.standard_normal((count, *shape), np.float32)


def at_times(values):
  """A law that gives every batch these times, again and again."""

  class Fixed(times.TimeLaw):
    def sample(self, rng, shape):
      return jnp.resize(jnp.asarray(values, jnp.float32), shape)

  return Fixed(lambda u: u, jnp.ones_like)


def coefficients(path, prediction, t, sigma_data):
  """The a, b of a prediction a x + b eps, by its definition."""
  alpha, sigma = path.alpha(t), path.sigma(t)
  norm = jnp.sqrt(sigma**2 + (sigma_data * alpha) ** 2)
  zero, one = jnp.zeros_like(t), jnp.ones_like(t)
  return {
    "data": (one, zero),
    "noise": (zero, one),
    "velocity": (path.alpha_dot(t), path.sigma_dot(t)),
    "v": (-sigma, alpha),
    "score": (zero, -1.0 / sigma),
    # EDM: F = (D - c_skip x / alpha) / c_out, at the noise level sigma / alpha.
    "edm": (sigma / (sigma_data * norm), -sigma_data * alpha / norm),
  }[prediction]


def oracle_of_normal(path, prediction="velocity", sigma_data=0.5):
  """E[a x + b eps | x_t] of x ~ N(mean, std^2), both of them in `params`.

  `params` may move it away from the optimum.
  """

  def predict(params, x_t, t_B, cond, rng):
    mean, std = params["mean"], params["std"]
    a, b = coefficients(path, prediction, t_B, sigma_data)
    alpha, sigma = path.alpha(t_B), path.sigma(t_B)
    slope = (a * alpha * std**2 + b * sigma) / ((alpha * std) ** 2 + sigma**2)
    slope, a, alpha = (paths.over(c, x_t) for c in (slope, a, alpha))
    slope = slope + params.get("slope", 0.0)
    level = a * mean + params.get("offset", 0.0)
    return level + slope * (x_t - alpha * mean)

  return predict


def least_loss_of_normal(path, prediction, std, t, sigma_data=0.5):
  """Var(a x + b eps | x_t) of x ~ N(mean, std^2)."""
  a, b = coefficients(path, prediction, t, sigma_data)
  alpha, sigma = path.alpha(t), path.sigma(t)
  square = (std * (a * sigma - b * alpha)) ** 2
  return square / ((alpha * std) ** 2 + sigma**2)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(paths.PATHS))
def test_the_least_loss_of_a_normal_is_its_closed_form(name):
  path, sigma_data = paths.PATHS[name](), 0.4

  def evaluate(params, batch, rng):
    found = {}
    for kind in prediction.PREDICTIONS:
      loss = losses.matching(
        oracle_of_normal(path, kind, sigma_data),
        path,
        at_times(losses.EIGHTHS),
        prediction=kind,
        sigma_data=sigma_data,
      )
      loss_B = loss(params, batch, rng)[1]["loss_by_example"]
      found[kind] = jnp.mean(loss_B.reshape(-1, 8), axis=0)
    return found

  x, t_T = images(4000, shape=(16,)), jnp.array(losses.EIGHTHS)
  # A single datum leaves nothing unknown: the noise is then in x_t.
  for std, rtol in ((0.7, 0.08), (0.0, 0.0)):
    batch = {"image": 0.5 + std * x}
    found = evaluate({"mean": 0.5, "std": std}, batch, key())
    for kind in prediction.PREDICTIONS:
      expected = least_loss_of_normal(path, kind, std, t_T, sigma_data)
      a, b = coefficients(path, kind, t_T, sigma_data)
      rounding = (
        1e-8 * (1.0 + a**2 + b**2) / jnp.minimum(path.sigma(t_T), 1) ** 2
      )
      error = jnp.abs(found[kind] - expected) - rtol * expected
      assert np.all(error < rounding), (kind, std, found[kind], expected)


@pytest.mark.slow
@pytest.mark.parametrize("distance", ["l2", "pseudo_huber"])
def test_the_oracle_is_the_minimum_whatever_the_weight_and_distance(distance):
  path, at_optimum = paths.straight(), {"mean": 0.7, "std": 0.5}
  batch = {"image": 0.7 + 0.5 * images(4000)}

  def build(weight):
    predict = oracle_of_normal(path)
    loss = losses.matching(predict, path, LAW, weight=weight, distance=distance)

    def of(moved, rng):
      return loss({**at_optimum, **moved}, batch, rng)[0]

    return jax.jit(jax.grad(of))

  for weight in (None, lambda t: 1.0 + 3.0 * t):
    grad, here = build(weight), {"slope": 0.0, "offset": 0.0}
    for name, slope in grad(here, key()).items():
      assert abs(float(slope)) < 0.02, name
      beside = grad({**here, name: 0.2}, key())
      assert float(beside[name]) > 0.05, name


@pytest.mark.slow
def test_the_default_is_what_it_always_was_to_the_last_bit():
  def before(params, batch, rng):
    rng_t, rng_eps, rng_net = jax.random.split(rng, 3)
    x = batch["image"]
    t_B = LAW.sample(rng_t, x.shape[:1])
    eps = jax.random.normal(rng_eps, x.shape, jnp.float32)
    t = t_B[:, None, None, None]
    x_t = (1.0 - t) * x + t * eps
    noise = jax.random.normal(rng_net, x.shape)
    residual = jnp.sin(params * x_t) + noise - (eps - x)
    return jnp.mean(jnp.mean(jnp.square(residual), axis=(1, 2, 3)))

  def predict(params, x_t, t_B, cond, rng):
    return jnp.sin(params * x_t) + jax.random.normal(rng, x_t.shape)

  def now(params, batch, rng):
    return losses.flow_matching(predict, paths.straight(), LAW)(
      params, batch, rng
    )[0]

  arguments = 3.0, {"image": images(8)}, jax.random.key(7)
  found, expected = (
    jax.jit(jax.value_and_grad(loss))(*arguments) for loss in (now, before)
  )
  np.testing.assert_array_equal(found, expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(paths.PATHS))
def test_gradients_are_finite_at_both_ends_of_every_path(name):
  path = paths.PATHS[name]()
  # The law itself may be anywhere; the loss keeps it where the path is finite.
  law, batch = at_times([0.0, 1.0, path.low, path.high]), {"image": images(4)}
  # As a network that starts at exactly 0, and one that does not.
  for dtype, start in ((jnp.float32, 0.0), (jnp.bfloat16, 0.5)):

    def predict(params, x_t, t_B, cond, rng, dtype=dtype):
      return params[None] * jnp.tanh(x_t.astype(dtype))

    for kind in prediction.PREDICTIONS:
      # Not compiled: each operation is, once for all paths.
      loss = losses.matching(predict, path, law, prediction=kind)
      scale = jnp.full(SHAPE, start, dtype)
      (value, _), slope = jax.value_and_grad(loss, has_aux=True)(
        scale, batch, key()
      )
      assert slope.dtype == dtype and np.isfinite(value), kind
      slope = slope.astype(jnp.float32)
      assert np.isfinite(slope).all() and (slope != 0.0).any(), kind


@pytest.mark.slow
def test_times_are_kept_where_the_path_is_finite():
  path, seen = paths.PATHS["vp"](), []

  def predict(params, x_t, t_B, cond, rng):
    seen.append(t_B)
    return x_t

  law = at_times([0.0, 0.5, 1.0])
  loss = losses.matching(predict, path, law)

  @jax.jit
  def given(batch):
    loss({}, batch, key())
    return seen[0]

  found = given({"image": images(3)})
  np.testing.assert_array_equal(found, np.float32([path.low, 0.5, 1.0]))


def test_distances_by_hand():
  value, target = images(5), images(5, 1)
  d = np.asarray(value - target)

  def build(name, **options):
    return jax.jit(distances.build(name, **options))(value, target)

  mean = {"axis": (1, 2, 3)}
  np.testing.assert_allclose(build("l2"), np.mean(d**2, **mean), rtol=1e-6)
  huber = np.sqrt(d**2 + 0.01) - 0.1
  np.testing.assert_allclose(
    build("pseudo_huber", c=0.1), np.mean(huber, **mean), rtol=1e-5
  )
  # arXiv:2310.14189, eq. 8, whose norm is a sum and whose c grows with sqrt(D).
  c = 0.00054 * np.sqrt(48)
  whole = np.sqrt(np.sum(d**2, **mean) + c**2) - c
  np.testing.assert_allclose(
    build("pseudo_huber", c=0.00054, of="examples"),
    whole / np.sqrt(48),
    rtol=1e-5,
  )


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(distances.DISTANCES))
def test_distances_are_exact_and_smooth_where_nothing_is_left(name):
  distance = distances.build(name)
  target = images(2)

  @jax.jit
  def both(value):
    def total(value):
      found_B = distance(value, target)
      return jnp.sum(found_B), found_B

    slope, found_B = jax.grad(total, has_aux=True)(value)
    return found_B, slope

  for value in (target, 0.0 * target, target.astype(jnp.bfloat16)):
    found, slope = jax.device_get(both(value))
    assert found.dtype == jnp.float32 and slope.dtype == value.dtype
    assert np.isfinite(slope.astype(np.float32)).all()
  np.testing.assert_allclose(both(target)[0], 0.0, atol=1e-6)
  # A tiny residual is not lost among c: r^2 / 2 c for pseudo-Huber.
  if name == "pseudo_huber":
    tiny = jax.jit(distance)(target * 0.0 + 1e-8, target * 0.0)
    np.testing.assert_allclose(tiny, 5e-14, rtol=1e-4)


def test_wrong_names_and_values_are_answered_with_what_would_do():
  def build(**options):
    return losses.matching(zero_field, paths.straight(), LAW, **options)

  with pytest.raises(ValueError, match="did you mean 'pseudo_huber'"):
    build(distance="pseudo_hubr")
  with pytest.raises(ValueError, match="velocity"):
    build(prediction="velocty")
  with pytest.raises(ValueError, match="no option 'd'"):
    distances.build("pseudo_huber", d=1.0)
  with pytest.raises(ValueError, match="above 0, not 0"):
    distances.build("pseudo_huber", c=0.0)
  with pytest.raises(ValueError, match="'pixels'"):
    distances.build("pseudo_huber", of="pixels")
  with pytest.raises(ValueError, match="floor"):
    distances.build("l2_cosine", floor=0.0)


@pytest.mark.slow
def test_nothing_is_broadcast_in_silence():
  def twice(params, x_t, t_B, cond, rng):
    return jnp.concatenate([x_t, x_t], axis=-1)

  def unsure(params, x_t, t_B, cond, rng):
    return x_t, t_B[:, None]

  batch = {"image": images(4, shape=(4, 4, 1))}
  loss = losses.matching(twice, paths.straight(), LAW)
  with pytest.raises(ValueError, match="hybrid"):
    jax.eval_shape(loss, {}, batch, key())
  loss = losses.uncertain(unsure, paths.straight(), LAW)
  with pytest.raises(ValueError, match="one number per example"):
    jax.eval_shape(loss, {}, batch, key())


def test_a_distance_of_one_s_own():
  def largest(value, target):
    return jnp.max(jnp.abs(value - target), axis=(1, 2, 3))

  loss = losses.matching(zero_field, paths.straight(), LAW, distance=largest)
  value, metrics = jax.jit(loss)({}, {"image": images(8)}, key())
  assert 2.0 < float(value) == float(jnp.mean(metrics["loss_by_example"]))


def test_validation_in_the_space_of_the_prediction():
  # E (x - 0)^2 of data, whatever t; a squared error of 1 of noise.
  for kind, expected in (("data", 4.0), ("noise", 1.0)):
    loss = losses.fixed_time(zero_field, paths.straight(), prediction=kind)
    value, _ = jax.jit(loss)({}, {"image": 2.0 * images(1000)}, key())
    assert float(value) == pytest.approx(expected, rel=0.03)


@pytest.mark.slow
def test_uncertainty_learns_the_logarithm_of_the_loss():
  path, weight = paths.straight(), lambda t: 1.0 + t
  batch = {"image": images(400)}
  law = at_times([0.25, 0.75])

  def predict(u_T, x_t, t_B, cond, rng):
    return jnp.zeros_like(x_t), jnp.where(t_B < 0.5, u_T[0], u_T[1])

  loss = losses.uncertain(predict, path, law, weight=weight, prediction="data")
  plain = losses.matching(
    zero_field, path, law, weight=weight, prediction="data"
  )
  grad = jax.jit(jax.value_and_grad(loss, has_aux=True))
  (value, metrics), slope = grad(np.zeros(2, np.float32), batch, key())
  alone, _ = jax.jit(plain)({}, batch, key())
  assert float(value) == pytest.approx(float(alone))
  by_time = np.asarray(metrics["loss_by_example"]).reshape(-1, 2).mean(0)
  optimum = np.log(np.float32([1.25, 1.75]) * by_time)
  (value, metrics), slope = grad(optimum, batch, key())
  np.testing.assert_allclose(slope, 0.0, atol=1e-6)
  assert float(value) == pytest.approx(1.0 + float(optimum.mean()), rel=1e-5)
  np.testing.assert_allclose(metrics["uncertainty"][:2], optimum, rtol=1e-6)


@pytest.mark.slow
def test_what_the_network_is_given():
  given = []

  def velocity(*arguments):
    given.append(arguments)
    return jnp.zeros_like(arguments[1])

  batch = {"image": images(6), "label": np.arange(6), "mask": np.ones(6)}
  loss = losses.flow_matching(velocity, paths.straight(), times.uniform())

  @jax.jit
  def run(batch):
    _, metrics = loss("params", batch, key())
    ((params, x_t, t_B, cond, rng),) = given
    assert params == "params" and x_t.shape == batch["image"].shape
    assert set(cond) == {"label"} and rng is not None
    return (t_B, metrics["t"]), (cond["label"], batch["label"])

  for found, wanted in run(batch):
    np.testing.assert_array_equal(found, wanted)


def test_validation_runs_the_network_without_rng_at_the_given_times():
  def velocity(params, x_t, t_B, cond, rng):
    assert rng is None and set(cond) == {"label"}
    return jnp.broadcast_to(t_B[:, None, None, None], x_t.shape)

  batch = {"image": jnp.zeros((512, *SHAPE)), "label": jnp.arange(512)}
  loss = losses.fixed_time(velocity, paths.straight(), (0.25, 0.75))
  _, metrics = jax.jit(loss)({}, batch, key())
  # E (t - eps)^2 = 1 + t^2
  by_time = metrics["loss_by_time"]
  np.testing.assert_allclose(by_time, [1.0625, 1.5625], rtol=0.03)


def test_the_eight_times_are_the_middles_of_equal_intervals():
  assert losses.EIGHTHS == tuple(np.arange(1, 16, 2) / 16)


def zero_field(params, x_t, t_B, cond, rng):
  return jnp.zeros_like(x_t)


def test_the_weight_multiplies_each_example():
  def evaluate(weight):
    loss = losses.flow_matching(
      zero_field, paths.straight(), times.uniform(), weight=weight
    )
    return jax.jit(loss)({}, {"image": images(32)}, key(3))

  plain, metrics = evaluate(None)
  weighted, same = evaluate(lambda t: t**2)
  t_B, loss_B = jax.device_get((metrics["t"], metrics["loss_by_example"]))
  np.testing.assert_allclose(loss_B, same["loss_by_example"], rtol=1e-6)
  np.testing.assert_allclose(plain, np.mean(loss_B), rtol=1e-6)
  np.testing.assert_allclose(weighted, np.mean(t_B**2 * loss_B), rtol=1e-6)


@pytest.mark.slow
def test_noise_and_times_are_apart_and_follow_the_rng():
  @jax.jit
  def seen(rng):
    given = []

    def velocity(params, x_t, t_B, cond, rng):
      given.append((x_t[:, 0] / t_B, t_B))
      return x_t

    # One number per example: one key for both would draw both from one stream.
    batch = {"image": jnp.zeros((2000, 1))}
    loss = losses.flow_matching(velocity, paths.straight(), times.uniform())
    loss({}, batch, rng)
    return given[0]

  (eps_B, t_B), (eps_again_B, t_again_B), (_, t_other_B) = (
    jax.device_get(seen(jax.random.key(seed))) for seed in (0, 0, 1)
  )
  np.testing.assert_array_equal(eps_B, eps_again_B)
  np.testing.assert_array_equal(t_B, t_again_B)
  assert not np.array_equal(t_B, t_other_B)
  assert np.std(eps_B) == pytest.approx(1.0, abs=0.05)
  assert abs(np.corrcoef(eps_B, t_B)[0, 1]) < 0.1


def wavy_field(params, x_t, t_B, cond, rng):
  return jnp.sin(3.0 * x_t) + t_B[:, None, None, None]


def unsure_field(params, x_t, t_B, cond, rng):
  return wavy_field(params, x_t, t_B, cond, rng), jnp.cos(5.0 * t_B)


def varied_field(params, x_t, t_B, cond, rng):
  value = wavy_field(params, x_t, t_B, cond, rng)
  return jnp.concatenate([value, 0.5 * value], axis=-1)


# Under jax's own generator, whose stream depends on neither mesh nor length.
EITHER = {
  "flow_matching": jax.jit(
    losses.flow_matching(wavy_field, paths.straight(), times.logit_normal())
  ),
  "fixed_time": jax.jit(losses.fixed_time(wavy_field, paths.straight())),
  "uncertain": jax.jit(
    losses.uncertain(unsure_field, paths.straight(), times.logit_normal())
  ),
  "hybrid": jax.jit(losses.hybrid(varied_field, paths.ddpm(), times.uniform())),
}
either = pytest.mark.parametrize("loss", EITHER.values(), ids=EITHER.keys())
MASK = jnp.array([1, 1, 1, 1, 1, 0, 0, 0])


@pytest.mark.slow
@either
def test_padding_is_ignored_exactly(loss):
  real, rng = images(5), jax.random.key(0)

  def padded(fill):
    padding = np.full((3, *SHAPE), fill, np.float32)
    return {"image": np.concatenate([real, padding]), "mask": MASK}

  value, metrics = loss({}, padded(0.0), rng)
  for fill in (7.0, np.nan):
    other, _ = loss({}, padded(fill), rng)
    np.testing.assert_array_equal(other, value)
  # Real examples are given the same noise with padding and without.
  alone, expected = loss({}, {"image": real}, rng)
  np.testing.assert_allclose(value, alone, rtol=1e-6)
  loss_B = metrics["loss_by_example"]
  np.testing.assert_allclose(loss_B[:5], expected["loss_by_example"], rtol=1e-6)
  np.testing.assert_array_equal(loss_B[5:], np.zeros(3))
  if "loss_by_time" in metrics:
    by_time = metrics["loss_by_time"]
    np.testing.assert_allclose(by_time, expected["loss_by_time"], rtol=1e-6)


@either
def test_nothing_but_padding_weighs_nothing(loss):
  batch = {"image": images(8), "mask": 0 * MASK}
  assert float(loss({}, batch, jax.random.key(0))[0]) == 0.0


@either
def test_the_mesh_changes_no_example(loss):
  batch = {"image": images(8), "mask": MASK}
  mesh = jax.make_mesh((8,), ("data",))
  spec = jax.sharding.PartitionSpec("data")
  sharding = jax.sharding.NamedSharding(mesh, spec)
  one, metrics = loss({}, batch, jax.random.key(0))
  eight, sharded = loss({}, jax.device_put(batch, sharding), jax.random.key(0))
  np.testing.assert_allclose(one, eight, rtol=1e-6)
  for name in metrics:
    np.testing.assert_allclose(metrics[name], sharded[name], rtol=1e-6)


def test_half_precision_of_the_network_is_reduced_in_float32():
  def half_field(params, x_t, t_B, cond, rng):
    return jnp.zeros(x_t.shape, jnp.bfloat16)

  def evaluate(field):
    loss = losses.flow_matching(field, paths.straight(), times.uniform())
    return jax.jit(loss)({}, {"image": images(8)}, key())

  (half, metrics), (full, _) = evaluate(half_field), evaluate(zero_field)
  assert half.dtype == metrics["loss_by_example"].dtype == jnp.float32
  np.testing.assert_allclose(half, full, rtol=1e-6)
