"""Two sources of images, for a flow from the one to the other."""

import dataclasses
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Paired:
  """The records of `first`, each with an image of `other` as "source".

  Record i has record i of the other, over and over. While training the two are
  drawn apart, each in an order of its own (`data/loader.py`), so that every
  image meets every other.
  """

  first: Any
  other: Any
  name: str
  class_names: tuple[str, ...]
  num_classes: int
  shape: tuple[int, int, int]

  def __len__(self) -> int:
    return len(self.first)

  def __getitem__(self, i: int) -> dict[str, np.ndarray]:
    image_HWC = self.other[i % len(self.other)]["image"]
    return {**self.first[i], "source": image_HWC}

  def fingerprint(self) -> dict[str, Any]:
    """Returns what both hang on, as JSON can hold it."""
    return {**self.first.fingerprint(), "pair": self.other.fingerprint()}


def paired(first: Any, other: Any) -> Paired:
  """Pairs two sources of images of one shape."""
  name = f"{first.name} from {other.name}"
  return Paired(
    first, other, name, first.class_names, first.num_classes, first.shape
  )
