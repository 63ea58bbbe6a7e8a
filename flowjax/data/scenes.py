"""Scenes of real handwritten digits in colours, with captions that say what.

Up to three of the digits of scikit-learn stand on black, 14 pixels high, and
the caption says which and where: "a red 3 to the left of a blue 7", "a white 1
at the top". Nothing is stored: scene i is a pure function of the seed and i. Of
each digit one colour is held out, so that training never sees that combination.
"""

# Shape suffixes: B batch, N digits, H height, W width, C channels.

import dataclasses
import functools
import hashlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from flowjax import errors
from flowjax.data import config as config_lib
from flowjax.data import digits, layouts, order

MOST = 3  # Digits of a scene.
SIZE, SIDE = 32, 14  # Pixels of a scene and of a digit, both square.
CELL = SIZE // 2  # A digit has a cell, in one of three rows and columns.
INKED = 0.25  # Of full ink: what is fainter is no part of a digit.
LENGTH = {"train": 2**20, "held_out": 256}
COMBINATIONS = ("seen", "held_out", "all")
COLOURS = {
  "red": (1.0, 0.1, 0.1),
  "green": (0.1, 0.9, 0.1),
  "blue": (0.2, 0.3, 1.0),
  "yellow": (1.0, 0.9, 0.1),
  "purple": (0.8, 0.1, 0.9),
  "white": (1.0, 1.0, 1.0),
}
# What is said of the first of two things, and what of the second.
INVERSE = {"left": "right", "right": "left", "above": "below", "below": "above"}
_OF = {
  "left": "to the left of",
  "right": "to the right of",
  "above": "above",
  "below": "below",
}
_ITS = {
  "left": "to its left",
  "right": "to its right",
  "above": "above it",
  "below": "below it",
}
# What can be in a box: "red 3".
NAMES = tuple(f"{colour} {digit}" for digit in range(10) for colour in COLOURS)
WORDS = tuple(
  "0 1 2 3 4 5 6 7 8 9 a above and at below bottom in is it its left middle of "
  "one right the there to top".split()
) + tuple(COLOURS)
# How far two centres must be apart for one to be left of the other, or above.
APART = 4


@dataclasses.dataclass(frozen=True)
class Thing:
  """A digit in a colour, and where its centre is, in pixels."""

  digit: int
  colour: str
  row: float
  column: float

  def __str__(self) -> str:
    return f"a {self.colour} {self.digit}"


@dataclasses.dataclass(frozen=True)
class Scene:
  """What is in a scene, what is said of it, and the relations that are said.

  (i, "left", j) says that thing i is to the left of thing j. `images` are the
  digits that were taken, among those of the source.
  """

  things: tuple[Thing, ...]
  relations: tuple[tuple[int, str, int], ...]
  caption: str
  images: tuple[int, ...] = ()


class Box(NamedTuple):
  """What is in a tight box, one of `NAMES`, and its sides, from 0 to 1."""

  name: str
  top: float
  left: float
  bottom: float
  right: float


def holds(one: Thing, relation: str, other: Thing) -> bool:
  """Whether the first of two things is where the relation says."""
  down, across = one.row - other.row, one.column - other.column
  away = {"left": -across, "right": across, "above": -down, "below": down}
  return away[relation] >= APART


@functools.cache
def held_out_colour(digit: int) -> str:
  """Returns the colour in which training never sees this digit."""
  number = hashlib.blake2b(f"scenes {digit}".encode(), digest_size=8).digest()
  return tuple(COLOURS)[int.from_bytes(number, "big") % len(COLOURS)]


def is_held_out(thing: Thing) -> bool:
  """Whether a thing is of a combination that training never sees."""
  return held_out_colour(thing.digit) == thing.colour


