"""Embedded texts by the encoders that made them: the part of each, as a box.

SD3 puts the tokens of both CLIPs beside each other, in the first columns, and
those of T5 behind them; its pooled vector is that of CLIP-L, then that of
CLIP-G. FLUX reads the tokens of T5 and the pooled vector of CLIP-L. So a part
is a range of tokens and of columns, and a range of the pooled vector. What no
part covers is zero, and is not stored.
"""

# Shape suffixes: B batch, L text tokens, E width of the text, P width of the
# pooled text.

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from flowjax.data import records

Range = tuple[int, int]
Box = tuple[tuple[slice, ...], np.ndarray]  # Where, and what is there.


@dataclasses.dataclass(frozen=True)
class Part:
  """Where in the text and in the pooled vector one encoder's words are."""

  name: str
  tokens: Range | None = None
  columns: Range | None = None
  pooled: Range | None = None


@dataclasses.dataclass(frozen=True)
class Texts:
  """The sizes of a text [L, E] and of its pooled vector [P], and the parts."""

  length: int
  width: int
  pooled_width: int
  masked: bool
  parts: tuple[Part, ...]

  def fields(self, dtype: str) -> list[records.Field]:
    """Returns the fields that a record has for a text."""
    found = []
    for part in self.parts:
      if part.tokens and part.columns:
        box = (_size(part.tokens), _size(part.columns))
        found.append(records.Field(f"text.{part.name}", dtype, box))
      if part.pooled:
        width = _size(part.pooled)
        found.append(records.Field(f"pooled.{part.name}", dtype, (width,)))
    if self.masked:
      found.append(records.Field("text_mask", "bool", (self.length,)))
    return found

  def apart(self, cond: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Returns the fields of embedded texts, each with a first dim of texts."""
    text_BLE, pooled_BP = np.asarray(cond["text"]), np.asarray(cond["pooled"])
    found = {}
    for part in self.parts:
      if part.tokens and part.columns:
        found[f"text.{part.name}"] = text_BLE[
          :, slice(*part.tokens), slice(*part.columns)
        ]
      if part.pooled:
        found[f"pooled.{part.name}"] = pooled_BP[:, slice(*part.pooled)]
    if self.masked:
      found["text_mask"] = np.asarray(cond["text_mask"])
    return found

  def together(self, fields: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns the condition that a network is told; its fields are taken."""
    text: list[Box] = []
    pooled: list[Box] = []
    for part in self.parts:
      if part.tokens and part.columns:
        box = fields.pop(f"text.{part.name}")
        text.append(((slice(*part.tokens), slice(*part.columns)), box))
      if part.pooled:
        box = fields.pop(f"pooled.{part.name}")
        pooled.append(((slice(*part.pooled),), box))
    cond = {
      "text": _filled((self.length, self.width), text),
      "pooled": _filled((self.pooled_width,), pooled),
    }
    if self.masked:
      cond["text_mask"] = fields.pop("text_mask")
    return cond

  def to_json(self) -> dict[str, Any]:
    return dataclasses.asdict(self)

  @classmethod
  def from_json(cls, values: Mapping[str, Any]) -> "Texts":
    parts = tuple(
      Part(
        str(part["name"]),
        *(
          None if part[key] is None else (int(part[key][0]), int(part[key][1]))
          for key in ("tokens", "columns", "pooled")
        ),
      )
      for part in values["parts"]
    )
    return cls(
      int(values["length"]),
      int(values["width"]),
      int(values["pooled_width"]),
      bool(values["masked"]),
      parts,
    )


def whole(cond: Mapping[str, Any], name: str = "text") -> Texts:
  """Returns the sizes of embedded texts that are of one part."""
  _, length, width = cond["text"].shape
  pooled = cond["pooled"].shape[-1]
  part = Part(name, (0, length), (0, width), (0, pooled))
  return Texts(length, width, pooled, "text_mask" in cond, (part,))


def _filled(shape: tuple[int, ...], boxes: list[Box]) -> np.ndarray:
  """Returns zeros with the boxes in them; one that is all of it, as it is."""
  _, first = boxes[0]
  if len(boxes) == 1 and first.shape[1:] == shape:
    return first
  whole_B = np.zeros((len(first), *shape), first.dtype)
  for where, box in boxes:
    whole_B[(slice(None), *where)] = box
  return whole_B


def _size(found: Range) -> int:
  return found[1] - found[0]
