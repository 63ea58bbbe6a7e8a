"""Layouts: what is in which box of an image, as arrays that batches have."""

# Shape suffixes: N boxes.

import dataclasses
import functools
import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from flowjax import schema
from flowjax.data import config as config_lib

# (name, top, left, bottom, right), the sides from 0 to 1.
Box = Sequence[Any]


@dataclasses.dataclass(frozen=True)
class Layout:
  """Makes of boxes "boxes" [N, 5], (class, sides), and "box_mask" [N]."""

  most: int
  names: tuple[str, ...]

  @property
  def blank(self) -> dict[str, np.ndarray]:
    return self.arrays([])

  @functools.cached_property
  def _classes(self) -> dict[str, int]:
    return {name: number for number, name in enumerate(self.names)}

  def arrays(self, boxes: Sequence[Box]) -> dict[str, np.ndarray]:
    """Returns boxes as arrays; raises ValueError for one that cannot be."""
    if len(boxes) > self.most:
      raise ValueError(
        f"{len(boxes)} boxes are more than config.data.boxes={self.most}."
      )
    box_N5 = np.zeros((self.most, 5), np.float32)
    for row, (name, *sides) in zip(box_N5, boxes, strict=False):
      if name not in self._classes:
        raise ValueError(
          f"a box has {name!r} in it, which is none of config.data.box_names. "
          f"{schema.closest(str(name), self.names)}"
        )
      row[:] = self._classes[name], *_sound(name, sides)
    return {"boxes": box_N5, "box_mask": np.arange(self.most) < len(boxes)}

  def boxes(self, box_N5: np.ndarray, mask_N: np.ndarray) -> list[tuple]:
    """Returns what `arrays` was given."""
    return [
      (self.names[int(number)], *map(float, sides))
      for number, *sides in box_N5[np.asarray(mask_N, bool)]
    ]

  def fingerprint(self) -> dict[str, Any]:
    names = hashlib.blake2b("\n".join(self.names).encode(), digest_size=8)
    return {"most": self.most, "names": names.hexdigest()}


def parse(content: Any) -> list[Box]:
  """Returns the boxes that a list of JSON says; raises ValueError without.

  Each is {"class": name, "box": [top, left, bottom, right]}.
  """
  if not isinstance(content, list):
    raise ValueError(f"boxes are a list, not {str(content)[:80]!r}.")
  found = []
  for each in content:
    sides = each.get("box") if isinstance(each, dict) else None
    if not isinstance(sides, list) or not isinstance(each.get("class"), str):
      raise ValueError(
        f"a box is {{'class': name, 'box': [top, left, bottom, right]}}, not "
        f"{str(each)[:80]!r}."
      )
    found.append((each["class"], *sides))
  return found


def of(config: config_lib.DataConfig) -> Layout | None:
  """Returns what makes arrays of boxes, if the config asks for any."""
  return Layout(config.boxes, config.box_names) if config.boxes else None


def _sound(name: str, sides: Sequence[Any]) -> tuple[float, ...]:
  """Returns the four sides of a box; raises ValueError where there are none."""
  wanted = "top, left, bottom and right, from 0 to 1"
  numbers = [s for s in sides if isinstance(s, int | float) and s == s]
  if len(sides) != 4 or len(numbers) != 4:
    raise ValueError(f"the box of {name!r} is {sides}; it must be {wanted}.")
  top, left, bottom, right = numbers
  if not (0.0 <= top < bottom <= 1.0 and 0.0 <= left < right <= 1.0):
    raise ValueError(
      f"the box of {name!r} is {sides}; it must be {wanted}, the top above the "
      "bottom, and left before right."
    )
  return top, left, bottom, right