@dataclasses.dataclass(frozen=True)
class Scenes:
  """Scenes of some digits, in combinations of one kind.

  "seen" ones are those of training; in "held_out" ones a thing of each scene is
  of a combination that it never sees; "all" are of any. Of
  several `aspects`, height and width, scene i has one by its number.
  """

  ink_NHW: np.ndarray  # From 0 to 1.
  label_N: np.ndarray
  hash: str
  combinations: str
  length: int
  seed: int = 0
  name: str = "scenes"
  class_names: tuple[str, ...] = ()
  num_classes: int = 0
  shape: tuple[int, int, int] = (SIZE, SIZE, 3)
  aspects: tuple[tuple[int, int], ...] = ((SIZE, SIZE),)
  layout: layouts.Layout | None = None  # None: captions.

  @property
  def blank(self) -> dict[str, Any]:
    told = {"caption": ""} if self.layout is None else self.layout.blank
    return {"image": np.zeros(self.shape, np.float32), **told}

  def __len__(self) -> int:
    return self.length

  def __getitem__(self, i: int) -> dict[str, Any]:
    scene = self.scene(i)
    told: dict[str, Any] = {"caption": scene.caption}
    if self.layout is not None:
      told = self.layout.arrays(self.boxes(scene))
    return {"image": self.painted(scene), **told}

  def gather(self, records_B: np.ndarray) -> dict[str, np.ndarray]:
    records = [self[int(i)] for i in records_B]
    return {
      key: np.stack([record[key] for record in records]) for key in records[0]
    }

  def sizes(self) -> np.ndarray:
    """Returns the height and width of each scene, [N, 2]."""
    return np.resize(np.array(self.aspects), (self.length, 2))

  def cut(self, image_size: tuple[int, int]) -> "Scenes":
    """Returns the same scenes, composed at another height and width."""
    return dataclasses.replace(self, shape=(*image_size, 3))

  def fingerprint(self) -> dict[str, Any]:
    return {
      "records": len(self),
      "hash": self.hash,
      "seed": self.seed,
      "combinations": self.combinations,
      **({"boxes": self.layout.fingerprint()} if self.layout else {}),
    }

  def scene(self, i: int) -> Scene:
    """Returns what scene `i` is."""
    draw = _dice(self.seed, i)
    count = (1, 1, 2, 2, 3)[next(draw) % 5]
    images = tuple(next(draw) % len(self.label_N) for _ in range(count))
    labels = [int(self.label_N[image]) for image in images]
    places, relations = _arranged(count, draw, self.shape[:2])
    colours = _colours(labels, self.combinations, draw)
    things = tuple(
      Thing(label, colour, row + (SIDE - 1) / 2, column + (SIDE - 1) / 2)
      for label, colour, (row, column) in zip(
        labels, colours, places, strict=True
      )
    )
    caption = _said(things, relations, draw, self.shape[:2])
    return Scene(things, relations, caption, images)

  def boxes(self, scene: Scene) -> list[Box]:
    """Returns the tight box of each thing of one of these scenes."""
    found = []
    for thing, image in zip(scene.things, scene.images, strict=True):
      inked_HW = self.ink_NHW[image] >= INKED
      corner = thing.row - (SIDE - 1) / 2, thing.column - (SIDE - 1) / 2
      name = f"{thing.colour} {thing.digit}"
      found.append(tight(inked_HW, corner, self.shape[:2], name))
    return found

  def painted(self, scene: Scene) -> np.ndarray:
    """Returns the image [H, W, C] of one of these scenes."""
    image_HWC = np.full(self.shape, -1.0, np.float32)
    for thing, image in zip(scene.things, scene.images, strict=True):
      top, left = (
        round(at - (SIDE - 1) / 2) for at in (thing.row, thing.column)
      )
      colour_C = np.array(COLOURS[thing.colour], np.float32)
      ink_HWC = self.ink_NHW[image][..., None] * colour_C
      image_HWC[top : top + SIDE, left : left + SIDE] += 2.0 * ink_HWC
    return image_HWC


def open(config: config_lib.DataConfig, split: str) -> Scenes:
  """Returns the scenes of `split`.

  Training's are of training digits, in combinations that are seen; those held
  out are of held-out digits, each with a combination that is not.
  """
  aspects = config.buckets or ((SIZE, SIZE),)
  fits = config.image_size in aspects and min(map(min, aspects)) >= SIZE
  if not fits or config.channels != 3:
    raise errors.UserError(
      f"image_size={config.image_size}, channels={config.channels} and "
      f"buckets={config.buckets} do not suit scenes, which are {SIZE}x{SIZE} "
      f"in 3 channels, or of buckets whose sides are at least {SIZE}."
    )
  if config.boxes and (
    config.boxes < MOST or not set(NAMES) <= set(config.box_names)
  ):
    raise errors.UserError(
      f"boxes={config.boxes} of {len(config.box_names)} box_names do not suit "
      f"scenes, which have up to {MOST} boxes, each of one of the names in "
      f"flowjax.data.scenes.NAMES: set config.data.boxes={MOST} and "
      "config.data.box_names to these, in any order."
    )
  # A combination in a box is a class of its own: whoever never saw it knows
  # nothing of it.
  seen = split == "train" or config.boxes
  combinations = "seen" if seen else "held_out"
  made = of_digits(config, split, combinations, length=LENGTH[split])
  return dataclasses.replace(made, aspects=aspects)


def of_digits(
  config: config_lib.DataConfig,
  split: str,
  combinations: str,
  *,
  length: int,
  seed: int = 0,
) -> Scenes:
  """Returns scenes of the digits of `split`, in combinations of any kind.

  They are of `config.image_size`, the reference where there are buckets.
  """
  assert combinations in COMBINATIONS, combinations
  image_NIJ, label_N = digits.load()
  held_N = digits.held_out(image_NIJ, label_N, config.held_out)
  keep_N = held_N if split == "held_out" else ~held_N
  if not keep_N.any():
    raise errors.UserError(
      f"held_out={config.held_out} leaves no digits for the split {split!r} of "
      "scenes: config.data.held_out=0.2 holds out every fifth."
    )
  kept_NIJ = image_NIJ[keep_N]
  ink_NHW = (digits.enlarged(kept_NIJ, (SIDE, SIDE)) + 1.0) / 2.0
  return Scenes(
    ink_NHW,
    label_N[keep_N],
    digits.hash_of(kept_NIJ, label_N[keep_N]),
    combinations,
    length,
    seed,
    shape=(*config.image_size, 3),
    layout=layouts.of(config),
  )


