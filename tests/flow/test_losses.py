"""Losses against oracles: fields whose loss is known in closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowjax.flow import losses, paths, times

PATHS = sorted(paths.PATHS)
SHAPE = (4, 4, 3)


def key(seed=0):
  # Compiles in a fifth of the time that threefry takes.
  return jax.random.key(seed, impl="rbg")


def images(count, seed=0):
  random = np.random.default_rng(seed)
  return jnp.asarray(random.standard_normal((count, *SHAPE), np.float32))


def oracle_of_one(path, x):
  """The velocity if the data is the one image x: eps is then in x_t."""

  def velocity(params, x_t, t_B, cond, rng):
    c = path.at(t_B, x_t)
    return c.alpha_dot * x + c.sigma_dot * (x_t - c.alpha * x) / c.sigma

  return velocity


def oracle_of_normal(path, mean, std):
  """The velocity E[alpha' x + sigma' eps | x_t] of x ~ N(mean, std^2).

  `params` moves it away from the optimum.
  """

  def velocity(params, x_t, t_B, cond, rng):
    c = path.at(t_B, x_t)
    variance = (c.alpha * std) ** 2 + c.sigma**2
    covariance = c.alpha * c.alpha_dot * std**2 + c.sigma * c.sigma_dot
    slope = covariance / variance + params["slope"]
    level = c.alpha_dot * mean + params["offset"]
    return level + slope * (x_t - c.alpha * mean)

  return velocity


def least_loss_of_normal(path, std, t):
  """Var(alpha' x + sigma' eps | x_t) of x ~ N(mean, std^2)."""
  alpha, sigma = path.alpha(t), path.sigma(t)
  determinant = alpha * path.sigma_dot(t) - sigma * path.alpha_dot(t)
  return (std * determinant) ** 2 / ((alpha * std) ** 2 + sigma**2)


OPTIMUM = {"slope": jnp.zeros(()), "offset": jnp.zeros(())}


@pytest.mark.parametrize("name", PATHS)
def test_zero_for_the_oracle_field(name):
  path = paths.PATHS[name]()
  x = images(1)
  velocity = oracle_of_one(path, x)
  batch = {"image": jnp.broadcast_to(x, (64, *SHAPE))}
  for loss in (
    losses.flow_matching(velocity, path, times.logit_normal()),
    losses.fixed_time(velocity, path),
  ):
    assert float(jax.jit(loss)({}, batch, key())[0]) < 1e-9


@pytest.mark.parametrize("name", PATHS)
def test_the_optimum_of_a_normal_is_its_closed_form(name):
  path, mean, std = paths.PATHS[name](), 0.7, 0.5
  batch = {"image": mean + std * images(4000)}
  velocity = oracle_of_normal(path, mean, std)
  loss = jax.jit(losses.fixed_time(velocity, path))
  value, metrics = loss(OPTIMUM, batch, key())
  t = jnp.array(losses.EIGHTHS)
  expected = least_loss_of_normal(path, std, t)
  np.testing.assert_allclose(metrics["loss_by_time"], expected, rtol=0.02)
  np.testing.assert_allclose(value, jnp.mean(expected), rtol=0.01)


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("weight", [None, lambda t: 1.0 + 3.0 * t])
def test_no_gradient_at_the_optimum_whatever_the_weight(name, weight):
  path, mean, std = paths.PATHS[name](), 0.7, 0.5
  batch = {"image": mean + std * images(4000)}
  velocity = oracle_of_normal(path, mean, std)
  law, rng = times.logit_normal(), key()
  loss = losses.flow_matching(velocity, path, law, weight=weight)
  grad = jax.jit(jax.grad(loss, has_aux=True))
  at_optimum, _ = grad(OPTIMUM, batch, rng)
  for name, slope in at_optimum.items():
    assert abs(float(slope)) < 0.02, name
    beside, _ = grad({**OPTIMUM, name: jnp.float32(0.2)}, batch, rng)
    assert float(beside[name]) > 0.1, name


def test_what_the_network_is_given():
  given = []

  def velocity(*arguments):
    given.append(arguments)
    return jnp.zeros_like(arguments[1])

  batch = {"image": images(6), "label": jnp.arange(6), "mask": jnp.ones(6)}
  loss = losses.flow_matching(velocity, paths.straight(), times.uniform())
  _, metrics = loss("params", batch, key())
  ((params, x_t, t_B, cond, rng),) = given
  assert params == "params" and x_t.shape == batch["image"].shape
  np.testing.assert_array_equal(t_B, metrics["t"])
  assert set(cond) == {"label"} and rng is not None
  np.testing.assert_array_equal(cond["label"], batch["label"])


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
  t_B, loss_B = metrics["t"], metrics["loss_by_example"]
  np.testing.assert_allclose(loss_B, same["loss_by_example"], rtol=1e-6)
  np.testing.assert_allclose(plain, jnp.mean(loss_B), rtol=1e-6)
  np.testing.assert_allclose(weighted, jnp.mean(t_B**2 * loss_B), rtol=1e-6)


def test_noise_and_times_are_apart_and_follow_the_rng():
  seen = []

  def velocity(params, x_t, t_B, cond, rng):
    seen.append((x_t[:, 0] / t_B, t_B))
    return x_t

  # One number per example: one key for both would draw both from the same bits.
  batch = {"image": jnp.zeros((2000, 1))}
  loss = losses.flow_matching(velocity, paths.straight(), times.uniform())
  for seed in (0, 0, 1):
    loss({}, batch, jax.random.key(seed))
  (eps_B, t_B), (eps_again_B, t_again_B), (_, t_other_B) = seen
  np.testing.assert_array_equal(eps_B, eps_again_B)
  np.testing.assert_array_equal(t_B, t_again_B)
  assert not np.array_equal(t_B, t_other_B)
  assert float(jnp.std(eps_B)) == pytest.approx(1.0, abs=0.05)
  assert abs(np.corrcoef(eps_B, t_B)[0, 1]) < 0.1


def wavy_field(params, x_t, t_B, cond, rng):
  return jnp.sin(3.0 * x_t) + t_B[:, None, None, None]


# Under jax's own generator, whose stream depends on neither mesh nor length.
EITHER = {
  "flow_matching": jax.jit(
    losses.flow_matching(wavy_field, paths.straight(), times.logit_normal())
  ),
  "fixed_time": jax.jit(losses.fixed_time(wavy_field, paths.straight())),
}
either = pytest.mark.parametrize("loss", EITHER.values(), ids=EITHER.keys())
MASK = jnp.array([1, 1, 1, 1, 1, 0, 0, 0])


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
