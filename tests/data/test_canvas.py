# Shape suffixes: B batch, H height, W width, C channels.

import dataclasses

import numpy as np
import pytest

from flowjax.data import canvas
from flowjax.data import config as data_config
from flowjax.models import patches

CONFIG = data_config.DataConfig(
  buckets=((8, 8), (6, 10), (12, 4)), padded_patch=2
)


@pytest.mark.parametrize("size", CONFIG.buckets)
def test_a_canvas_is_the_patches_in_their_order(size):
  image_BHWC = np.random.default_rng(0).standard_normal((3, *size, 2))
  assert canvas.most_tokens(CONFIG) == 16
  laid = canvas.of({"image": image_BHWC, "label": np.arange(3)}, CONFIG)
  assert laid["image"].shape == (3, 32, 2, 2)
  rows, columns = size[0] // 2, size[1] // 2
  np.testing.assert_array_equal(laid["grid"], [[rows, columns]] * 3)
  assert laid["grid"].dtype == np.int32
  np.testing.assert_array_equal(laid["label"], np.arange(3))
  tokens = patches.patchify(laid["image"], 2)
  count = rows * columns
  np.testing.assert_array_equal(
    tokens[:, :count], patches.patchify(image_BHWC, 2)
  )
  assert not tokens[:, count:].any()


def test_what_is_as_large_as_an_image_is_laid_out_like_it():
  names = ("mean", "log_variance")
  batch = {name: np.full((2, 6, 10, 4), i) for i, name in enumerate(names)}
  laid = canvas.of(batch | {"text": np.ones((2, 6, 10))}, CONFIG)
  assert {laid[name].shape for name in names} == {(2, 32, 2, 4)}
  assert laid["text"].shape == (2, 6, 10)


def test_without_a_patch_batches_stay_as_they_are():
  plain = dataclasses.replace(CONFIG, padded_patch=0)
  batch = {"image": np.zeros((2, 6, 10, 1))}
  assert canvas.of(batch, plain) is batch