def tight(
  inked_HW: np.ndarray,
  corner: tuple[float, float] = (0, 0),
  size: tuple[int, int] | None = None,
  name: str = "",
) -> Box:
  """Returns the smallest box around what is marked, in parts of a picture.

  The marks, of which there is one at least, begin at `corner`, in pixels, of a
  picture of this height and width; they are all of it unless told.
  """
  high, wide = size or inked_HW.shape
  sides = []
  for axis in (1, 0):
    marked = np.flatnonzero(inked_HW.any(axis=axis))
    sides.append(
      (marked[0] + corner[1 - axis], marked[-1] + 1 + corner[1 - axis])
    )
  (top, bottom), (left, right) = sides
  sides_4 = (top / high, left / wide, bottom / high, right / wide)
  return Box(name, *map(float, sides_4))


def _dice(seed: int, i: int) -> Iterator[int]:
  """Yields numbers that follow from the seed and the scene alone."""
  key = order.mix(order.mix(seed) ^ np.uint64(i))
  return iter(order.mix(key + np.arange(64, dtype=np.uint64)).tolist())


def _arranged(count: int, draw: Iterator[int], size: tuple[int, ...]):
  """Returns the upper left corners of things, and the relations between them.

  One stands in one of nine places; two side by side, or one above the other;
  a third beside the first of them, across.
  """
  rows, columns = ([_at(number, side) for number in range(3)] for side in size)
  if count == 1:
    return [(rows[next(draw) % 3], columns[next(draw) % 3])], ()
  flipped = next(draw) % 2, next(draw) % 2  # Down, and across.
  (row, other_row), (column, other_column) = (
    (at[2 * flip], at[2 - 2 * flip])
    for flip, at in zip(flipped, (rows, columns), strict=True)
  )
  beside = (0, ("left", "right")[flipped[1]], 1)
  over = (0, ("above", "below")[flipped[0]], count - 1)
  if count == 3:
    places = [(row, column), (row, other_column), (other_row, column)]
    return places, (beside, over) if next(draw) % 2 else (over, beside)
  if next(draw) % 2:
    return [(rows[1], column), (rows[1], other_column)], (beside,)
  return [(row, columns[1]), (other_row, columns[1])], (over,)


def _at(number: int, side: int) -> int:
  """Returns where the first, middle or last of three places begins."""
  return number * (side - CELL) // 2 + (CELL - SIDE) // 2


def _colours(
  labels: list[int], combinations: str, draw: Iterator[int]
) -> list[str]:
  """Returns a colour for each digit, all different."""
  found: dict[int, str] = {}
  if combinations == "held_out":
    chosen = next(draw) % len(labels)
    found[chosen] = held_out_colour(labels[chosen])
  for place, label in enumerate(labels):
    if place in found:
      continue
    never = () if combinations == "all" else (held_out_colour(label),)
    able = [c for c in COLOURS if c not in (*found.values(), *never)]
    found[place] = able[next(draw) % len(able)]
  return [found[place] for place in range(len(labels))]


def _where(thing: Thing, size: tuple[int, ...]) -> str:
  """Says in which of nine places a thing is."""
  row = ("top", "", "bottom")[int(3 * thing.row / size[0])]
  column = ("left", "", "right")[int(3 * thing.column / size[1])]
  place = " ".join(filter(None, (row, column)))
  return f"at the {place}" if place else "in the middle"


def _said(things, relations, draw: Iterator[int], size) -> str:
  """Returns one of several ways to say what is in a scene."""
  way = next(draw) % 4
  if len(things) == 1:
    (a,) = things
    where = _where(a, size)
    return (
      f"{a} {where}",
      f"{where} is {a}",
      f"there is {a} {where}",
      f"one {a.colour} {a.digit} {where}",
    )[way]
  (_, first, i), *rest = relations
  a, b = things[0], things[i]
  if rest:
    ((_, second, j),) = rest
    c = things[j]
    if way < 2:
      return f"{a} {_OF[first]} {b} and {_OF[second]} {c}"
    return f"{a}, {b} {_ITS[INVERSE[first]]} and {c} {_ITS[INVERSE[second]]}"
  return (
    f"{a} {_OF[first]} {b}",
    f"{b} {_OF[INVERSE[first]]} {a}",
    f"{_OF[first]} {b} is {a}",
    f"{a} and {b} {_ITS[INVERSE[first]]}",
  )[way]
