"""Files of SentencePiece, read without it: pieces, scores, and characters.

A `.model` is a protocol buffer: entries of a number, with a kind of value in
its last three bits, and the value. Of all that it says we need three fields of
ModelProto: pieces (1), and of the normalizer (3) its map of characters (2).
"""

import collections.abc
import dataclasses
import pathlib
import struct
from typing import Any

from flowjax import errors

_VARINT, _DOUBLE, _BYTES, _FLOAT = 0, 1, 2, 5
_UNIGRAM = 1
# Kinds of pieces: what stands for anything unknown.
_UNKNOWN = 2


@dataclasses.dataclass(frozen=True)
class Pieces:
  """A unigram model: each piece with its score, in the order of its number.

  `characters` is a map, compiled by SentencePiece, from characters to those
  that stand for them; empty: each stands for itself.
  """

  scored: list[tuple[str, float]]
  unknown: int
  characters: bytes


def read(path: pathlib.Path) -> Pieces:
  """Reads a unigram model, as T5 has it.

  Raises UserError for a file that is damaged or of another kind.
  """
  try:
    return _model(memoryview(path.read_bytes()))
  except (OSError, ValueError, IndexError, struct.error) as error:
    raise errors.UserError(
      f"{path} is no unigram model of SentencePiece: {error}. Copy it again."
    ) from error


def _model(data: memoryview) -> Pieces:
  scored: list[tuple[str, float]] = []
  unknown: list[int] = []
  characters, kind = b"", _UNIGRAM
  for number, value in _fields(data):
    if number == 1:
      entry = dict(_fields(value))
      if entry.get(3) == _UNKNOWN:
        unknown.append(len(scored))
      (score,) = struct.unpack("<f", entry.get(2, bytes(4)))
      scored.append((bytes(entry[1]).decode(), score))
    elif number == 2:
      kind = dict(_fields(value)).get(3, _UNIGRAM)
    elif number == 3:
      characters = bytes(dict(_fields(value)).get(2, b""))
  if kind != _UNIGRAM:
    raise ValueError(f"its model_type is {kind}, and unigram is {_UNIGRAM}")
  if len(unknown) != 1:
    raise ValueError(f"{len(unknown)} of {len(scored)} pieces are unknown")
  return Pieces(scored, unknown[0], characters)


def _fields(data: memoryview) -> collections.abc.Iterator[tuple[int, Any]]:
  """Yields the number and the value of each entry."""
  place = 0
  while place < len(data):
    tag, place = _varint(data, place)
    kind, size = tag & 7, 0
    if kind == _VARINT:
      value, place = _varint(data, place)
      yield tag >> 3, value
      continue
    if kind == _BYTES:
      size, place = _varint(data, place)
    elif kind in (_DOUBLE, _FLOAT):
      size = 8 if kind == _DOUBLE else 4
    else:
      raise ValueError(f"byte {place} begins a value of kind {kind}")
    if place + size > len(data):
      raise ValueError("it ends within a value")
    yield tag >> 3, data[place : place + size]
    place += size


def _varint(data: memoryview, place: int) -> tuple[int, int]:
  """Returns a number of 7 bits a byte, the lowest first, and what is next."""
  value = shift = 0
  while True:
    byte = data[place]
    value |= (byte & 127) << shift
    place, shift = place + 1, shift + 7
    if byte < 128:
      return value, place
