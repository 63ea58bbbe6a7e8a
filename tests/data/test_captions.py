"""Captions as tokens: in any script, cut where they must be, and counted."""

import dataclasses

import numpy as np
import pytest

from flowjax import errors
from flowjax.data import captions, loader, sources, tokenizers
from flowjax.data import config as data_config

CAPTIONS = ["", "a red 3", "ένα κόκκινο 3", "赤い3", "أحمر ٣", "🟥"]
WORDS = ("a", "red", "3")


@dataclasses.dataclass(frozen=True)
class Pictures:
  """Captions, each with an image, read one by one; some are corrupt."""

  said: tuple[str, ...]
  corrupt: tuple[int, ...] = ()
  name: str = "pictures"
  class_names: tuple[str, ...] = ()
  num_classes: int = 0
  shape: tuple[int, int, int] = (2, 2, 1)
  blank = {"image": np.zeros((2, 2, 1), np.float32), "caption": ""}

  def __len__(self):
    return len(self.said)

  def __getitem__(self, i):
    if i in self.corrupt:
      raise sources.Corrupt(f"Record {i} is corrupt.")
    image_HWC = np.full(self.shape, i, np.float32)
    return {"image": image_HWC, "caption": self.said[i]}

  def fingerprint(self):
    return {"records": len(self)}


def test_bytes_keep_captions_in_any_script():
  read = tokenizers.build("bytes", 40)
  token_BL, mask_BL = read(CAPTIONS)
  assert token_BL.shape == mask_BL.shape == (len(CAPTIONS), 40)
  assert token_BL.dtype == np.int32 and token_BL.max() < read.vocabulary
  for token_L, mask_L, caption in zip(token_BL, mask_BL, CAPTIONS, strict=True):
    real = token_L[mask_L]
    assert real[-1] == tokenizers.END
    assert bytes(int(i) - 2 for i in real[:-1]).decode() == caption
    assert (token_L[~mask_L] == tokenizers.PADDING).all()


def test_words_are_those_of_the_list_and_all_others_one():
  read = tokenizers.build("words", 6, WORDS)
  token_BL, mask_BL = read(["A red, red 3!", "the 3 red a", ""])
  assert token_BL.tolist() == [
    [3, 4, 4, 5, 1, 0],
    [2, 5, 4, 3, 1, 0],
    [1, 0, 0, 0, 0, 0],
  ]
  assert mask_BL.sum(axis=1).tolist() == [5, 5, 1]
  assert read.vocabulary == 6
  with pytest.raises(errors.UserError, match="'blood'.*There are: 3, a, red"):
    read.require("a blood 3")


@pytest.mark.parametrize("name", tokenizers.NAMES)
def test_what_is_too_long_is_cut_and_told(name):
  read = tokenizers.build(name, 4, WORDS if name == "words" else ())
  fits, long = ("a red 3", "a a a a") if name == "words" else ("abc", "abcd")
  token_BL, mask_BL = read([fits, long])
  assert read.truncated([fits, long]).tolist() == [False, True]
  assert mask_BL.all() and (token_BL[:, -1] == tokenizers.END).all()
  read.require(fits)
  with pytest.raises(errors.UserError, match="5 tokens"):
    read.require(long)


def test_batches_hold_tokens_and_mark_what_was_cut():
  said = tuple("ab" * i for i in range(8))
  source = captions.captioned(
    Pictures(said, corrupt=(3,)), tokenizers.build("bytes", 9)
  )
  config = data_config.DataConfig(image_size=(2, 2), batch_size=8)
  batch = next(loader.batches(source, config))
  wanted = {"image", "token", "token_mask", "truncated", "skipped"}
  assert set(batch) == wanted
  assert batch["skipped"].sum() == 1
  record_B = batch["image"][:, 0, 0, 0].astype(int)
  assert 3 not in record_B
  np.testing.assert_array_equal(batch["truncated"], record_B > 4)
  np.testing.assert_array_equal(
    batch["token_mask"].sum(axis=1), np.minimum(2 * record_B + 1, 9)
  )
  (rest,) = loader.epoch_batches(source, 8)
  assert rest["mask"].tolist() == [1, 1, 1, 0, 1, 1, 1, 1]


def test_a_tokenizer_needs_captions_and_captions_need_a_tokenizer():
  with pytest.raises(errors.UserError, match="digits has no captions"):
    sources.open(data_config.DataConfig(tokenizer="bytes"), "train")
  with pytest.raises(errors.UserError, match="config.data.tokenizer"):
    sources.check(
      Pictures(("a",)),
      batch_size=1,
      num_classes=0,
      channels=1,
      image_size=(2, 2),
    )


@pytest.mark.parametrize(
  ("wrong", "said"),
  [
    (dict(tokenizer="letters"), "'letters' must be one of"),
    (dict(tokenizer="words"), "needs the list"),
    (dict(tokenizer="bytes", words=("a",)), "no other has one"),
    (dict(tokenizer="bytes", tokens=1), "at least 2"),
  ],
)
def test_a_tokenizer_that_cannot_be_is_refused(wrong, said):
  with pytest.raises(ValueError, match=said):
    data_config.DataConfig(**wrong)
