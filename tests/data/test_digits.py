import numpy as np
import pytest

from flowjax import errors
from flowjax.data import config as config_lib
from flowjax.data import digits, loader, sources


def test_the_digits_are_all_there_once_and_in_range():
  config = config_lib.DataConfig()
  train = sources.open(config, "train")
  held = sources.open(config, "held_out")

  assert len(train) + len(held) == 1797
  example = train[3]
  assert example["image"].shape == (8, 8, 1)
  assert example["image"].dtype == np.float32
  assert example["label"].dtype == np.int32
  assert train.image_NHWC.min() == -1.0 and train.image_NHWC.max() == 1.0


def test_no_image_is_in_both_splits():
  config = config_lib.DataConfig()
  train = sources.open(config, "train")
  held = sources.open(config, "held_out")

  seen = {image.tobytes() for image in train.image_NHWC}
  assert len(seen) == len(train)
  assert not seen & {image.tobytes() for image in held.image_NHWC}


def test_each_class_is_held_out_in_the_same_part():
  config = config_lib.DataConfig(held_out=0.2)
  train = sources.open(config, "train")
  held = sources.open(config, "held_out")

  in_train = np.bincount(train.label_N)
  in_held = np.bincount(held.label_N)
  np.testing.assert_allclose(in_held / (in_train + in_held), 0.2, atol=0.003)


def test_the_split_knows_no_seed():
  one = sources.open(config_lib.DataConfig(shuffle_seed=1), "held_out")
  two = sources.open(config_lib.DataConfig(shuffle_seed=2), "held_out")
  assert one.fingerprint() == two.fingerprint()
  train = sources.open(config_lib.DataConfig(), "train")
  assert train.fingerprint()["hash"] != one.fingerprint()["hash"]


def test_enlarged_digits_keep_their_mean_and_range():
  small = sources.open(config_lib.DataConfig(), "held_out").image_NHWC
  config = config_lib.DataConfig(image_size=(16, 24), channels=3)
  large = sources.open(config, "held_out").image_NHWC

  assert large.shape == (len(small), 16, 24, 3)
  assert large.min() >= -1.0 and large.max() <= 1.0
  np.testing.assert_array_equal(large[..., 0], large[..., 2])
  difference = np.abs(small.mean((1, 2, 3)) - large.mean((1, 2, 3)))
  assert difference.max() < 0.05


def test_enlarging_shifts_nothing():
  """From centre to centre, it commutes with turning an image round."""
  image_NIJ, _ = digits.load()
  large_NHW = digits.enlarged(image_NIJ[:20], (16, 24))
  turned_NHW = digits.enlarged(image_NIJ[:20, ::-1, ::-1], (16, 24))
  np.testing.assert_allclose(turned_NHW[:, ::-1, ::-1], large_NHW, atol=1e-6)


@pytest.mark.parametrize("size", [(12, 8), (8, 9), (4, 4)])
def test_a_size_that_is_no_multiple_is_refused(size):
  config = config_lib.DataConfig(image_size=size)
  with pytest.raises(errors.UserError, match="multiples of 8"):
    sources.open(config, "train")


def test_an_empty_split_is_refused():
  config = config_lib.DataConfig(held_out=0.0)
  assert len(sources.open(config, "train")) == 1797
  with pytest.raises(errors.UserError, match="held_out=0.0"):
    sources.open(config, "held_out")


def test_digits_alone_come_in_the_same_order():
  config = config_lib.DataConfig(images_alone=True, batch_size=6)
  told = config_lib.DataConfig(batch_size=6)
  batches = [
    next(loader.batches(sources.open(c, "train"), c)) for c in (config, told)
  ]
  assert set(batches[0]) == {"image"} and "label" in batches[1]
  np.testing.assert_array_equal(batches[0]["image"], batches[1]["image"])


@pytest.mark.parametrize(
  "told",
  [{"images_alone": True}, {"templates": ("a {}",), "tokenizer": "bytes"}],
)
def test_a_judge_has_the_labels_whatever_a_network_is_told(told):
  plain = sources.labelled(config_lib.DataConfig(), "held_out")
  found = sources.labelled(config_lib.DataConfig(**told), "held_out")
  for one, other in zip(plain, found, strict=True):
    np.testing.assert_array_equal(one, other)
