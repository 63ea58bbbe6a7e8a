"""Layouts: what is in which box of an image, as arrays that batches have."""

# Shape suffixes: N boxes.

import dataclasses
import functools
import hashlib
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from flowjax import errors, schema
from flowjax.data import config as config_lib
from flowjax.data import retold, sources

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

  def check(self, boxes: Sequence[Box]) -> None:
    """Raises ValueError for a box that cannot be."""
    for name, *sides in boxes:
      if name not in self._classes:
        raise ValueError(
          f"a box has {name!r} in it, which is none of config.data.box_names. "
          f"{schema.closest(str(name), self.names)}"
        )
      _check_sides(name, sides)

  def largest(self, boxes: Sequence[Box]) -> list[Box]:
    """Returns as many boxes as there may be, in their order."""
    areas = [(box[3] - box[1]) * (box[4] - box[2]) for box in boxes]
    kept = sorted(range(len(boxes)), key=lambda i: -areas[i])[: self.most]
    return [boxes[i] for i in sorted(kept)]

  def arrays(self, boxes: Sequence[Box]) -> dict[str, np.ndarray]:
    """Returns boxes as arrays; raises ValueError for any that cannot be."""
    self.check(boxes)
    if len(boxes) > self.most:
      raise ValueError(
        f"{len(boxes)} boxes are more than config.data.boxes={self.most}."
      )
    box_N5 = np.zeros((self.most, 5), np.float32)
    for row, (name, *sides) in zip(box_N5, boxes, strict=False):
      row[:] = self._classes[name], *sides
    return {"boxes": box_N5, "box_mask": np.arange(self.most) < len(boxes)}

  def boxes(self, box_N5: np.ndarray, mask_N: np.ndarray) -> list[Box]:
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
  found: list[Box] = []
  for each in content:
    sides = each.get("box") if isinstance(each, dict) else None
    if not isinstance(sides, list) or not isinstance(each.get("class"), str):
      raise ValueError(
        f"a box is {{'class': name, 'box': [top, left, bottom, right]}}, not "
        f"{str(each)[:80]!r}."
      )
    found.append((each["class"], *sides))
  return found


@dataclasses.dataclass(frozen=True)
class Boxed(retold.Retold):
  """The records of a source whose captions are boxes, in JSON, with these.

  A box belongs to the whole image in a file; of a part that was cut out those
  whose middle is in it are kept, as far as they are in it.
  """

  layout: Layout
  originals: bool

  @property
  def blank(self) -> dict[str, np.ndarray]:
    return self._with(sources.blank(self.source), [])

  def __getitem__(self, i: int) -> dict[str, np.ndarray]:
    record = self.source[i]
    caption = record["caption"]
    try:
      boxes = parse(json.loads(caption)) if caption else []
      self.layout.check(boxes)
    except ValueError as error:
      raise sources.Corrupt(f"Record {i} of {self.name}: {error}") from error
    if "crop" in record:
      boxes = cut(boxes, record["size"], record["crop"], self.shape[:2])
    return self._with(record, self.layout.largest(boxes))

  def _with(self, record: dict[str, Any], boxes: Sequence[Box]):
    gone = ("caption", *(() if self.originals else ("size", "crop")))
    rest = {key: record[key] for key in record if key not in gone}
    return {**rest, **self.layout.arrays(boxes)}

  def fingerprint(self) -> dict[str, Any]:
    return {**self.source.fingerprint(), "boxes": self.layout.fingerprint()}


def boxed(source: Any, config: config_lib.DataConfig) -> Any:
  """Returns a source with boxes; raises UserError for one that has none."""
  found = sources.blank(source)
  if "boxes" in found:
    _check_stored(source, found["boxes"], config)
    return source
  layout = of(config)
  if "caption" not in found or layout is None:
    raise errors.UserError(
      f"{source.name} has no boxes: take 'scenes', or a source whose captions "
      "are boxes in JSON, as a folder has with config.data.caption_key='boxes' "
      "and a metadata.jsonl."
    )
  return Boxed(source, layout, config.originals)


def _check_stored(
  source: Any, box_N5: np.ndarray, config: config_lib.DataConfig
) -> None:
  """Refuses boxes that were encoded as others than a config reads."""
  names = config.box_names
  if hasattr(source, "encoded"):
    names = tuple(source.encoded.about["data"]["box_names"])
  if len(box_N5) != config.boxes or names != config.box_names:
    raise errors.UserError(
      f"{source.name} has {len(box_N5)} boxes an image, of {len(names)} names, "
      f"and config.data.boxes={config.boxes} and box_names are of "
      f"{len(config.box_names)}: set both as they were when it was encoded."
    )


def cut(
  boxes: Sequence[Box],
  size: Sequence[int],
  crop: Sequence[int],
  shape: tuple[int, int],
) -> list[Box]:
  """Returns the boxes of a part of an image, `shape` large.

  `size` is that of the whole image, and `crop` how far from its top and left
  the part begins, in pixels of the image once its short side fits.
  """
  scale = min(whole / part for whole, part in zip(size, shape, strict=True))
  stretch_2 = np.array(size) / scale / shape
  begin_2 = np.array(crop) / shape
  found: list[Box] = []
  for name, *sides in boxes:
    moved_22 = np.reshape(sides, (2, 2)) * stretch_2 - begin_2
    middle_2 = moved_22.mean(axis=0)
    if (middle_2 > 0.0).all() and (middle_2 < 1.0).all():
      inside = np.clip(moved_22, 0.0, 1.0).ravel().tolist()
      found.append((name, *inside))
  return found


def of(config: config_lib.DataConfig) -> Layout | None:
  """Returns what makes arrays of boxes, if the config asks for any."""
  return Layout(config.boxes, config.box_names) if config.boxes else None


def _check_sides(name: str, sides: Sequence[Any]) -> None:
  """Raises ValueError for what are not the sides of a box."""
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
