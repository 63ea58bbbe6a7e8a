"""Captioned images, whose captions come as tokens."""

# Shape suffixes: B batch, L tokens.

import dataclasses
from typing import Any

import numpy as np

from flowjax import errors
from flowjax.data import retold, sources, tokenizers


@dataclasses.dataclass(frozen=True)
class Captioned(retold.Retold):
  """The records of a source of {"image", "caption"}, with tokens.

  A record has "token" [L] and "token_mask" [L] in place of its caption, and
  "truncated", 1 where that was cut: for counting, not for the model.
  """

  tokenizer: tokenizers.Tokenizer

  @property
  def blank(self) -> dict[str, np.ndarray]:
    return self._one(sources.blank(self.source))

  def __getitem__(self, i: int) -> dict[str, np.ndarray]:
    return self._one(self.source[i])

  def _one(self, record: dict[str, Any]) -> dict[str, np.ndarray]:
    told = self._told([record["caption"]])
    return {**_others(record), **{key: row[0] for key, row in told.items()}}

  def _told(self, captions) -> dict[str, np.ndarray]:
    token_BL, mask_BL = self.tokenizer(captions)
    truncated_B = self.tokenizer.truncated(captions).astype(np.int32)
    return {"token": token_BL, "token_mask": mask_BL, "truncated": truncated_B}


@dataclasses.dataclass(frozen=True)
class _InMemory(Captioned):
  """The same, of a source that gives many records at once."""

  def gather(self, records_B: np.ndarray) -> dict[str, np.ndarray]:
    batch = self.source.gather(records_B)
    return {**_others(batch), **self._told(batch["caption"].tolist())}


def captioned(source: Any, tokenizer: tokenizers.Tokenizer) -> Captioned:
  """Returns a source with its captions as tokens.

  Raises UserError for one that has none.
  """
  if "caption" not in sources.blank(source):
    raise errors.UserError(
      f"{source.name} has no captions for config.data.tokenizer to read: leave "
      "that out, or take a source that has, such as 'scenes'."
    )
  kind = _InMemory if hasattr(source, "gather") else Captioned
  return kind(source, tokenizer)


def _others(record: dict[str, Any]) -> dict[str, Any]:
  return {key: record[key] for key in record if key != "caption"}
