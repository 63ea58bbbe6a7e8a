"""Images are moved by as much as is said, and no more."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowjax.evaluate import classifier


def _blob(height, width):
  """Returns an image of one soft dot off the centre, on ground of -1."""
  y, x = np.mgrid[:height, :width].astype(np.float32)
  away = (y - height * 0.4) ** 2 + (x - width * 0.55) ** 2
  return (2.0 * np.exp(-away / 4.0) - 1.0)[None, :, :, None]


def _centre(image_HW):
  mass = np.asarray(image_HW, np.float64) + 1.0
  y, x = np.mgrid[: mass.shape[0], : mass.shape[1]]
  return np.array([(mass * y).sum(), (mass * x).sum()]) / mass.sum()


def test_nothing_moves_when_all_is_zero(monkeypatch):
  for name in ("ROTATION", "STRETCH", "SHIFT"):
    monkeypatch.setattr(classifier, name, 0.0)
  x = np.random.default_rng(0).uniform(-1, 1, (3, 8, 12, 2)).astype(np.float32)
  np.testing.assert_allclose(
    classifier.move(jnp.asarray(x), jax.random.key(0)), x, atol=1e-5
  )


def test_a_turn_by_a_quarter_is_a_turn(monkeypatch):
  monkeypatch.setattr(classifier, "STRETCH", 0.0)
  monkeypatch.setattr(classifier, "SHIFT", 0.0)
  monkeypatch.setattr(
    jax.random,
    "uniform",
    lambda key, shape, minval, maxval: jnp.full(shape, maxval),
  )
  monkeypatch.setattr(classifier, "ROTATION", np.pi / 2)
  x = np.random.default_rng(0).uniform(-1, 1, (1, 8, 8, 1)).astype(np.float32)
  moved = np.asarray(classifier.move(jnp.asarray(x), jax.random.key(0)))
  np.testing.assert_allclose(moved, np.rot90(x, axes=(1, 2)), atol=1e-4)


@pytest.mark.slow(1)
def test_moves_are_small_various_and_filled_with_the_ground():
  x = np.repeat(_blob(12, 16), 64, axis=0)
  moved = np.asarray(classifier.move(jnp.asarray(x), jax.random.key(1)))
  away = np.array([_centre(image[..., 0]) for image in moved]) - _centre(
    x[0, ..., 0]
  )
  # 0.6 pixels of 8 are 0.9 rows of 12 and 1.2 columns of 16; the turn and the
  # stretch about the centre add less than half a pixel.
  assert np.abs(away[:, 0]).max() < 1.4 and np.abs(away[:, 1]).max() < 1.7
  assert away.std(axis=0).min() > 0.3
  assert moved.min() >= -1.0 - 1e-5 and moved.max() <= 1.0 + 1e-5


@pytest.mark.slow(1)
def test_it_learns_by_its_seed_and_computes_what_it_learned(monkeypatch):
  monkeypatch.setattr(classifier, "STEPS", 100)
  rng = np.random.default_rng(0)
  labels = rng.integers(0, 2, 300)
  x = np.concatenate([_blob(8, 8), _blob(8, 8)[:, ::-1, ::-1]])[labels]
  x = x + 0.1 * rng.normal(size=x.shape).astype(np.float32)
  fitted, again, other = (
    classifier.fit(x[:200], labels[:200], classes=2, seed=seed)
    for seed in (0, 0, 1)
  )
  assert np.mean(fitted.predict(x[200:]) == labels[200:]) == 1.0
  assert fitted.features(x).shape == (300, classifier.FEATURES)
  assert fitted.features(x).min() == 0.0
  for layers, same in ((again.layers, True), (other.layers, False)):
    pairs = zip(fitted.layers, layers, strict=True)
    alike = [np.array_equal(a["kernel"], b["kernel"]) for a, b in pairs]
    assert alike == 3 * [same]
