"""From the bytes of an image file to float32 [H, W, C] in [-1, 1]."""

# Shape suffixes: H height, W width, C channels.

import dataclasses
import io
import re
import warnings
from typing import IO

import numpy as np

from flowjax import errors
from flowjax.data import config as config_lib
from flowjax.data import sources

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")
IMAGES = (".png", ".jpg", ".jpeg", ".webp")
LATENTS = (".npy",)
# A tag of Exif, and its values for an image that is stored on its side.
_ORIENTATION, _LYING = 0x0112, (5, 6, 7, 8)


class TooLarge(sources.Corrupt):
  """An image of more pixels than one wants to decode. The text has a remedy."""


@dataclasses.dataclass(frozen=True)
class Reader:
  """From bytes to what a config asks for: an image, or latents as they are.

  Images have 1 or 3 channels. Any other number is that of latents, [H, W, C]
  in one `.npy` array per image.
  """

  shape: tuple[int, int, int]
  max_pixels: int
  originals: bool = False

  @property
  def endings(self) -> tuple[str, ...]:
    """The endings, in small letters, of files that it reads."""
    return IMAGES if self.shape[-1] in (1, 3) else LATENTS

  def __call__(self, content: bytes, name: str) -> np.ndarray:
    if self.endings is LATENTS:
      return decode_array(content, shape=self.shape, name=name)
    height, width, channels = self.shape
    return decode(
      content,
      image_size=(height, width),
      channels=channels,
      max_pixels=self.max_pixels,
      name=name,
    )

  def cut(self, image_size: tuple[int, int]) -> "Reader":
    """Returns what reads the same images at another size."""
    return dataclasses.replace(self, shape=(*image_size, self.shape[-1]))

  def record(self, content: bytes, name: str) -> dict[str, np.ndarray]:
    """Returns the image and, with `originals`, what it was cut from."""
    found = {"image": self(content, name)}
    if self.originals and self.endings is IMAGES:
      found |= original(content, self.shape[:2])
    return found

  def blank(self) -> dict[str, np.ndarray]:
    """Returns such a record of zeros."""
    found: dict[str, np.ndarray] = {"image": np.zeros(self.shape, np.float32)}
    if self.originals and self.endings is IMAGES:
      found |= {key: np.zeros(2, np.int32) for key in ("size", "crop")}
    return found


def reader(config: config_lib.DataConfig) -> Reader:
  """Returns what reads the images of `config`; refuses to without Pillow."""
  made = Reader(
    (*config.image_size, config.channels), config.max_pixels, config.originals
  )
  if made.endings is IMAGES:
    _pillow()
  elif config.buckets:
    raise errors.UserError(
      f"config.data.buckets={config.buckets} and channels={config.channels}: "
      "latents in .npy files are of one size. `flowjax encode` puts images of "
      "1 or 3 channels into buckets, and makes their latents."
    )
  return made


def decode(
  content: bytes,
  *,
  image_size: tuple[int, int],
  channels: int,
  max_pixels: int,
  name: str,
) -> np.ndarray:
  """Decodes an image, turns it upright and cuts it to `image_size`.

  The short side is resized to fit and the long side cropped around the centre.
  What is transparent becomes white. Raises `sources.Corrupt` with `name`, and
  `TooLarge` where the header of an image claims more than `max_pixels`.
  """
  PIL = _pillow()
  if not content:
    raise sources.Corrupt(f"{name} is corrupt: it is empty.")
  try:
    with PIL.Image.open(io.BytesIO(content), formats=FORMATS) as image:
      # Only the header is read so far.
      if (count := image.width * image.height) > max_pixels:
        sides = f"{image.width}x{image.height} are "
        raise _too_large(name, f"{sides}{count:,} pixels", max_pixels)
      upright = PIL.ImageOps.exif_transpose(image)
      pixels = np.asarray(_cover(_opaque(upright, channels), image_size))
  except (MemoryError, TooLarge):
    raise  # The first says nothing about the image.
  except PIL.Image.DecompressionBombError as error:
    # Far above `max_pixels`, Pillow does not even say of which sides.
    count = re.search(r"\d+", str(error))
    it = f"it has {int(count[0]):,} pixels" if count else "its header says so"
    raise _too_large(name, it, max_pixels) from error
  # Decoders answer to broken bytes with errors of a dozen types.
  except Exception as error:
    raise sources.Corrupt(f"{name} is corrupt: {_reason(error)}.") from error
  image_HWC = pixels.astype(np.float32) / 127.5 - 1.0
  return image_HWC.reshape(*image_size, channels)


