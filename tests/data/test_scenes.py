"""Scenes: pure, as their captions say, and combinations that are held out."""

import functools
import re

import numpy as np
import pytest

from flowjax import errors
from flowjax.data import config as data_config
from flowjax.data import scenes, sources, tokenizers

SCENES = data_config.DataConfig(
  source="scenes", image_size=(32, 32), channels=3
)
HELD_OUT = (
  "blue purple green yellow blue yellow green white white purple".split()
)


@functools.cache
def source(split="train"):
  return sources.open(SCENES, split)


def test_a_scene_is_a_pure_function_of_the_seed_and_its_number():
  one, again = source(), scenes.open(SCENES, "train")
  batch = one.gather(np.array([7, 3, 7]))
  for place, i in enumerate((7, 3, 7)):
    np.testing.assert_array_equal(batch["image"][place], again[i]["image"])
    assert batch["caption"][place] == again[i]["caption"]
  other = scenes.of_digits(SCENES, "train", "seen", length=8, seed=1)
  assert [one.scene(i) for i in range(8)] != [other.scene(i) for i in range(8)]


def test_training_never_sees_what_is_held_out():
  digits = range(10)
  held = {(digit, scenes.held_out_colour(digit)) for digit in digits}
  # As it always was: the choice hangs on nothing but the digit.
  assert [scenes.held_out_colour(digit) for digit in digits] == HELD_OUT
  shown = {
    (thing.digit, thing.colour)
    for i in range(3000)
    for thing in source().scene(i).things
  }
  every = {(digit, colour) for digit in digits for colour in scenes.COLOURS}
  assert shown == every - held
  for i in range(len(source("held_out"))):
    assert any(map(scenes.is_held_out, source("held_out").scene(i).things))


@pytest.mark.parametrize("i", range(40))
def test_the_picture_is_what_the_caption_says(i):
  one = source()
  scene, image_HWC = one.scene(i), one[i]["image"]
  assert -1.0 <= image_HWC.min() and image_HWC.max() <= 1.0 + 1e-6
  named = re.findall(r"(\w+) (\d)", scene.caption)
  wanted = sorted((thing.colour, str(thing.digit)) for thing in scene.things)
  assert sorted(named) == wanted
  for first, relation, second in scene.relations:
    a, b = scene.things[first], scene.things[second]
    assert scenes.holds(a, relation, b)
    assert scenes.holds(b, scenes.INVERSE[relation], a)
    assert not scenes.holds(b, relation, a)
  # Each thing is where it is said to be, and in its colour.
  covered_HW = np.zeros((32, 32), bool)
  for thing in scene.things:
    top, left = (round(x - 6.5) for x in (thing.row, thing.column))
    box = slice(top, top + 14), slice(left, left + 14)
    assert not covered_HW[box].any()
    covered_HW[box] = True
    ink_C = (image_HWC[box] + 1.0).sum(axis=(0, 1))
    colour_C = np.array(scenes.COLOURS[thing.colour])
    np.testing.assert_allclose(
      ink_C / ink_C.max(), colour_C / colour_C.max(), atol=1e-3
    )
  assert (image_HWC[~covered_HW] == -1.0).all()


def test_the_words_are_those_that_captions_use():
  words = tokenizers.build("words", 16, scenes.WORDS)
  captions = [source().scene(i).caption for i in range(2000)]
  captions += [source("held_out").scene(i).caption for i in range(256)]
  for caption in captions:
    words.require(caption)
  used = {word for text in captions for word in re.findall(r"\w+", text)}
  assert used == set(scenes.WORDS)
  assert not words.truncated(captions).any()


def test_a_size_that_scenes_do_not_have_is_refused():
  with pytest.raises(errors.UserError, match="32x32 in 3 channels"):
    sources.open(data_config.DataConfig(source="scenes"), "train")
