"""Captions as strings: decoded, made of labels, and missing ones."""

# Shape suffixes: B positions.

import dataclasses
import json
import logging
from typing import Any

import numpy as np

from flowjax import errors
from flowjax.data import config as config_lib
from flowjax.data import order, retold, sources

log = logging.getLogger(__name__)


def decode(content: bytes, name: str) -> str:
  """Decodes a caption in UTF-8. Raises `sources.Corrupt` with `name`."""
  try:
    return clean(content.decode("utf-8-sig"))
  except UnicodeDecodeError as error:
    raise sources.Corrupt(
      f"{name} is no UTF-8 ({error.reason} at byte {error.start}): save it "
      "in that encoding."
    ) from error


def clean(text: str) -> str:
  """Drops what is around a text, and what no other program could encode."""
  return text.strip().encode(errors="replace").decode()


def from_json(content: bytes, key: str, name: str) -> str:
  """Returns the caption in an object of JSON. Raises `sources.Corrupt`."""
  try:
    found = json.loads(content.decode("utf-8-sig"))
  except ValueError as error:  # UnicodeDecodeError is one.
    raise sources.Corrupt(f"{name} is no JSON in UTF-8: {error}.") from error
  text = found.get(key) if isinstance(found, dict) else None
  if not isinstance(text, str):
    raise sources.Corrupt(
      f"{name} has no text under {key!r}: config.data.caption_key names it."
    )
  return clean(text)


def without(
  count: int,
  total: int,
  config: config_lib.DataConfig,
  split: str,
  what: str,
  hint: str,
) -> None:
  """Says what becomes of images that are known to have no caption.

  `count` and `total` are of all splits. Under on_no_caption="stop" there may be
  none.
  """
  if not count:
    return
  said = f"{count} of {total} {what} have no caption ({hint})"
  if config.on_no_caption == "stop":
    raise errors.DataError(
      f"{said}. Write them, or set config.data.on_no_caption='skip' to leave "
      "these images out, or 'empty' to give them the empty caption."
    )
  if config.on_no_caption == "skip":
    log.warning("%s: those of the split %r are left out.", said, split)
  else:
    log.warning("%s: those of the split %r have the empty one.", said, split)


@dataclasses.dataclass(frozen=True)
class Templated(retold.Retold):
  """A labelled source whose labels became captions, as "a photo of a {}".

  Record i + k * len(self) is record i in the words of template k. Which one it
  is while training follows from the seed and the position.
  """

  templates: tuple[str, ...]
  class_names: tuple[str, ...] = ()
  num_classes: int = 0

  @property
  def blank(self) -> sources.Record:
    rest = sources.blank(self.source)
    return {**{key: rest[key] for key in rest if key != "label"}, "caption": ""}

  def __getitem__(self, i: int) -> sources.Record:
    template, i = divmod(i, len(self))
    record = self.source[i]
    name = self.source.class_names[int(record["label"])].replace("_", " ")
    caption = self.templates[template].replace("{}", name)
    image = {key: record[key] for key in record if key != "label"}
    return {**image, "caption": clean(caption)}

  def draw(self, seed: int, position_B: np.ndarray) -> np.ndarray:
    """Returns the record of each position, and in which words."""
    record_B = sources.draw(self.source, seed, position_B)
    template_B = order.choices(seed, len(self.templates), position_B)
    return record_B + template_B * len(self)

  def fingerprint(self) -> dict[str, Any]:
    """Returns what the records hang on, as JSON can hold it."""
    told = {"templates": list(self.templates)}
    return {**self.source.fingerprint(), **told}