def original(
  content: bytes, image_size: tuple[int, int]
) -> dict[str, np.ndarray]:
  """Returns "size", height and width of an image, and "crop", how it is cut.

  That is how far from the top and from the left, in pixels of the image once
  its short side fits (arXiv:2307.01952, section 2.2). Only a header is read.
  """
  height, width = _upright(io.BytesIO(content))
  scale = min(height / image_size[0], width / image_size[1])
  crop = [
    round((side / scale - wanted) / 2)
    for side, wanted in zip((height, width), image_size, strict=True)
  ]
  return {
    "size": np.array([height, width], np.int32),
    "crop": np.array(crop, np.int32),
  }


def size(file: IO[bytes]) -> tuple[int, int] | None:
  """Returns the height and width of an image, upright, by its header.

  None for one that is broken, or empty.
  """
  try:
    return _upright(file)
  except MemoryError:
    raise  # It says nothing about the image.
  # As in `decode`; of the disk whoever opened the file has heard before.
  except Exception:
    return None


def _upright(file: IO[bytes]) -> tuple[int, int]:
  PIL = _pillow()
  with PIL.Image.open(file, formats=FORMATS) as image:
    # The method of the class: that of a PNG decodes all of it, to find Exif
    # behind the pixels.
    exif = PIL.Image.Image.getexif(image)
    lying = exif.get(_ORIENTATION, 1) in _LYING
    return image.size if lying else (image.height, image.width)


def decode_array(
  content: bytes, *, shape: tuple[int, int, int], name: str
) -> np.ndarray:
  """Reads a `.npy` array [H, W, C], such as the latents of an image.

  Raises `sources.Corrupt` with `name` if it is none, or has another shape: its
  header alone is read until that is known, as it may claim any size.
  """
  try:
    found, kind = _header(content)
    fits = found == shape and kind.kind in "fiu"
    array = np.load(io.BytesIO(content), allow_pickle=False) if fits else None
  except (ValueError, EOFError, OSError) as error:
    raise sources.Corrupt(f"{name} is corrupt: {_reason(error)}.") from error
  if array is None:
    raise sources.Corrupt(
      f"{name} has shape {found} of {kind}, and numbers of {shape} are asked "
      "for."
    )
  return array.astype(np.float32)


def _header(content: bytes) -> tuple[tuple[int, ...], np.dtype]:
  """Returns what a `.npy` array says of itself; raises ValueError for none."""
  file = io.BytesIO(content)
  if np.lib.format.read_magic(file) == (1, 0):
    shape, _, dtype = np.lib.format.read_array_header_1_0(file)
  else:
    shape, _, dtype = np.lib.format.read_array_header_2_0(file)
  return shape, dtype


def check_channels(channels: int) -> None:
  """Refuses, before anything is read, what image files cannot give."""
  _pillow()
  if channels not in (1, 3):
    raise errors.UserError(
      f"channels={channels} does not suit image files: 1 for grey, 3 for RGB."
    )


def _opaque(image, channels: int):
  PIL = _pillow()
  if image.mode.startswith("I"):  # 16 bits a pixel; `convert` would clip them.
    image = PIL.Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
  if image.has_transparency_data:
    image = image.convert("RGBA")
    white = PIL.Image.new("RGBA", image.size, "white")
    image = PIL.Image.alpha_composite(white, image)
  return image.convert("L" if channels == 1 else "RGB")


def _cover(image, image_size: tuple[int, int]):
  """Resizes the largest centred box that has the proportions asked for."""
  height, width = image_size
  scale = min(image.height / height, image.width / width)
  left = (image.width - width * scale) / 2
  top = (image.height - height * scale) / 2
  box = (left, top, left + width * scale, top + height * scale)
  bicubic = _pillow().Image.Resampling.BICUBIC
  return image.resize((width, height), bicubic, box=box)


def _too_large(name: str, it: str, max_pixels: int) -> TooLarge:
  return TooLarge(
    f"{name} is too large: {it}, more than config.data.max_pixels="
    f"{max_pixels:,}. Make it smaller."
  )


def _reason(error: Exception) -> str:
  if type(error).__name__ == "UnidentifiedImageError":
    return "its bytes are none of " + ", ".join(FORMATS)
  return str(error).rstrip(".") or type(error).__name__


def _pillow():
  try:
    import PIL.Image
    import PIL.ImageOps
  except ImportError as error:
    raise errors.UserError(
      "Image files need pillow, which is not installed: pip install pillow"
    ) from error
  # How large is too large, config.data.max_pixels says.
  kind = PIL.Image.DecompressionBombWarning
  if not any(each[2] is kind for each in warnings.filters):
    warnings.simplefilter("ignore", kind)
  return PIL
