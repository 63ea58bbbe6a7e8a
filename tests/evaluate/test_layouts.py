"""What is said of pictures and the boxes that they were to obey."""

import numpy as np
import pytest

from flowjax.evaluate import layouts, scenes

ASKED = [
  layouts.Asked(3, "red", (0.0, 0.0, 0.5, 0.25)),
  layouts.Asked(7, "blue", (0.5, 0.5, 1.0, 1.0)),
]


def tight(inked_HW):
  rows, columns = (np.flatnonzero(inked_HW.any(axis=a)) for a in (1, 0))
  sides = rows[0], columns[0], rows[-1] + 1, columns[-1] + 1
  return ("", *(side / 16 for side in sides))


def picture(*boxes):
  image_HWC = np.full((16, 16, 3), -1.0, np.float32)
  for top, left, bottom, right in boxes:
    image_HWC[top:bottom, left:right] = 1.0
  return image_HWC


def score(seen, *boxes):
  found = [scenes.Seen(*each) for each in seen]
  return layouts.agreement(
    [ASKED], [found], picture(*boxes)[None], tight=tight, inked=0.25
  )


def test_what_is_in_its_box_is_counted():
  there = [(3, "red", 4, 2), (7, "blue", 12, 12)]
  boxes = [(0, 0, 8, 4), (8, 8, 16, 16)]
  right = {"digits": 1.0, "colours": 1.0, "both": 1.0, "iou": 1.0}
  assert score(there, *boxes) == right
  # Another digit, another colour, and one thing more.
  assert score([(8, "red", 4, 2), there[1]], *boxes)["digits"] == 0.5
  assert score([(3, "green", 4, 2), there[1]], *boxes)["both"] == 0.5
  assert score([*there, (1, "red", 4, 14)], *boxes)["both"] == 2 / 3
  # What is elsewhere, and nothing at all.
  far = [(3, "red", 4, 12), there[1]]
  assert score(far, *boxes)["both"] == 0.5
  assert score([], boxes[1]) == {
    "digits": 0.0, "colours": 0.0, "both": 0.0, "iou": 0.5,
  }  # fmt: skip


@pytest.mark.parametrize(
  ("other", "wanted"),
  [
    ((0.0, 0.0, 1.0, 1.0), 1.0),
    ((0.0, 0.0, 0.5, 1.0), 0.5),
    ((0.5, 0.5, 1.5, 1.5), 0.25 / 1.75),
    ((0.0, 1.0, 1.0, 2.0), 0.0),
  ],
)
def test_overlap_is_the_intersection_over_the_union(other, wanted):
  square = (0.0, 0.0, 1.0, 1.0)
  assert layouts.overlap(square, other) == pytest.approx(wanted)
  assert layouts.overlap(other, square) == pytest.approx(wanted)
