"""Tokenizers read from files, against transformers' own."""

import functools
import json
import pickle
import struct
import sys

import numpy as np
import pytest

from flowjax import errors
from flowjax.data import config, spiece, tokenizer_files

tokenizers = pytest.importorskip("tokenizers")

CORPUS = [
  "a photo of a red 3 to the left of a blue 7",
  "It's the 42 cats' photograph, isn't it?",
  "crème brûlée et café au lait",
  "写真の中の赤い猫",
] * 4
CAPTIONS = [
  "a photo of a red cat",
  "",
  "A  PHOTO\tof\nthe cats' 42, isn't it?!",
  "cre\u0300me brûlée",  # Not composed.
  "写真 ☃ <|endoftext|> </s> <extra_id_3> b",
  "one two three four five six seven eight nine ten eleven twelve " * 3,
]
LENGTH = 24


def save_clip(folder, **settings):
  """Writes vocab.json and merges.txt of a vocabulary that is trained here."""
  folder.mkdir(exist_ok=True)
  made = tokenizers.Tokenizer(
    tokenizers.models.BPE(
      unk_token="<|endoftext|>",
      continuing_subword_prefix="",
      end_of_word_suffix="</w>",
    )
  )
  made.normalizer = tokenizers.normalizers.Lowercase()
  made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(False)
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=360,
    special_tokens=["<|startoftext|>", "<|endoftext|>"],
    end_of_word_suffix="</w>",
    initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
  )
  made.train_from_iterator(CORPUS, trainer)
  made.model.save(str(folder))
  told = {
    "tokenizer_class": "CLIPTokenizer",
    "model_max_length": LENGTH,
    **settings,
  }
  (folder / "tokenizer_config.json").write_text(json.dumps(told))
  return folder


@functools.cache  # Pieces of one score come in any order.
def unigram():
  made = tokenizers.Tokenizer(tokenizers.models.Unigram())
  made.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
  trainer = tokenizers.trainers.UnigramTrainer(
    vocab_size=120,
    special_tokens=["<pad>", "</s>", "<unk>"],
    unk_token="<unk>",
  )
  made.train_from_iterator(CORPUS, trainer)
  return [tuple(p) for p in json.loads(made.to_str())["model"]["vocab"]]


def field(number, value):
  """Returns an entry of a protocol buffer: a number, a float or bytes."""

  def varint(n):
    rest = n >> 7
    return bytes([n & 127 | (128 if rest else 0)]) + (
      varint(rest) if rest else b""
    )

  if isinstance(value, int):
    return varint(number << 3) + varint(value)
  if isinstance(value, float):
    return varint(number << 3 | 5) + struct.pack("<f", value)
  return varint(number << 3 | 2) + varint(len(value)) + value


def spiece_of(scored, *, kind=1, characters=b""):
  pieces = b"".join(
    field(
      1,
      field(1, piece.encode())
      + field(2, float(score))
      + field(3, 2 if piece == "<unk>" else 3 if i < 2 else 1),
    )
    for i, (piece, score) in enumerate(scored)
  )
  trainer = field(1, b"corpus.txt") + field(3, kind) + field(10, 0.5)
  return pieces + field(2, trainer) + field(3, field(2, characters))


def save_t5(folder, **options):
  folder.mkdir(exist_ok=True)
  data = spiece_of(unigram(), **options)
  (folder / "spiece.model").write_bytes(data)
  told = {"tokenizer_class": "T5Tokenizer", "model_max_length": LENGTH}
  (folder / "tokenizer_config.json").write_text(json.dumps(told))
  return folder


def theirs(folder, name):
  transformers = pytest.importorskip("transformers")
  return getattr(transformers, name).from_pretrained(folder)


def require_alike(ours, theirs, length=LENGTH):
  told = theirs(
    CAPTIONS, padding="max_length", max_length=length, truncation=True
  )
  token_BL, mask_BL = ours(CAPTIONS)
  np.testing.assert_array_equal(token_BL, told["input_ids"])
  np.testing.assert_array_equal(mask_BL, told["attention_mask"])
  whole = theirs(CAPTIONS)["input_ids"]
  cut = [len(ids) > length for ids in whole]
  assert cut[-1] and not cut[0]
  assert ours.truncated(CAPTIONS).tolist() == cut
  assert (ours.length, ours.vocabulary) == (length, len(theirs))


@pytest.mark.parametrize("pad", ["<|endoftext|>", "!"])
def test_clips_files_are_read_as_transformers_reads_them(tmp_path, pad):
  folder = save_clip(tmp_path / "files", pad_token=pad)
  other = theirs(folder, "CLIPTokenizer")
  ours = tokenizer_files.read(folder)
  require_alike(ours, other)
  assert ours.padding == other.pad_token_id
  # And what they save themselves, which is a tokenizer.json.
  other.save_pretrained(tmp_path / "saved")
  assert (tmp_path / "saved" / "tokenizer.json").exists()
  require_alike(tokenizer_files.read(tmp_path / "saved"), other)
  require_alike(tokenizer_files.read(tmp_path / "saved", 12), other, 12)


