"""Records as raw bytes: what goes in comes out, and what cannot is said."""

import ml_dtypes
import numpy as np
import pytest

from flowjax.data import embeddings, records

LAYOUT = records.Layout(
  (
    records.Field("index", "int64"),
    records.Field("mean", "bfloat16", (2, 3, 4)),
    records.Field("image", "uint8", (2, 2, 1)),
    records.Field("text_mask", "bool", (5,)),
    records.Field("size", "int32", (2,)),
  ),
  captioned=True,
)
CAPTIONS = ["a red 3", "", "ヒンディー हिन्दी 😀"]


def values():
  rng = np.random.default_rng(0)
  return {
    "index": np.array([2**40, 1, 2]),
    "mean": rng.standard_normal((3, 2, 3, 4)).astype(ml_dtypes.bfloat16),
    "image": rng.integers(0, 256, (3, 2, 2, 1), np.uint8),
    "text_mask": rng.integers(0, 2, (3, 5)).astype(bool),
    "size": rng.integers(0, 2**31, (3, 2)),
  }


def test_arrays_and_captions_come_back():
  given = values()
  layout = records.Layout.from_json(LAYOUT.to_json())
  assert layout == LAYOUT
  parts = layout.pack(given, CAPTIONS)
  size = 8 + 48 + 4 + 5 + 8
  assert [len(p) for p in parts] == [size + len(c.encode()) for c in CAPTIONS]
  found = layout.unpack(parts)
  assert found.pop("caption").tolist() == CAPTIONS
  assert sorted(found) == sorted(given)
  for key, value in found.items():
    np.testing.assert_array_equal(value, given[key])
    assert value.flags.c_contiguous
  assert found["mean"].dtype == ml_dtypes.bfloat16


def test_what_does_not_fit_is_said():
  parts = LAYOUT.pack(values(), CAPTIONS)
  with pytest.raises(ValueError, match="it has 72 bytes, and the fields .* 73"):
    LAYOUT.unpack([parts[0], parts[1][:72]])
  plain = records.Layout(LAYOUT.fields)
  with pytest.raises(ValueError, match="it has 80 bytes"):
    plain.unpack([parts[0]])
  half = records.Layout((records.Field("mean", "float16", (2,)),))
  with pytest.raises(OverflowError, match="'mean' goes up to 7e\\+04, which"):
    half.pack({"mean": np.array([[1.0, 7e4]])})
  # What was not finite before is not the dtype's fault.
  assert len(half.pack({"mean": np.array([[1.0, np.inf]])})) == 1
  with pytest.raises(ValueError, match="cannot be"):
    records.Layout.from_json({"fields": [["a", "O", []]], "captioned": False})


def test_texts_are_stored_by_encoder_and_put_together_again():
  parts = (
    embeddings.Part("clip_l", (0, 3), (0, 2), (0, 4)),
    embeddings.Part("clip_g", (0, 3), (2, 5), (4, 6)),
    embeddings.Part("t5", (3, 7), (0, 8), None),
  )
  texts = embeddings.Texts(7, 8, 6, True, parts)
  assert embeddings.Texts.from_json(texts.to_json()) == texts
  rng = np.random.default_rng(0)
  text_BLE = rng.standard_normal((2, 7, 8)).astype(np.float16)
  text_BLE[:, :3, 5:] = 0.0
  cond = {
    "text": text_BLE,
    "pooled": rng.standard_normal((2, 6)).astype(np.float16),
    "text_mask": rng.integers(0, 2, (2, 7)).astype(bool),
  }
  apart = texts.apart(cond)
  fields = {f.name: f.shape for f in texts.fields("float16")}
  assert fields == {name: value.shape[1:] for name, value in apart.items()}
  assert fields["text.clip_g"] == (3, 3) and "pooled.t5" not in fields
  together = texts.together({**apart, "label": 3})
  assert sorted(together) == sorted(cond)
  for key in cond:
    np.testing.assert_array_equal(together[key], cond[key])
