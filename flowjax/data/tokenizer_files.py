"""Tokenizers of pretrained encoders, from the files in their folder.

  tokenizer.json              whatever it describes
  vocab.json and merges.txt   CLIP's: pairs of bytes, merged within words
  spiece.model                T5's: a unigram model of SentencePiece

The package `tokenizers` does the work; nothing of transformers is needed.
"""

# Shape suffixes: B captions, L tokens.

import dataclasses
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from flowjax import errors
from flowjax.data import spiece

# A word with what is in front of it, each digit, or what is neither.
_CLIP_WORDS = (
  r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d"
  r"|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
)
_CLIP_SPECIAL = {
  "bos_token": "<|startoftext|>",
  "eos_token": "<|endoftext|>",
  "unk_token": "<|endoftext|>",
  "pad_token": "<|endoftext|>",
}
_T5_SPECIAL = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
_SPACE = "\u2581"
_EXTRA = 100
# Files say that there is no limit by a number beyond any text.
_ENDLESS = 10**6


@dataclasses.dataclass(frozen=True)
class FromFiles:
  """A tokenizer of `tokenizers`; it cuts at `length` and fills with padding."""

  folder: pathlib.Path
  length: int
  padding: int
  backend: Any

  @property
  def vocabulary(self) -> int:
    return self.backend.get_vocab_size(with_added_tokens=True)

  def __call__(self, captions: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    shape = len(captions), self.length
    token_BL = np.full(shape, self.padding, np.int32)
    mask_BL = np.zeros(shape, bool)
    for i, found in enumerate(self.backend.encode_batch(list(captions))):
      token_BL[i, : len(found.ids)] = found.ids
      mask_BL[i, : len(found.ids)] = True
    return token_BL, mask_BL

  def truncated(self, captions: Sequence[str]) -> np.ndarray:
    found = self.backend.encode_batch(list(captions))
    return np.array([bool(each.overflowing) for each in found], bool)

  def require(self, caption: str) -> None:
    if self.truncated([caption])[0]:
      raise errors.UserError(
        f"{caption!r} has more tokens than the {self.length} that are read: "
        "say it shorter."
      )


def read(folder: pathlib.Path, length: int | None = None) -> FromFiles:
  """Reads the tokenizer of a folder, for texts of `length` tokens.

  By default that is what its tokenizer_config.json says. Raises UserError for
  files that are missing or damaged.
  """
  tokenizers = _require(folder)
  told = _told(folder)
  try:
    if (folder / "tokenizer.json").exists():
      backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
      told = {**(_T5_SPECIAL if "</s>" in backend.get_vocab() else {}), **told}
    elif (folder / "vocab.json").exists():
      told = _CLIP_SPECIAL | told
      backend = _clip(tokenizers, folder, told)
    else:
      told = _T5_SPECIAL | told
      backend = _t5(tokenizers, folder, told)
  except errors.UserError:
    raise
  except Exception as error:  # The package raises nothing narrower.
    raise errors.UserError(
      f"{folder}: its tokenizer cannot be read: {error}. Copy the folder again."
    ) from error
  padding = backend.token_to_id(told.get("pad_token", ""))
  if padding is None:
    raise errors.UserError(
      f"{folder / 'tokenizer_config.json'}: pad_token = "
      f"{told.get('pad_token')!r} is no token of this tokenizer."
    )
  length = length or told.get("model_max_length")
  if type(length) is not int or not 0 < length < _ENDLESS:
    raise errors.UserError(
      f"{folder / 'tokenizer_config.json'}: model_max_length = {length!r} is "
      "no number of tokens, and no other was asked for."
    )
  backend.enable_truncation(length)
  backend.no_padding()
  return FromFiles(folder, length, padding, backend)


def _require(folder: pathlib.Path) -> Any:
  """Returns the package, where a folder has something for it to read."""
  names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
  if not ({"tokenizer.json", "spiece.model"} & names) and not (
    {"vocab.json", "merges.txt"} <= names
  ):
    raise errors.UserError(
      f"{folder} holds no tokenizer: there must be tokenizer.json, or "
      "vocab.json and merges.txt (CLIP), or spiece.model (T5). Found: "
      f"{', '.join(sorted(names)) or 'nothing'}. Copy the folder again, whole."
    )
  try:
    import tokenizers
  except ImportError as error:
    raise errors.UserError(
      f"Reading {folder} needs {error.name}: pip install -e '.[text]'."
    ) from error
  return tokenizers


def _told(folder: pathlib.Path) -> dict[str, Any]:
  """Returns the special tokens and the length that a folder tells."""
  told: dict[str, Any] = {}
  for name in ("special_tokens_map.json", "tokenizer_config.json"):
    path = folder / name
    if not path.exists():
      continue
    try:
      content = json.loads(path.read_text())
      for key in (*_CLIP_SPECIAL, "model_max_length", "extra_ids"):
        value = content.get(key)
        if isinstance(value, dict):
          value = value["content"]
        if value is not None:
          told[key] = value
    except (ValueError, KeyError, AttributeError) as error:
      raise errors.UserError(
        f"{path} is damaged: {error!r}. Copy it again."
      ) from error
  return told


def _clip(tokenizers: Any, folder: pathlib.Path, told: dict) -> Any:
  made = tokenizers.Tokenizer(
    tokenizers.models.BPE.from_file(
      str(folder / "vocab.json"),
      str(folder / "merges.txt"),
      unk_token=told["unk_token"],
      continuing_subword_prefix="",
      end_of_word_suffix="</w>",
    )
  )
  before, splits = tokenizers.normalizers, tokenizers.pre_tokenizers
  made.normalizer = before.Sequence(
    [
      before.NFC(),
      before.Replace(tokenizers.Regex(r"\s+"), " "),
      before.Lowercase(),
    ]
  )
  words = tokenizers.Regex(_CLIP_WORDS)
  made.pre_tokenizer = splits.Sequence(
    [
      splits.Split(words, behavior="removed", invert=True),
      splits.ByteLevel(add_prefix_space=False),
    ]
  )
  made.add_special_tokens(sorted({told[key] for key in _CLIP_SPECIAL}))
  ends = [
    (told[key], made.token_to_id(told[key]))
    for key in ("eos_token", "bos_token")
  ]
  made.post_processor = tokenizers.processors.RobertaProcessing(
    *ends, trim_offsets=False, add_prefix_space=False
  )
  return made


def _t5(tokenizers: Any, folder: pathlib.Path, told: dict) -> Any:
  pieces = spiece.read(folder / "spiece.model")
  count = told.get("extra_ids", _EXTRA)
  # What T5 learned to put in place of a gap, the last first.
  extra = [f"<extra_id_{i}>" for i in reversed(range(count))]
  scored = [*pieces.scored, *((name, 0.0) for name in extra)]
  made = tokenizers.Tokenizer(
    tokenizers.models.Unigram(scored, unk_id=pieces.unknown)
  )
  if pieces.characters:
    made.normalizer = tokenizers.normalizers.Precompiled(pieces.characters)
  splits = tokenizers.pre_tokenizers
  made.pre_tokenizer = splits.Sequence(
    [
      splits.WhitespaceSplit(),
      splits.Metaspace(replacement=_SPACE, prepend_scheme="always", split=True),
    ]
  )
  made.add_special_tokens([*(told[key] for key in _T5_SPECIAL), *extra])
  end = told["eos_token"]
  made.post_processor = tokenizers.processors.TemplateProcessing(
    single=["$A", end], special_tokens=[(end, made.token_to_id(end))]
  )
  return made
