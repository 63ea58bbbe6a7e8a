"""Captions as numbers, of a length that is always the same.

Each caption ends with a token that says so; the empty one is that token alone.
"""

# Shape suffixes: B captions, L tokens.

import dataclasses
import functools
import pathlib
import re
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from flowjax import errors, schema
from flowjax.data import tokenizer_files

PADDING, END = 0, 1
NAMES = ("bytes", "words")
# And behind this the folder of a pretrained one.
FILES = "files:"


class Tokenizer(Protocol):
  """What makes rows of `length` tokens, below `vocabulary`, of captions."""

  @property
  def length(self) -> int: ...

  @property
  def vocabulary(self) -> int: ...

  def __call__(self, captions: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Returns token_BL, int32, and mask_BL, true where a token is real.

    What is too long is cut, and still ends as others do.
    """

  def truncated(self, captions: Sequence[str]) -> np.ndarray:
    """Says of each caption whether it is cut: bool [B]."""

  def require(self, caption: str) -> None:
    """Raises UserError for a caption that cannot be told as it is."""


@dataclasses.dataclass(frozen=True)
class _Plain:
  """A tokenizer that knows a caption's tokens one by one."""

  length: int

  def _ids(self, caption: str) -> list[int]:
    raise NotImplementedError

  def __call__(self, captions: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    token_BL = np.full((len(captions), self.length), PADDING, np.int32)
    for row_L, caption in zip(token_BL, captions, strict=True):
      ids = [*self._ids(caption)[: self.length - 1], END]
      row_L[: len(ids)] = ids
    return token_BL, token_BL != PADDING

  def truncated(self, captions: Sequence[str]) -> np.ndarray:
    lengths = [len(self._ids(caption)) for caption in captions]
    return np.array(lengths, np.int64) >= self.length

  def require(self, caption: str) -> None:
    count = len(self._ids(caption)) + 1
    if count > self.length:
      raise errors.UserError(
        f"{caption!r} is {count} tokens with its end, and this run reads "
        f"{self.length}: say it shorter."
      )


@dataclasses.dataclass(frozen=True)
class Bytes(_Plain):
  """The bytes of UTF-8: captions in any script, nothing unknown."""

  @property
  def vocabulary(self) -> int:
    return 2 + 256

  def _ids(self, caption: str) -> list[int]:
    return [2 + byte for byte in caption.encode()]


@dataclasses.dataclass(frozen=True)
class Words(_Plain):
  """Words of a list, whatever stands between them; all others are as one."""

  words: tuple[str, ...]

  @property
  def vocabulary(self) -> int:
    return 3 + len(self.words)

  def _ids(self, caption: str) -> list[int]:
    places = {word: 3 + place for place, word in enumerate(self.words)}
    return [places.get(word, 2) for word in _words(caption)]

  def require(self, caption: str) -> None:
    for word in _words(caption):
      if word not in self.words:
        raise errors.UserError(
          f"{caption!r}: this run was never told {word!r}. "
          f"{schema.closest(word, self.words)}"
        )
    super().require(caption)


# Files may be large, and a config is asked again and again.
_of_files = functools.cache(tokenizer_files.read)


def build(name: str, length: int, words: Sequence[str] = ()) -> Tokenizer:
  """Returns the tokenizer of that name, or of the files that it names."""
  if name.startswith(FILES):
    return _of_files(pathlib.Path(name.removeprefix(FILES)), length)
  if name == "bytes":
    return Bytes(length)
  assert name == "words", name
  return Words(length, tuple(words))


def _words(caption: str) -> list[str]:
  return re.findall(r"\w+", caption.lower())