def test_t5s_files_are_read_as_transformers_reads_them(tmp_path):
  transformers = pytest.importorskip("transformers")
  other = transformers.T5TokenizerFast(vocab=[
    *unigram(), *((f"<extra_id_{i}>", 0.0) for i in range(99, -1, -1))
  ])  # fmt: skip
  ours = tokenizer_files.read(save_t5(tmp_path / "files"))
  require_alike(ours, other)
  other.model_max_length = LENGTH
  other.save_pretrained(tmp_path / "saved")
  require_alike(tokenizer_files.read(tmp_path / "saved"), other)


def test_a_file_of_sentencepiece_says_what_was_written(tmp_path):
  scored = unigram()
  path = tmp_path / "spiece.model"
  path.write_bytes(spiece_of(scored, characters=b"\x01\x02" * 200))
  found = spiece.read(path)
  assert [piece for piece, _ in found.scored] == [piece for piece, _ in scored]
  np.testing.assert_allclose(
    [score for _, score in found.scored], [score for _, score in scored],
    rtol=1e-6,
  )  # fmt: skip
  assert found.unknown == 2 and found.characters == b"\x01\x02" * 200


def test_files_of_sentencepiece_have_the_fields_that_we_read():
  protocol = pytest.importorskip(
    "transformers.utils.sentencepiece_model_pb2_new"
  )
  proto = protocol.ModelProto.FromString(
    spiece_of(unigram(), characters=b"\x01\x02")
  )
  assert [piece.piece for piece in proto.pieces] == [p for p, _ in unigram()]
  assert [piece.type for piece in proto.pieces][:4] == [3, 3, 2, 1]
  assert proto.trainer_spec.model_type == proto.trainer_spec.UNIGRAM
  assert proto.normalizer_spec.precompiled_charsmap == b"\x01\x02"


def test_it_goes_to_workers_and_is_named_by_a_config(tmp_path):
  ours = tokenizer_files.read(save_clip(tmp_path / "files"))
  named = config.DataConfig(
    tokenizer=f"files:{tmp_path / 'files'}", tokens=12
  ).build_tokenizer()
  np.testing.assert_array_equal(
    named(CAPTIONS[:1])[0], ours(CAPTIONS[:1])[0][:, :12]
  )
  assert named.length == 12
  again = pickle.loads(pickle.dumps(ours))
  np.testing.assert_array_equal(again(CAPTIONS)[0], ours(CAPTIONS)[0])
  with pytest.raises(errors.UserError, match=f"more tokens than the {LENGTH}"):
    ours.require(CAPTIONS[-1])
  ours.require(CAPTIONS[0])


def without_padding(folder):
  """Leaves a tokenizer.json, and nothing that says what padding is."""
  backend = tokenizer_files.read(folder).backend
  backend.save(str(folder / "tokenizer.json"))
  (folder / "tokenizer_config.json").write_text('{"model_max_length": 9}')


@pytest.mark.parametrize(
  "save, spoil, text",
  [
    (save_clip, lambda f: (f / "merges.txt").unlink(), "vocab.json and merges"),
    (save_t5, lambda f: (f / "spiece.model").unlink(), "Found: tokenizer_con"),
    (
      save_t5,
      lambda f: (f / "spiece.model").write_bytes(b"\x0a\xff\x01ab"),
      "ends within a value",
    ),
    (
      save_t5,
      lambda f: (f / "spiece.model").write_bytes(spiece_of(unigram(), kind=2)),
      "its model_type is 2",
    ),
    (
      save_clip,
      lambda f: (f / "vocab.json").write_text("{"),
      "its tokenizer cannot be read",
    ),
    (
      save_clip,
      lambda f: (f / "tokenizer_config.json").write_text("{}"),
      "model_max_length = None",
    ),
    (
      save_clip,
      lambda f: (f / "tokenizer_config.json").write_text("no"),
      "is damaged",
    ),
    (save_clip, without_padding, "pad_token = None"),
  ],
)
def test_files_that_are_missing_or_damaged_are_refused(
  tmp_path, save, spoil, text
):
  folder = save(tmp_path / "files")
  spoil(folder)
  with pytest.raises(errors.UserError, match=text):
    tokenizer_files.read(folder)


def test_without_the_package_the_extra_is_named(tmp_path, monkeypatch):
  folder = save_clip(tmp_path / "files")
  monkeypatch.setitem(sys.modules, "tokenizers", None)
  with pytest.raises(errors.UserError, match=r"pip install -e '.\[text\]'"):
    tokenizer_files.read(folder)
