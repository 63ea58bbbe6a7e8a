"""The judge of scenes: it sees what is there, and counts what was asked for."""

import dataclasses

import numpy as np
import pytest

from flowjax.data import config as data_config
from flowjax.data import scenes
from flowjax.evaluate import scenes as judges

SCENES = data_config.DataConfig(
  source="scenes", image_size=(32, 32), channels=3
)


@pytest.mark.slow
def test_a_detector_learns_to_see_what_is_in_real_scenes():
  source = scenes.of_digits(SCENES, "train", "all", length=2**20)

  def batches(step):
    drawn = [source.scene(24 * step + i) for i in range(24)]
    images = np.stack([source.painted(scene) for scene in drawn])
    return images, [scene.things for scene in drawn]

  judge = judges.fit(batches, colours=tuple(scenes.COLOURS), seed=0, steps=60)
  asked = [source.scene(10**6 + i) for i in range(50)]
  seen = judge.see(np.stack([source.painted(scene) for scene in asked]))
  found = judges.agreement(asked, seen, scenes.holds)
  other = judges.agreement(asked[1:] + asked[:1], seen, scenes.holds)
  # In so short a time it learns colours and places; digits take longer.
  assert found["colours"] > 0.9 and other["colours"] < 0.5
  for scene, things in zip(asked, seen, strict=True):
    for thing in things:
      away = [
        max(abs(real.row - thing.row), abs(real.column - thing.column))
        for real in scene.things
      ]
      assert min(away) < 8.0


def thing(colour, digit, row, column):
  return scenes.Thing(digit, colour, row, column)


ASKED = scenes.Scene(
  (thing("red", 3, 8, 8), thing("blue", 7, 8, 24)), ((0, "left", 1),), ""
)


@pytest.mark.parametrize(
  ("things", "digits", "colours", "relations"),
  [
    (ASKED.things, 1.0, 1.0, 1.0),
    ((), 0.0, 0.0, 0.0),
    (ASKED.things[:1], 0.5, 0.5, 0.0),
    # One too many is as wrong as one too few.
    ((*ASKED.things, thing("white", 1, 24, 24)), 2 / 3, 2 / 3, 1.0),
    # All there, and on the wrong sides.
    ((thing("red", 3, 8, 24), thing("blue", 7, 8, 8)), 1.0, 1.0, 0.0),
    # All there, and the colours of the wrong ones.
    ((thing("blue", 3, 8, 8), thing("red", 7, 8, 24)), 1.0, 1.0, 0.0),
    ((thing("red", 3, 8, 8), thing("red", 3, 8, 24)), 0.5, 0.5, 0.0),
  ],
)
def test_agreement_counts_what_is_there_and_nothing_else(
  things, digits, colours, relations
):
  seen = [[judges.Seen(*dataclasses.astuple(thing)) for thing in things]]
  found = judges.agreement([ASKED], seen, scenes.holds)
  assert found == pytest.approx(
    {"digits": digits, "colours": colours, "relations": relations}
  )


def test_a_thing_is_where_most_of_its_cells_say():
  judge = judges.Detector({}, ("red", "blue"))
  digit_RXK, colour_RXQ = np.zeros((8, 8, 10)), np.zeros((8, 8, 2))
  digit_RXK[1:4, 1:4, 3] = 0.9
  colour_RXQ[1:4, 1:4, 1] = 1.0
  digit_RXK[4:7, 4:7, 5] = 0.5  # Less than most of nine.
  (found,) = judge._read(digit_RXK, colour_RXQ)
  assert found[:2] == (3, "blue")
  np.testing.assert_allclose(found[2:], (10.0, 10.0))
