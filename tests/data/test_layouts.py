"""Layouts: tight boxes of scenes, and boxes beside the images of a folder."""

import dataclasses
import functools
import json

import numpy as np
import pytest
from PIL import Image

from flowjax import errors
from flowjax.data import config as data_config
from flowjax.data import layouts, scenes, sources

SCENES = data_config.DataConfig(
  source="scenes",
  image_size=(32, 32),
  channels=3,
  boxes=3,
  box_names=scenes.NAMES,
)
NAMES = ("cat", "dog")


@functools.cache
def source(split="train"):
  return sources.open(SCENES, split)


@pytest.mark.parametrize("i", range(12))
def test_a_box_is_tight_around_its_digit(i):
  record, scene = source()[i], source().scene(i)
  assert set(record) == {"image", "boxes", "box_mask"}
  assert record["box_mask"].sum() == len(scene.things)
  ink_HW = (record["image"].max(axis=-1) + 1.0) / 2.0
  left_HW = ink_HW.copy()
  for (number, *sides), thing in zip(
    record["boxes"], scene.things, strict=False
  ):
    assert scenes.NAMES[int(number)] == f"{thing.colour} {thing.digit}"
    top, left, bottom, right = np.round(np.array(sides) * 32).astype(int)
    inside_HW = ink_HW[top:bottom, left:right]
    strongest = max(scenes.COLOURS[thing.colour])
    for edge in (
      inside_HW[0],
      inside_HW[-1],
      inside_HW[:, 0],
      inside_HW[:, -1],
    ):
      assert edge.max() >= scenes.INKED * strongest - 1e-6
    left_HW[top:bottom, left:right] = 0.0
  assert left_HW.max() < scenes.INKED
  batch = source().gather(np.array([i, i + 1]))
  np.testing.assert_array_equal(batch["boxes"][0], record["boxes"])


def test_what_is_held_out_is_of_classes_that_training_saw():
  for i in range(40):
    scene = source("held_out").scene(i)
    assert not any(map(scenes.is_held_out, scene.things))
  told = source().fingerprint()
  other = dataclasses.replace(SCENES, box_names=scenes.NAMES[::-1])
  assert sources.open(other, "train").fingerprint() != told


@pytest.fixture(name="folder", scope="module")
def _folder(tmp_path_factory):
  """Returns a folder of images twice as wide as high, and their boxes."""
  folder = tmp_path_factory.mktemp("boxes")
  rows = []
  for i in range(4):
    Image.new("RGB", (32, 16)).save(folder / f"{i}.png")
    # In the middle; on the left, where it is cut; and at the right end.
    boxes = [
      {"class": "cat", "box": [0.0, 0.25, 1.0, 0.75]},
      {"class": "dog", "box": [0.5, 0.125, 1.0, 0.5]},
      {"class": "dog", "box": [0.0, 0.9, 0.5, 1.0]},
    ]
    rows.append({"file_name": f"{i}.png", "boxes": boxes[: i or None]})
  lines = [json.dumps(row) + "\n" for row in rows]
  (folder / "metadata.jsonl").write_text("".join(lines))
  return folder


def config(folder, **changes):
  return data_config.DataConfig(
    **{
      "source": f"folder:{folder}",
      "image_size": (16, 16),
      "channels": 3,
      "held_out": 0.0,
      "caption_key": "boxes",
      "boxes": 2,
      "box_names": NAMES,
      **changes,
    }
  )


def test_boxes_of_a_folder_move_with_what_is_cut_out(folder):
  found = sources.open(config(folder), "train")
  record = next(r for r in map(found.__getitem__, range(4)) if r["box_mask"][1])
  assert set(record) == {"image", "boxes", "box_mask"}
  np.testing.assert_allclose(
    record["boxes"], [[0, 0, 0, 1, 1], [1, 0.5, 0, 1, 0.5]], atol=1e-6
  )
  assert set(sources.blank(found)) == set(record)
  one = sources.open(config(folder, boxes=1), "train")
  kept = one[0]["boxes"]  # The larger of two.
  np.testing.assert_allclose(kept, [[0, 0, 0, 1, 1]], atol=1e-6)
  told = sources.open(config(folder, originals=True), "train")[0]
  assert told["size"].tolist() == [16, 32]


