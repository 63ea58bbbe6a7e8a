"""The step: exact in its sums, deaf to NaN."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flowjax.train import ema
from flowjax.train import state as states
from flowjax.train import step as steps


def _quadratic(params, batch, rng):
  del rng
  error_B = batch["x"] @ params["w"] - batch["y"]
  return jnp.mean(jnp.square(error_B)), {}


def _quadratic_state(optimizer):
  def init(rng):
    return {"w": jax.random.normal(rng, (3,))}

  return states.initial(init, optimizer, 0)


def _points(count=12):
  rng = np.random.default_rng(0)
  return {
    "x": rng.standard_normal((count, 3)).astype(np.float32),
    "y": rng.standard_normal(count).astype(np.float32),
  }


@pytest.mark.parametrize("accumulate", [2, 3, 12])
def test_accumulated_gradients_are_the_gradient(accumulate):
  params, rng = {"w": jnp.arange(3.0)}, jax.random.key(0)
  whole = steps.accumulated(_quadratic, 1)(params, _points(), rng)
  split = steps.accumulated(_quadratic, accumulate)(params, _points(), rng)
  np.testing.assert_allclose(split[0], whole[0], rtol=1e-6)
  np.testing.assert_allclose(split[1]["w"], whole[1]["w"], rtol=1e-5)
  assert split[1]["w"].dtype == jnp.float32


def test_a_part_is_every_so_many_th_example():
  def first(params, batch, rng):
    return params["w"] * batch["x"][0] * jax.random.normal(rng), {}

  rng, x_B = jax.random.key(0), jnp.arange(1.0, 7.0)
  params = {"w": jnp.ones(())}
  value, _ = steps.accumulated(first, 2)(params, {"x": x_B}, rng)
  draws = [float(jax.random.normal(key)) for key in jax.random.split(rng, 2)]
  expected = (x_B[0] * draws[0] + x_B[1] * draws[1]) / 2
  np.testing.assert_allclose(value, expected, rtol=1e-6)


def test_a_divided_batch_is_accumulated_where_it_lies():
  """Each device splits its own examples: only sums go between devices."""
  mesh = jax.make_mesh(
    (8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,)
  )
  whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  divided = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
  params, batch = {"w": jnp.arange(3.0)}, _points(32)
  rng = jax.random.key(0)
  gradient = jax.jit(
    steps.accumulated(_quadratic, 4), in_shardings=(whole, divided, whole)
  )
  text = gradient.lower(params, batch, rng).compile().as_text()
  assert "all-reduce" in text
  for other in ("all-gather", "all-to-all", "collective-permute"):
    assert f"{other}(" not in text and f"{other}-start(" not in text
  value, grads = gradient(params, batch, rng)
  expected = steps.accumulated(_quadratic, 4)(params, batch, rng)
  np.testing.assert_allclose(value, expected[0], rtol=1e-6)
  np.testing.assert_allclose(grads["w"], expected[1]["w"], rtol=1e-5)


def test_each_accumulated_part_draws_its_own_randomness():
  def noise(params, batch, rng):
    return jnp.sum(params["w"]) * jax.random.normal(rng), {"batch": batch}

  rng, params = jax.random.key(1), {"w": jnp.ones(3)}
  _, grads = steps.accumulated(noise, 2)(params, _points(), rng)
  draws = [float(jax.random.normal(key)) for key in jax.random.split(rng, 2)]
  np.testing.assert_allclose(grads["w"], np.full(3, np.mean(draws)), rtol=1e-6)


def _step(optimizer, loss=_quadratic, warmup=False, **options):
  return jax.jit(
    steps.build(
      loss,
      optimizer,
      seed=0,
      ema_config=ema.EmaConfig(decay=0.9, warmup=warmup),
      **options,
    )
  )


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(poison):
  optimizer = optax.adam(0.1)
  step, state = _step(optimizer), _quadratic_state(optimizer)
  state, _ = step(state, _points())
  bad = _points()
  bad["x"][3, 1] = poison
  after, values = step(state, bad)
  for name in ("params", "ema", "opt_state"):
    jax.tree.map(
      np.testing.assert_array_equal, getattr(after, name), getattr(state, name)
    )
  assert (int(after.step), int(after.skipped)) == (2, 1)
  after, values = step(after, bad)
  assert (int(values["skipped"]), int(values["skipped_in_row"])) == (2, 2)
  after, values = step(after, _points())
  assert (int(values["skipped"]), int(values["skipped_in_row"])) == (2, 0)
  assert not np.array_equal(after.params["w"], state.params["w"])


@pytest.mark.parametrize(
  ("warmup", "decays"),
  [(False, [0.9, 0.9, 0.9]), (True, [1 / 10, 2 / 11, 3 / 12])],
)
def test_the_average_follows_the_parameters(warmup, decays):
  optimizer = optax.sgd(0.1)
  step, state = _step(optimizer, warmup=warmup), _quadratic_state(optimizer)
  expected = state.params["w"]
  for decay in decays:
    state, _ = step(state, _points())
    expected = decay * expected + (1 - decay) * state.params["w"]
  np.testing.assert_allclose(state.ema["w"], expected, rtol=1e-6)


def test_the_learning_rate_shown_is_the_one_applied():
  """A skipped step uses up none of the schedule."""
  schedule = optax.linear_schedule(0.5, 0.1, 4)
  optimizer = optax.sgd(schedule)

  def slope(params, batch, rng):
    return jnp.sum(params["w"] * batch["slope"]), {}

  step = _step(optimizer, slope, schedule=schedule)
  state, rates = _quadratic_state(optimizer), []
  for value in (1.0, np.nan, 1.0, np.nan, 1.0):
    before = state.params["w"]
    state, values = step(state, {"slope": jnp.full(3, value)})
    if np.isfinite(value):
      moved = before - state.params["w"]
      np.testing.assert_allclose(values["learning_rate"], moved[0], rtol=1e-5)
    rates.append(float(values["learning_rate"]))
  np.testing.assert_allclose(rates, [0.5, 0.4, 0.4, 0.3, 0.3], rtol=1e-6)


def test_the_decay_of_the_average_warms_up():
  config = ema.EmaConfig(decay=0.99, warmup=True)
  decays = [float(ema.decay_at(config, jnp.int32(n))) for n in (0, 8, 10**4)]
  np.testing.assert_allclose(decays, [0.1, 0.5, 0.99], rtol=1e-6)


def test_randomness_is_that_of_the_step():
  def loss(params, batch, rng):
    return jnp.sum(params["w"]) + jax.random.normal(rng), {"batch": batch}

  optimizer = optax.sgd(0.0)
  step, state = _step(optimizer, loss), _quadratic_state(optimizer)
  seen = [float(step(state._replace(step=i), _points())[1]["loss"])
          for i in (0, 1, 1)]  # fmt: skip
  key = jax.random.fold_in(jax.random.key(0), 1)
  expected = float(jnp.sum(state.params["w"]) + jax.random.normal(key))
  assert seen[0] != seen[1] == seen[2] == pytest.approx(expected, rel=1e-6)
