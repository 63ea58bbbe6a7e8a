"""The held-out loss: every example once, the same noise, one program."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowjax import errors
from flowjax.evaluate import validation
from flowjax.flow import losses, paths


def _batches(values, size, pad=np.nan):
  """Yields batches of a 1-pixel image per value, the last one padded."""
  for start in range(0, len(values), size):
    part = np.asarray(values[start : start + size], np.float32)
    missing = size - len(part)
    mask = np.pad(np.ones(len(part), np.float32), (0, missing))
    part = np.pad(part, (0, missing), constant_values=pad)
    yield {"image": part[:, None, None, None], "mask": mask}


def _stub(traces):
  """Returns a loss like fixed_time's: image + t * noise, at two times."""

  def loss(params, batch, rng):
    traces.append(None)
    x_B = batch["image"][:, 0, 0, 0]
    eps_B = jax.random.normal(rng, x_B.shape)
    by_time = []
    for t in (0.0, 1.0):
      loss_B = jnp.where(batch["mask"] > 0, params * (x_B + t * eps_B), 0.0)
      by_time.append(jnp.sum(loss_B) / jnp.maximum(jnp.sum(batch["mask"]), 1.0))
    by_time_T = jnp.stack(by_time)
    return jnp.mean(by_time_T), {"loss_by_time": by_time_T}

  return loss


def test_each_example_counts_once_whatever_the_last_batch_holds():
  values, traces = np.arange(1.0, 11.0), []
  evaluator = validation.Validation(
    _stub(traces), lambda: _batches(values, 4), seed=0
  )
  scores = evaluator.run(jnp.float32(2.0))
  assert list(scores) == [
    "validation_loss",
    "validation_loss_t0",
    "validation_loss_t1",
  ]
  assert all(type(value) is float for value in scores.values())
  assert scores["validation_loss_t0"] == pytest.approx(2.0 * 5.5, rel=1e-6)
  mean = (scores["validation_loss_t0"] + scores["validation_loss_t1"]) / 2
  assert scores["validation_loss"] == pytest.approx(mean)
  evaluator.run(jnp.float32(3.0))
  assert len(traces) == 1  # Three batches and two evaluations, one program.


def test_the_noise_is_that_of_the_seed_and_differs_between_batches():
  def run(seed):
    noise_only = np.zeros(8)
    evaluator = validation.Validation(
      _stub([]), lambda: _batches(noise_only, 4), seed=seed
    )
    first = evaluator.run(jnp.float32(1.0))
    assert evaluator.run(jnp.float32(1.0)) == first
    return first["validation_loss_t1"]

  assert run(0) == run(0) != run(1)
  one_batch = validation.Validation(
    _stub([]), lambda: _batches(np.zeros(4), 4), seed=0
  ).run(jnp.float32(1.0))["validation_loss_t1"]
  assert run(0) != pytest.approx(one_batch)


def test_a_batch_of_padding_alone_counts_for_nothing():
  def batches():
    yield from _batches([3.0, 5.0], 2)
    yield {
      "image": np.full((2, 1, 1, 1), np.nan, np.float32),
      "mask": np.zeros(2, np.float32),
    }

  scores = validation.Validation(_stub([]), batches).run(jnp.float32(1.0))
  assert scores["validation_loss_t0"] == pytest.approx(4.0)


def test_nothing_held_out_is_an_error():
  evaluator = validation.Validation(_stub([]), lambda: iter(()))
  with pytest.raises(errors.DataError, match="no example"):
    evaluator.run(jnp.float32(1.0))


def test_eight_devices_see_what_one_sees():
  mesh = jax.make_mesh(
    (8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,)
  )
  sharding = jax.sharding.NamedSharding(
    mesh, jax.sharding.PartitionSpec("data")
  )
  loss = losses.fixed_time(
    lambda params, x, t, cond, rng: params * x, paths.straight()
  )
  values = np.linspace(-1.0, 1.0, 29)

  def run(put):
    return validation.Validation(
      loss, lambda: _batches(values, 16), seed=3, put=put
    ).run(jnp.float32(0.5))

  one = run(None)
  eight = run(lambda batch: jax.device_put(batch, sharding))
  assert len(one) == 9
  assert eight == pytest.approx(one, rel=1e-6)


def test_the_times_are_the_middles_of_eighths():
  """For a network that says t, at x = 0: the loss is E(t - eps)^2 = t^2 + 1."""
  loss = losses.fixed_time(
    lambda params, x, t, cond, rng: jnp.broadcast_to(
      t[:, None, None, None], x.shape
    ),
    paths.straight(),
  )

  def batches():
    yield {"image": np.zeros((16, 64, 64, 1), np.float32)}

  scores = validation.Validation(loss, batches).run(jnp.float32(0.0))
  for i in range(8):
    expected = ((i + 0.5) / 8) ** 2 + 1.0
    assert scores[f"validation_loss_t{i}"] == pytest.approx(expected, abs=0.03)
