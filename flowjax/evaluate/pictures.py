"""Pictures of images: sheets of samples, as PNG files."""

# Shape suffixes: N images, H height, W width, C channels.

import collections.abc
import os
import pathlib
import textwrap

import numpy as np

from flowjax import errors

PAPER, INK, OUTLINE = 255, 40, (128, 128, 128)
GAP = 2
TEXT_HEIGHT, LETTER_WIDTH = 14, 7
CAPTION_WIDTH = 160
# What a PNG says of who made it.
MADE = ("Software", "FlowJAX")


def to_uint8(images: np.ndarray) -> np.ndarray:
  """Returns images as a PNG stores them: [-1, 1] is clipped to 0..255."""
  images = np.asarray(images)
  if images.dtype == np.uint8:
    return images
  # What is not a number is shown as the middle grey.
  clipped = np.clip(np.nan_to_num(images, nan=0.0), -1.0, 1.0)
  return np.round((clipped + 1.0) * 127.5).astype(np.uint8)


def grid(
  images_NHWC: np.ndarray,
  *,
  columns: int = 10,
  scale: int | None = None,
  labels: collections.abc.Sequence[str] | None = None,
  row_titles: collections.abc.Sequence[str] | None = None,
) -> np.ndarray:
  """Returns one uint8 RGB image [H, W, 3] of many, in rows of `columns`.

  Fewer images than that are one row, as wide as they are. Images are float in
  [-1, 1] or uint8. Of more than three channels the first three are shown, of
  two the first. Each pixel becomes `scale` by `scale`, by default as large as
  makes the shorter side 32. `labels` stand under their images, a line or more,
  and `row_titles` on the left of their rows.
  """
  if images_NHWC.ndim != 4 or not len(images_NHWC):
    raise ValueError(
      f"A grid is made of images [N, H, W, C], not {images_NHWC.shape}."
    )
  columns = min(columns, len(images_NHWC))
  tiles_NHWC = _rgb(to_uint8(images_NHWC))
  side = min(tiles_NHWC.shape[1:3])
  scale = scale or max(1, -(-32 // side))
  tiles_NHWC = tiles_NHWC.repeat(scale, axis=1).repeat(scale, axis=2)
  lines = max(label.count("\n") for label in labels) + 1 if labels else 0
  below = lines * TEXT_HEIGHT or GAP
  tiles_NHWC = np.pad(
    tiles_NHWC,
    ((0, -len(tiles_NHWC) % columns), (GAP, below), (GAP, GAP), (0, 0)),
    constant_values=PAPER,
  )
  for tile_HWC, label in zip(tiles_NHWC, labels or (), strict=False):
    tile_HWC[-below:] = _text(label, below, tile_HWC.shape[1], centred=True)
  rows, (height, width) = len(tiles_NHWC) // columns, tiles_NHWC.shape[1:3]
  sheet_HWC = (
    tiles_NHWC.reshape(rows, columns, height, width, 3)
    .transpose(0, 2, 1, 3, 4)
    .reshape(rows * height, columns * width, 3)
  )
  if not row_titles:
    return sheet_HWC
  margin = max(map(len, row_titles)) * LETTER_WIDTH + 2 * GAP
  titles = [*row_titles, *[""] * (rows - len(row_titles))]
  left = [_text(title, height, margin) for title in titles]
  return np.concatenate([np.concatenate(left), sheet_HWC], axis=1)


def captioned(
  images_NHWC: np.ndarray,
  captions: collections.abc.Sequence[str],
  *,
  columns: int = 8,
) -> np.ndarray:
  """Returns a grid of images that are wide enough for captions beneath."""
  width = images_NHWC.shape[2]
  scale = max(1, -(-CAPTION_WIDTH // width))
  letters = scale * width // LETTER_WIDTH
  wrapped = [textwrap.fill(caption, letters) for caption in captions]
  return grid(images_NHWC, columns=columns, scale=scale, labels=wrapped)


def sheet(
  images_NHWC: np.ndarray,
  captions: collections.abc.Sequence[str] = (),
  *,
  beside: collections.abc.Sequence[np.ndarray] = (),
) -> np.ndarray:
  """Returns a grid of images, with captions beneath if there are any.

  What stands `beside` each, other images of its size, is on its left.
  """
  columns = 10
  if beside:
    gap_NHWC = np.ones_like(images_NHWC[:, :, :1])
    row = [part for other in beside for part in (other, gap_NHWC)]
    end = [gap_NHWC, gap_NHWC]  # So that one sees what belongs together.
    images_NHWC = np.concatenate([*row, images_NHWC, *end], axis=2)
    columns = max(1, columns // (len(beside) + 1))
  if captions:
    return captioned(images_NHWC, captions, columns=min(columns, 8))
  return grid(images_NHWC, columns=columns)


def boxed(
  images_NHWC: np.ndarray,
  boxes: collections.abc.Sequence[collections.abc.Sequence],
  *,
  scale: int | None = None,
) -> np.ndarray:
  """Returns uint8 RGB images on which boxes are outlined, each pixel larger.

  A box is (top, left, bottom, right), from 0 to 1. Its line is one pixel of the
  larger image, so that nothing of the smaller one is hidden.
  """
  from PIL import Image, ImageDraw

  scale = scale or max(1, -(-CAPTION_WIDTH // images_NHWC.shape[2]))
  large_NHWC = _rgb(to_uint8(images_NHWC))
  large_NHWC = large_NHWC.repeat(scale, axis=1).repeat(scale, axis=2)
  height, width = large_NHWC.shape[1:3]
  found = []
  for image_HWC, of_image in zip(large_NHWC, boxes, strict=True):
    image = Image.fromarray(image_HWC)
    for top, left, bottom, right in of_image:
      ImageDraw.Draw(image).rectangle(
        (left * width, top * height, right * width - 1, bottom * height - 1),
        outline=OUTLINE,
      )
    found.append(np.asarray(image))
  return np.stack(found)


def pairs(
  above_NHWC: np.ndarray, below_NHWC: np.ndarray, *, columns: int = 10
) -> np.ndarray:
  """Returns a grid of the images of two arrays: a row of each, in turn."""
  columns = min(columns, len(above_NHWC))
  missing = -len(above_NHWC) % columns
  blank = np.full((missing, *above_NHWC.shape[1:]), -1.0)
  rows = [
    np.concatenate([images, blank]).reshape(-1, columns, *above_NHWC.shape[1:])
    for images in (above_NHWC, below_NHWC)
  ]
  both = np.concatenate(rows, axis=1)
  return grid(both.reshape(-1, *above_NHWC.shape[1:]), columns=columns)


def save_png(image_HWC: np.ndarray, path: pathlib.Path | str) -> None:
  """Writes a picture; whoever looks sees the old file or the whole new one."""
  from PIL import Image, PngImagePlugin

  path = pathlib.Path(path)
  about = PngImagePlugin.PngInfo()
  about.add_text(*MADE)
  temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
  image_HWC = to_uint8(image_HWC)
  if image_HWC.shape[-1] == 1:
    image_HWC = image_HWC[..., 0]
  Image.fromarray(image_HWC).save(temporary, format="PNG", pnginfo=about)
  os.replace(temporary, path)


def require_own(path: pathlib.Path, flag: str) -> None:
  """Raises UserError where a file that `save_png` did not make would be lost.

  `flag` is what asks for the place.
  """
  from PIL import Image

  if not path.exists():
    return
  key, value = MADE
  try:
    with Image.open(path) as image:
      own = image.info.get(key) == value
  except OSError:  # It is no picture at all.
    own = False
  if not own:
    raise errors.UserError(
      f"{flag}={path} is there already, and is not of FlowJAX's making. Name "
      "another file, or move that one away."
    )


def _rgb(images_NHWC: np.ndarray) -> np.ndarray:
  if images_NHWC.shape[-1] < 3:
    return np.repeat(images_NHWC[..., :1], 3, axis=-1)
  return images_NHWC[..., :3]


def _text(
  text: str, height: int, width: int, centred: bool = False
) -> np.ndarray:
  """Returns a uint8 RGB image of a text."""
  from PIL import Image, ImageDraw

  image = Image.new("RGB", (width, height), (PAPER,) * 3)
  at, anchor = ((width // 2, height // 2), "mm")
  if not centred:
    at, anchor = ((GAP, height // 2), "lm")
  ImageDraw.Draw(image).text(
    at, text, fill=(INK,) * 3, anchor=anchor, align="center"
  )
  return np.asarray(image)
