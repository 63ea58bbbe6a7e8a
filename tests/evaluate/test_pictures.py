"""Sheets of images: every pixel where it belongs, and a PNG that holds it."""

import numpy as np
import pytest
from PIL import Image

from flowjax.evaluate import pictures


def test_floats_become_bytes_as_a_png_stores_them():
  x = np.array([-9.0, -1.0, -0.5, 0.0, 1.0, 7.0, np.nan])
  assert pictures.to_uint8(x).tolist() == [0, 0, 64, 128, 255, 255, 128]
  same = np.arange(7, dtype=np.uint8)
  assert pictures.to_uint8(same) is same


def test_a_grid_is_read_row_by_row():
  # Image i is all i; 5 of them in 3 columns, the sixth place is paper.
  images = np.broadcast_to(
    np.arange(5, dtype=np.uint8)[:, None, None, None], (5, 4, 6, 1)
  )
  sheet = pictures.grid(images, columns=3, scale=2)
  height, width = 4 * 2 + 4, 6 * 2 + 4
  assert sheet.shape == (2 * height, 3 * width, 3) and sheet.dtype == np.uint8
  for i in range(6):
    top, left = (i // 3) * height, (i % 3) * width
    tile = sheet[top : top + height, left : left + width]
    inside = tile[2:-2, 2:-2]
    assert (inside == (i if i < 5 else 255)).all()
    outside = tile.astype(int).sum() - inside.astype(int).sum()
    assert outside == 255 * 3 * (height * width - 4 * 2 * 6 * 2)


def test_small_images_are_enlarged_by_whole_pixels():
  image = np.array([[[-1.0], [1.0]], [[0.0], [-1.0]]])[None]
  sheet = pictures.grid(image, columns=1)[2:-2, 2:-2, 0]
  assert sheet.shape == (32, 32)
  for (row, column), value in {(0, 0): 0, (0, 1): 255, (1, 0): 128}.items():
    part = sheet[16 * row : 16 * row + 16, 16 * column : 16 * column + 16]
    assert (part == value).all()
  # One that is large enough stays as it is.
  assert pictures.grid(np.zeros((1, 64, 64, 3))).shape[0] == 64 + 4


def test_a_grid_of_few_images_is_as_wide_as_they_are():
  images = np.zeros((3, 32, 32, 1))
  assert pictures.grid(images).shape == (36, 3 * 36, 3)
  beside = pictures.sheet(images[:1], beside=[images[:1]])
  assert beside.shape == (36, 2 * 32 + 3 + 4, 3)


def test_pairs_are_below_each_other():
  above, below = np.full((2, 3, 32, 32, 1), -1.0)
  below[1] = 1.0
  tiles = pictures.pairs(above, below)[..., 0].reshape(2, 36, 3, 36)
  assert tiles[:, 18, :, 18].tolist() == [[0, 0, 0], [0, 255, 0]]
  tiles = pictures.pairs(above, below, columns=2)[..., 0].reshape(4, 36, 2, 36)
  assert tiles[1, 18, :, 18].tolist() == [0, 255]
  assert tiles[3, 18, 0, 18] == 0


@pytest.mark.parametrize("channels, seen", [(1, 0), (2, 0), (3, 1), (4, 1)])
def test_channels(channels, seen):
  """The second channel is green where there are colours."""
  image = -np.ones((1, 32, 32, channels))
  image[..., min(seen, channels - 1)] = 1.0
  pixel = pictures.grid(image, columns=1)[16, 16]
  assert pixel.tolist() == ([0, 255, 0] if channels > 2 else [255] * 3)


def test_labels_and_row_titles_are_written():
  images = np.ones((4, 32, 32, 1))
  plain = pictures.grid(images, columns=2)
  labelled = pictures.grid(images, columns=2, labels=["a", "", "", "b"])
  titled = pictures.grid(images, columns=2, row_titles=["guided", "unguided"])
  assert plain.min() == 255  # White images on paper.
  assert labelled.shape[0] > plain.shape[0]
  tile = labelled.shape[0] // 2
  ink = labelled.min(axis=2) < 128
  assert ink[:tile, :36].any() and ink[tile:, 36:].any()
  assert not ink[:tile, 36:].any() and not ink[tile:, :36].any()
  assert titled.shape[0] == plain.shape[0] and titled.shape[1] > plain.shape[1]
  margin = titled.shape[1] - plain.shape[1]
  assert (titled[:, :margin].min(axis=2) < 128).any()
  np.testing.assert_array_equal(titled[:, margin:], plain)


@pytest.mark.parametrize("shape", [(0, 8, 8, 1), (8, 8, 1)])
def test_what_is_no_batch_of_images_is_refused(shape):
  with pytest.raises(ValueError, match="images"):
    pictures.grid(np.zeros(shape))


@pytest.mark.parametrize("channels", [1, 3])
def test_a_png_holds_the_picture(tmp_path, channels):
  image = np.random.default_rng(0).integers(0, 256, (5, 7, channels), np.uint8)
  path = tmp_path / "picture.png"
  path.write_bytes(b"an old file, to be replaced")
  pictures.save_png(image, path)
  found = np.asarray(Image.open(path)).reshape(image.shape)
  np.testing.assert_array_equal(found, image)
  assert list(tmp_path.iterdir()) == [path]
