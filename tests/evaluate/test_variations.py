"""What is said of variations, beside copies and other images of a class."""

import types

import numpy as np
import pytest

from flowjax.evaluate import variations

# Four real images of one pixel, of two classes.
REAL = np.array([0.0, 0.4, -0.2, -0.8]).reshape(4, 1, 1, 1)
LABELS = np.array([1, 1, 0, 0])


@pytest.fixture(name="judge")
def _judge():
  """Returns a judge whose classifier tells classes by the sign."""
  known = types.SimpleNamespace(
    stored=lambda images: images,
    classifier=types.SimpleNamespace(
      predict=lambda images: (images.ravel() >= 0).astype(int)
    ),
  )
  return variations.Judge(known, REAL, LABELS)


def test_variations_are_held_against_all_that_is_real(judge):
  drawn = np.array([[0.1, 0.3], [-0.5, -0.1]]).reshape(2, 2, 1, 1, 1)
  found = judge.score(drawn, np.array([0, 3]))
  assert found["same_class"] == 1.0
  assert found["to_original"] == pytest.approx((0.1 + 0.3 + 0.3 + 0.7) / 4)
  assert found["to_others"] == pytest.approx((0.3 + 0.1 + 0.3 + 0.1) / 4)
  assert found["among"] == pytest.approx((0.2 + 0.4) / 2)
  assert judge.least == pytest.approx(0.2)
  assert found["copies"] == 0.25


def test_a_copy_is_one_and_another_image_is_none(judge):
  copies = np.repeat(REAL[:, None], 2, axis=1)
  found = judge.score(copies, np.arange(4))
  assert found["copies"] == 1.0 and found["to_original"] == 0.0
  assert judge.score(copies, np.array([2, 3, 0, 1]))["same_class"] == 0.0
