"""Whether a picture has in each box of a layout what was asked for there."""

# Shape suffixes: H height, W width, C channels.

import collections.abc
import dataclasses
from typing import Any

import numpy as np

from flowjax.evaluate import scenes

# How far, in pixels, the middle of a thing may be from that of its box; and how
# far, in height and width, pixels around a box are looked at.
NEAR, AROUND = 6.0, 10.0

# tight(inked_HW) -> the box around what is marked, sides from 0 to 1.
Tight = collections.abc.Callable[[np.ndarray], Any]


@dataclasses.dataclass(frozen=True)
class Asked:
  """A digit in a colour, and the sides of its box, from 0 to 1."""

  digit: int
  colour: str
  sides: tuple[float, float, float, float]  # top, left, bottom, right

  def middle(self, size: tuple[int, int]) -> np.ndarray:
    """Returns row and column of the middle, in pixels."""
    top, left, bottom, right = self.sides
    return np.array([top + bottom, left + right]) / 2 * size


def agreement(
  layouts: collections.abc.Sequence[collections.abc.Sequence[Asked]],
  seen: collections.abc.Sequence[list[scenes.Seen]],
  images_BHWC: np.ndarray,
  *,
  tight: Tight,
  inked: float,
) -> dict[str, float]:
  """Says how much of what was asked for is in its box, and nothing else.

  `digits`, `colours` and `both` are, averaged over pictures, the share of boxes
  in which such a thing is seen, of their number or that of the things seen,
  whichever is larger. `iou` is the intersection over union of each box with the
  smallest one around the ink that is nearer to it than to the others.
  """
  shares: dict[str, list] = {"digits": [], "colours": [], "both": []}
  overlaps = []
  for asked, found, image_HWC in zip(layouts, seen, images_BHWC, strict=True):
    middles = [box.middle(image_HWC.shape[:2]) for box in asked]
    most, right = max(len(asked), len(found)), np.zeros(3)
    for box, middle in zip(asked, middles, strict=True):
      thing = _nearest(middle, found)
      if thing is not None:
        digit, colour = thing.digit == box.digit, thing.colour == box.colour
        right += digit, colour, digit and colour
    for share, count in zip(shares.values(), right, strict=True):
      share.append(count / most)
    ink_HW = (image_HWC.max(axis=-1) + 1.0) / 2.0
    for i, box in enumerate(asked):
      inked_HW = (ink_HW >= inked) & _around(i, middles, ink_HW.shape)
      if not inked_HW.any():
        overlaps.append(0.0)
        continue
      _, *sides = tight(inked_HW)
      overlaps.append(overlap(box.sides, sides))
  return {
    **{key: float(np.mean(share)) for key, share in shares.items()},
    "iou": float(np.mean(overlaps)),
  }


def overlap(
  one: collections.abc.Sequence[float], other: collections.abc.Sequence[float]
) -> float:
  """Returns the intersection over union of two boxes."""
  (top, left), (bottom, right) = (
    choose(ours, theirs)
    for choose, ours, theirs in (
      (np.maximum, one[:2], other[:2]),
      (np.minimum, one[2:], other[2:]),
    )
  )
  shared = max(0.0, bottom - top) * max(0.0, right - left)
  areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (one, other)]
  return float(shared / (sum(areas) - shared))


def _nearest(
  middle: np.ndarray, found: list[scenes.Seen]
) -> scenes.Seen | None:
  """Returns the thing that is nearest to a place, if it is near."""
  away = [
    float(np.max(np.abs(middle - (thing.row, thing.column)))) for thing in found
  ]
  if not away or min(away) > NEAR:
    return None
  return found[int(np.argmin(away))]


def _around(
  i: int, middles: list[np.ndarray], size: tuple[int, ...]
) -> np.ndarray:
  """Marks the pixels around a box that are nearer to it than to the others."""
  place_HW2 = np.moveaxis(np.indices(size), 0, -1) + 0.5
  away = [np.abs(place_HW2 - middle) for middle in middles]
  square = [np.sum(np.square(each_HW2), axis=-1) for each_HW2 in away]
  mine_HW = np.argmin(square, axis=0) == i
  return mine_HW & (np.max(away[i], axis=-1) <= AROUND)