def test_boxes_go_into_aspect_buckets_with_their_images(folder):
  wide = ((16, 16), (12, 24))
  found = sources.open(config(folder, buckets=wide, batch_size=2), "train")
  assert [part.shape for part in found.parts] == [(12, 24, 3)]
  # Nothing is cut off, so that a box stays where it was.
  np.testing.assert_allclose(
    found[3]["boxes"],
    [[0, 0, 0.25, 1, 0.75], [1, 0.5, 0.125, 1, 0.5]],
    atol=1e-6,
  )
  drawn = dataclasses.replace(SCENES, buckets=((32, 32), (48, 32)))
  square, tall = sources.open(drawn, "train").parts
  assert tall.shape == (48, 32, 3) and square[0]["boxes"].shape == (3, 5)
  record = tall[1]
  top, left, bottom, right = record["boxes"][0][1:] * (48, 32, 48, 32)
  inside = record["image"][
    round(top) : round(bottom), round(left) : round(right)
  ]
  assert inside.max() > 0.0


def test_a_class_without_a_name_is_corrupt(folder):
  found = sources.open(config(folder, box_names=("cat", "cow")), "train")
  with pytest.raises(sources.Corrupt, match="'dog' in it, which is none"):
    [found[i] for i in range(4)]


def test_a_source_without_boxes_is_refused():
  digits = data_config.DataConfig(boxes=2, box_names=NAMES)
  with pytest.raises(errors.UserError, match="digits has no boxes"):
    sources.open(digits, "train")


@pytest.mark.parametrize(
  ("changes", "said"),
  [
    (dict(box_names=()), "for layouts set both"),
    (dict(box_names=("a", "a")), "each name is to be there once"),
    (dict(flip=True), "its boxes not"),
    (dict(tokenizer="bytes"), "a layout or a caption"),
    (dict(boxes=-1), "must not be negative"),
  ],
)
def test_boxes_that_do_not_go_together_are_refused(changes, said):
  with pytest.raises(ValueError, match=said):
    dataclasses.replace(SCENES, **changes)


@pytest.mark.parametrize(
  "changes", [dict(boxes=2), dict(box_names=scenes.NAMES[1:])]
)
def test_scenes_refuse_boxes_that_theirs_do_not_fit(changes):
  with pytest.raises(
    errors.UserError, match=f"boxes={changes.get('boxes', 3)} of"
  ):
    sources.open(dataclasses.replace(SCENES, **changes), "train")


@pytest.mark.parametrize(
  ("content", "said"),
  [
    ({}, "boxes are a list"),
    ([["cat", 0, 0, 1, 1]], "a box is {'class'"),
    ([{"class": "cat"}], "a box is {'class'"),
    ([{"class": "bird", "box": [0, 0, 1, 1]}], "'bird' in it"),
    ([{"class": "cat", "box": [0, 0, 1]}], "it must be top, left"),
    ([{"class": "cat", "box": [0.5, 0, 0.5, 1]}], "the top above the bottom"),
    ([{"class": "cat", "box": [0, 0, 1, 2]}], "the top above the bottom"),
    ([{"class": "cat", "box": [0, 0, 1, "1"]}], "it must be top, left"),
    (3 * [{"class": "cat", "box": [0, 0, 1, 1]}], "3 boxes are more than"),
  ],
)
def test_what_is_no_layout_is_said_to_be_none(content, said):
  with pytest.raises(ValueError, match=said):
    layouts.Layout(2, NAMES).arrays(layouts.parse(content))


def test_a_layout_is_what_its_arrays_say():
  layout = layouts.Layout(3, NAMES)
  boxes = [("dog", 0.0, 0.25, 0.5, 1.0), ("cat", 0.5, 0.5, 0.75, 0.625)]
  found = layout.arrays(boxes)
  assert layout.boxes(found["boxes"], found["box_mask"]) == boxes


def test_boxes_are_of_their_bucket():
  wide = dataclasses.replace(SCENES, buckets=((32, 32), (32, 64)))
  for part in sources.open(wide, "train").parts:
    record = part[1]
    assert record["image"].shape == part.shape
    height, width = part.shape[:2]
    ink_HW = (record["image"].max(axis=-1) + 1.0) / 2.0
    for (_, *sides), there in zip(
      record["boxes"], record["box_mask"], strict=True
    ):
      if there:
        whole = np.array([height, width, height, width])
        top, left, bottom, right = np.round(sides * whole).astype(int)
        assert ink_HW[top:bottom, left:right].max() > 0.5
        ink_HW[top:bottom, left:right] = 0.0
    assert ink_HW.max() < scenes.INKED
