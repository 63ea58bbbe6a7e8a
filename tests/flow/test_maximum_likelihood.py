"""Bits per dimension, against densities that are known."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from flowjax.flow import maximum_likelihood

B = 6
X = np.random.default_rng(0).standard_normal((B, 3, 2, 1)).astype(np.float32)
BATCH = {"image": X, "label": np.arange(B)}
RNG = jax.random.key(0)


def scaled(params, x, cond, rng):
  """z = a x + label, a flow whose density is normal."""
  del rng
  label = jnp.asarray(cond["label"], jnp.float32)[:, None, None, None]
  log_det_B = jnp.full(len(x), math.prod(x.shape[1:])) * jnp.log(params)
  return params * x + label, log_det_B


def uniform(params, x, cond, rng):
  """The flow that turns a uniform law on `params` either side into noise."""
  del cond, rng
  u = (x / params + 1) / 2
  z = jax.scipy.special.ndtri(u)
  log_slope = -jnp.log(2 * params) - jax.scipy.stats.norm.logpdf(z)
  return z, jnp.sum(log_slope, axis=(1, 2, 3))


def test_it_is_the_density_of_the_data_in_bits_per_dimension():
  loss = maximum_likelihood.maximum_likelihood(scaled)
  value, metrics = loss(2.0, BATCH, RNG)
  mean = -np.arange(B)[:, None, None, None] / 2.0
  log_p = stats.norm.logpdf(X, mean, 0.5).mean(axis=(1, 2, 3))
  expected = -log_p / math.log(2.0)
  np.testing.assert_allclose(metrics["loss_by_example"], expected, rtol=1e-5)
  np.testing.assert_allclose(value, expected.mean(), rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("levels", [2, 17, 256])
def test_levels_that_are_all_alike_need_the_bits_of_their_number(levels):
  # Each level is a bin of its own: together a little wider than [-1, 1].
  end = 1.0 + 1.0 / (levels - 1)
  level = np.random.default_rng(0).integers(levels, size=X.shape)
  batch = {"image": (2 * level / (levels - 1) - 1).astype(np.float32)}
  loss = maximum_likelihood.maximum_likelihood(uniform, levels=levels)
  value, _ = loss(end + 1e-6, batch, RNG)
  np.testing.assert_allclose(value, math.log2(levels), atol=1e-3)


def test_the_noise_fills_a_level_and_changes_with_the_rng():
  seen = []

  def forward(params, x, cond, rng):
    seen.append(np.asarray(x))
    return scaled(params, x, cond, rng)

  image = np.full((B, 32, 32, 1), 0.125, np.float32)
  loss = maximum_likelihood.maximum_likelihood(forward, levels=17)
  values = [
    loss(2.0, {**BATCH, "image": image}, jax.random.key(i))[0]
    for i in (0, 0, 1)
  ]
  assert values[0] == values[1] != values[2]
  noise = seen[0] - image
  assert noise.min() >= -1 / 16 and noise.max() <= 1 / 16
  assert noise.min() < -0.06 and noise.max() > 0.06
  np.testing.assert_allclose(noise.mean(), 0.0, atol=2e-3)
  np.testing.assert_array_equal(image, 0.125)


def test_an_rng_reaches_the_network_in_training_alone():
  rngs = []

  def forward(params, x, cond, rng):
    rngs.append(rng)
    assert set(cond) == {"label"}
    return scaled(params, x, cond, rng)

  batch = {**BATCH, "mask": np.ones(B)}
  for training in (True, False):
    loss = maximum_likelihood.maximum_likelihood(forward, training=training)
    loss(2.0, batch, RNG)
  assert rngs[0] is not None and rngs[1] is None


def test_padding_counts_for_nothing_whatever_it_holds():
  loss = maximum_likelihood.maximum_likelihood(scaled, levels=17)
  mask = np.array([1, 1, 0, 1, 0, 1])
  image = np.where(mask[:, None, None, None] == 1, X, np.inf)
  value, metrics = loss(2.0, {**BATCH, "image": image, "mask": mask}, RNG)
  _, whole = loss(2.0, BATCH, RNG)
  kept = whole["loss_by_example"][mask == 1]
  np.testing.assert_allclose(value, kept.mean(), rtol=1e-6)
  np.testing.assert_array_equal(
    metrics["loss_by_example"], np.where(mask, whole["loss_by_example"], 0.0)
  )
  empty, _ = loss(2.0, {**BATCH, "mask": np.zeros(B)}, RNG)
  assert empty == 0.0


def test_one_level_is_refused():
  with pytest.raises(ValueError, match="levels=1.*256"):
    maximum_likelihood.maximum_likelihood(scaled, levels=1)
