"""Distances against closed forms, and against an independent matrix root."""

import numpy as np
import pytest

from flowjax.evaluate import distances


def _spd(rng, size):
  a = rng.normal(size=(size, size))
  return a @ a.T + 0.1 * np.eye(size)


def test_diagonal_gaussians_have_a_closed_form():
  # |m|^2 + sum (s_a - s_b)^2 for standard deviations s_a, s_b.
  mean = np.array([1.0, -2.0, 0.5])
  a, b = np.array([1.0, 4.0, 0.0]), np.array([9.0, 1.0, 0.25])
  found = distances.frechet_of_gaussians(
    mean, np.diag(a), np.zeros(3), np.diag(b)
  )
  expected = 5.25 + np.sum((np.sqrt(a) - np.sqrt(b)) ** 2)
  assert found == pytest.approx(expected, rel=1e-12)


def test_gaussians_that_do_not_commute_agree_with_scipy():
  linalg = pytest.importorskip("scipy.linalg")
  rng = np.random.default_rng(0)
  a, b = _spd(rng, 20), _spd(rng, 20)
  mean_a, mean_b = rng.normal(size=(2, 20))
  found = distances.frechet_of_gaussians(mean_a, a, mean_b, b)
  root = linalg.sqrtm(a @ b).real
  expected = np.sum((mean_a - mean_b) ** 2) + np.trace(a + b - 2.0 * root)
  assert found == pytest.approx(expected, rel=1e-9)
  # Symmetric, and no less under a rotation of both.
  assert distances.frechet_of_gaussians(mean_b, b, mean_a, a) == pytest.approx(
    found, rel=1e-9
  )


def test_samples_have_the_distance_of_their_moments():
  rng = np.random.default_rng(1)
  x = rng.normal(size=(200, 6)) @ rng.normal(size=(6, 6))
  # Moved by 3 along each of 6 features, and nothing else.
  assert distances.frechet(x, x + 3.0) == pytest.approx(54.0, rel=1e-9)
  # Scaled by 2 about the mean: tr C (2 - 1)^2.
  mean = x.mean(axis=0)
  scaled = mean + 2.0 * (x - mean)
  assert distances.frechet(x, scaled) == pytest.approx(
    np.trace(np.cov(x, rowvar=False)), rel=1e-9
  )
  assert distances.frechet(x, x[::-1]) == pytest.approx(0.0, abs=1e-9)
  assert distances.frechet(x, x) >= 0.0


def test_fewer_samples_than_features_are_no_trouble():
  rng = np.random.default_rng(2)
  x = rng.normal(size=(5, 30)).astype(np.float32)
  assert distances.frechet(x, x) == pytest.approx(0.0, abs=1e-6)
  assert distances.frechet(x, x + 1.0) == pytest.approx(30.0, rel=1e-5)


def test_one_sample_has_no_covariance():
  with pytest.raises(ValueError, match="at least 2"):
    distances.frechet(np.zeros((1, 3)), np.zeros((9, 3)))


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_nearest_in_chunks(chunk):
  rng = np.random.default_rng(3)
  a, b = rng.normal(size=(23, 4, 4, 1)), rng.normal(size=(31, 4, 4, 1))
  found, index = distances.nearest(a, b, chunk=chunk)
  table = np.linalg.norm((a[:, None] - b[None]).reshape(23, 31, -1), axis=-1)
  np.testing.assert_array_equal(index, table.argmin(axis=1))
  np.testing.assert_allclose(found, table.min(axis=1), rtol=1e-12)


def test_a_copy_is_at_distance_zero_exactly():
  rng = np.random.default_rng(4)
  b = 1e3 + rng.normal(size=(300, 64))
  order = rng.permutation(300)
  found, index = distances.nearest(b[order], b)
  assert not found.any()
  np.testing.assert_array_equal(index, order)
