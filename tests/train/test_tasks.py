"""What a task makes of a batch, and which networks it is for."""

# Shape suffixes: B batch, H height, W width, C channels.

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowjax.train import tasks

INPAINTING = tasks.TaskConfig("inpainting", hole=(0.1, 0.5), whole=0.0)
LOWERED = tasks.TaskConfig("super_resolution", factor=2)


def images(batch=6, size=(8, 12), channels=3):
  rng = np.random.default_rng(0)
  drawn = rng.uniform(-1.0, 1.0, (batch, *size, channels))
  return jnp.asarray(drawn, jnp.float32)


@pytest.mark.parametrize("boxes, closing", [(0.0, 0.0), (1.0, 24 / 384)])
def test_a_hole_has_the_share_that_its_law_says(boxes, closing):
  config = dataclasses.replace(INPAINTING, boxes=boxes)
  mask_BHW1 = jax.jit(lambda key: tasks.masks(config, key, 1000, (16, 24)))(
    jax.random.key(0)
  )
  assert set(np.unique(mask_BHW1)) == {0.0, 1.0}
  share_B = np.asarray(mask_BHW1).mean((1, 2, 3))
  assert 0.1 <= share_B.min() and share_B.max() <= 0.5 + closing
  # Uniform between both: the mean of 1000 is within 4 of its errors, 0.0037.
  assert abs(share_B.mean() - 0.3 - closing / 4) < 0.015 + closing / 4


def test_whole_images_are_masked_as_often_as_said():
  config = dataclasses.replace(INPAINTING, whole=0.25)
  mask_BHW1 = tasks.masks(config, jax.random.key(1), 800, (8, 8))
  whole = np.mean(np.asarray(mask_BHW1).min((1, 2, 3)) == 1.0)
  assert abs(whole - 0.25) < 0.06


def test_masks_do_not_hang_on_how_many_are_drawn():
  eight, five = (
    tasks.masks(INPAINTING, jax.random.key(2), count, (8, 8))
    for count in (8, 5)
  )
  np.testing.assert_array_equal(eight[:5], five)
  assert len(np.unique(np.asarray(eight), axis=0)) == 8
