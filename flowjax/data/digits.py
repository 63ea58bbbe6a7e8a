"""The handwritten digits that come with scikit-learn: 1,797 of 8x8 pixels."""

# Shape suffixes: B batch, N records, H height, W width, C channels; I and J
# are the rows and columns of the stored 8x8 images.

import dataclasses
import hashlib
import importlib.util
import pathlib
from typing import Any

import numpy as np

from flowjax import errors
from flowjax.data import config as config_lib

SIDE = 8


@dataclasses.dataclass(frozen=True)
class Digits:
  """One split of the digits, held in memory."""

  image_NHWC: np.ndarray
  label_N: np.ndarray
  hash: str  # Of the stored pixels: enlarged ones differ by processor.
  name: str = "digits"
  class_names: tuple[str, ...] = tuple("0123456789")

  @property
  def num_classes(self) -> int:
    return len(self.class_names)

  @property
  def shape(self) -> tuple[int, int, int]:
    return self.image_NHWC.shape[1:]

  def __len__(self) -> int:
    return len(self.label_N)

  def __getitem__(self, i: int) -> dict[str, np.ndarray]:
    return {"image": self.image_NHWC[i], "label": self.label_N[i]}

  def gather(self, records_B: np.ndarray) -> dict[str, np.ndarray]:
    return self[records_B]  # type: ignore[index]

  def fingerprint(self) -> dict[str, Any]:
    return {
      "records": len(self),
      "classes": list(self.class_names),
      "hash": self.hash,
    }


def open(config: config_lib.DataConfig, split: str) -> Digits:
  """Returns the digits of `split`, enlarged to the size that is asked for."""
  if any(side % SIDE for side in config.image_size):
    raise errors.UserError(
      f"image_size={config.image_size} does not suit digits, which are 8x8: "
      "take multiples of 8."
    )
  if config.channels not in (1, 3):
    raise errors.UserError(
      f"channels={config.channels} does not suit digits: 1 for grey, or 3."
    )
  image_NIJ, label_N = load()
  held_N = held_out(image_NIJ, label_N, config.held_out)
  keep_N = held_N if split == "held_out" else ~held_N
  if wanted := config.source.partition(":")[2]:
    keep_N = keep_N & np.isin(label_N, _classes(wanted))
  if not keep_N.any():
    raise errors.UserError(
      f"held_out={config.held_out} leaves the split {split!r} of digits empty: "
      "config.data.held_out=0.2 holds out every fifth."
    )
  image_NHW = enlarged(image_NIJ[keep_N], config.image_size)
  image_NHWC = np.repeat(image_NHW[..., None], config.channels, axis=-1)
  return Digits(
    image_NHWC, label_N[keep_N], hash_of(image_NIJ[keep_N], label_N[keep_N])
  )


def _classes(text: str) -> list[int]:
  """Reads the classes of a source such as digits:0,1,2."""
  words = text.split(",")
  if not all(len(word) == 1 and word in "0123456789" for word in words):
    raise errors.UserError(
      f"digits:{text} names classes that there are not: 0 to 9, with commas, "
      "as digits:0,1,2."
    )
  return [int(word) for word in words]


def held_out(
  image_NIJ: np.ndarray, label_N: np.ndarray, fraction: float
) -> np.ndarray:
  """Marks `fraction` of each class, whatever the seed of a run.

  Within a class the images are ordered by a hash of their pixels, so that the
  choice depends neither on a random generator nor on the order on disk.
  """
  keys = [
    hashlib.blake2b(image.tobytes(), digest_size=8).digest()
    for image in image_NIJ.astype(np.uint8)
  ]
  held_N = np.zeros(len(label_N), bool)
  for label in np.unique(label_N):
    members = sorted(np.flatnonzero(label_N == label), key=keys.__getitem__)
    held_N[members[: round(fraction * len(members))]] = True
  return held_N


def load() -> tuple[np.ndarray, np.ndarray]:
  """Returns all images [N, 8, 8] in [-1, 1], and their labels."""
  # Its file is read: to import scikit-learn takes longer than all the rest.
  found = importlib.util.find_spec("sklearn")
  if found is None or not found.submodule_search_locations:
    raise errors.UserError(
      "The source 'digits' needs scikit-learn, which is not installed: "
      "pip install -e '.[demo]'"
    )
  folder = pathlib.Path(found.submodule_search_locations[0])
  rows = np.loadtxt(folder / "datasets/data/digits.csv.gz", delimiter=",")
  pixels, label_N = rows[:, :-1], rows[:, -1].astype(np.int32)
  image_NIJ = pixels.reshape(-1, SIDE, SIDE).astype(np.float32) / 8.0 - 1.0
  return image_NIJ, label_N  # Stored as 0..16.


def hash_of(image_NIJ: np.ndarray, label_N: np.ndarray) -> str:
  """Returns what tells these digits from others."""
  content = hashlib.blake2b(image_NIJ.tobytes(), digest_size=8)
  content.update(label_N.tobytes())
  return content.hexdigest()


def enlarged(image_NIJ: np.ndarray, size: tuple[int, int]) -> np.ndarray:
  """Returns the images [N, H, W], linear between their pixels."""
  if size == (SIDE, SIDE):
    return image_NIJ
  rows_HI, columns_WJ = _linear(size[0]), _linear(size[1])
  image_NHW = rows_HI @ image_NIJ @ columns_WJ.T
  return np.clip(image_NHW, -1.0, 1.0)


def _linear(size: int) -> np.ndarray:
  """Returns the [size, 8] matrix of linear interpolation between centres."""
  centre = np.clip((np.arange(size) + 0.5) * SIDE / size - 0.5, 0, SIDE - 1)
  distance = np.abs(centre[:, None] - np.arange(SIDE)[None, :])
  return np.maximum(0.0, 1.0 - distance).astype(np.float32)
