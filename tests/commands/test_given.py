"""The arrays that `sample` is given: what the network cannot take is named."""

import types
import zipfile

import numpy as np
import pytest

from flowjax import errors
from flowjax.commands import given

ROWS, LENGTH = 2, 3
MODEL = types.SimpleNamespace(
  text_width=6, pooled_width=5, image_size=(4, 8), channels=2
)
READS_TEXT = types.SimpleNamespace(
  config=types.SimpleNamespace(model=MODEL),
  run=types.SimpleNamespace(
    network=types.SimpleNamespace(
      config=MODEL,
      example=lambda batch: {"text": np.zeros((batch, LENGTH, 6))},
    )
  ),
)


def of_texts(**changes):
  rng = np.random.default_rng(0)
  arrays = {
    "text": rng.standard_normal((ROWS, LENGTH, 6)),
    "pooled": rng.standard_normal((ROWS, 5)).astype(np.float16),
    **changes,
  }
  return {key: value for key, value in arrays.items() if value is not None}


def read(tmp_path, arrays):
  np.savez(tmp_path / "texts.npz", **arrays)
  return given.texts(tmp_path / "texts.npz", READS_TEXT)


NEGATIVE = {
  "negative_text": np.ones((ROWS, LENGTH, 6)),
  "negative_pooled": np.ones((ROWS, 5)),
}
MASK = np.array([[1, 1, 0], [1, 0, 0]])


def test_texts_come_through_in_float32(tmp_path):
  arrays = of_texts()
  found = read(tmp_path, arrays)
  assert sorted(found) == ["pooled", "text"]
  for key, value in found.items():
    assert value.dtype == np.float32
    np.testing.assert_allclose(value, arrays[key], rtol=1e-6)


@pytest.mark.parametrize("name", ["text_mask", "negative_text_mask"])
def test_what_has_no_mask_beside_one_that_has_is_all_seen(tmp_path, name):
  found = read(tmp_path, of_texts(**NEGATIVE, **{name: MASK}))
  masks = {
    "text_mask": found["text_mask"],
    "negative_text_mask": found["negative"]["text_mask"],
  }
  np.testing.assert_array_equal(masks.pop(name), MASK.astype(bool))
  (other,) = masks.values()
  assert other.dtype == bool and other.shape == MASK.shape and other.all()
  alone = read(tmp_path, of_texts(text_mask=MASK))
  assert sorted(alone) == ["pooled", "text", "text_mask"]


@pytest.mark.parametrize(
  ("changes", "text"),
  [
    (dict(pooled=None), "must hold 'text' and 'pooled'; found text"),
    (dict(caption=np.zeros(2)), "has 'caption'"),
    (dict(text=np.zeros((3, 6))), r"\[3, 6\]; it must be \[N, L, 6\]"),
    (dict(text=np.zeros((2, 3, 4))), r"it must be \[N, L, 6\]"),
    (dict(text=np.zeros((0, 3, 6)), pooled=np.zeros((0, 5))), "at least one"),
    (dict(text=np.zeros((2, 0, 6))), "at least one"),
    (dict(pooled=np.zeros((3, 5))), r"\[3, 5\]; it must be \[2, 5\]"),
    (dict(pooled=np.zeros(5)), r"\[5\]; it must be \[2, 5\]"),
    (dict(pooled=np.float32(1.0)), r"\[\]; it must be \[2, 5\]"),
    (dict(pooled=np.full((2, 5), "a")), "'pooled' holds <U1"),
    (dict(pooled=np.full((2, 5), 1j)), "holds complex128"),
    (dict(pooled=np.full((2, 5), np.inf)), "10 of its 10 numbers are not fin"),
    (dict(pooled=np.full((2, 5), 1e300)), "not finite in float32"),
    (dict(text_mask=np.ones((2, 4))), r"\[2, 4\]; it must be \[2, 3\]"),
    (dict(text_mask=np.ones(3)), r"'text_mask' has the shape \[3\]"),
    (dict(text_mask=2 * MASK), "it goes from 0 to 2"),
    (dict(NEGATIVE, negative_pooled=None), "'negative_text' and 'negative_po"),
    (dict(NEGATIVE, negative_text=None), "'negative_text' and 'negative_poo"),
    (dict(negative_text_mask=MASK), "'negative_text' and 'negative_pooled'"),
    (
      dict(NEGATIVE, negative_text=np.ones((2, 4, 6))),
      r"'negative_text' has the shape \[2, 4, 6\]; it must be \[2, 3, 6\]",
    ),
    (dict(NEGATIVE, negative_text=np.ones((1, 3, 6))), "'negative_text' has"),
  ],
)
def test_texts_that_cannot_be_told_are_refused(tmp_path, changes, text):
  with pytest.raises(errors.UserError, match=text):
    read(tmp_path, of_texts(**changes))


def test_a_file_that_is_no_archive_of_arrays_is_refused(tmp_path):
  path = tmp_path / "texts.npz"
  with path.open("wb") as file:
    np.save(file, np.zeros(3))
  with pytest.raises(errors.UserError, match="holds one array"):
    given.texts(path, READS_TEXT)
  path.write_bytes(b"no archive")
  with pytest.raises(errors.UserError, match="cannot be read"):
    given.texts(path, READS_TEXT)
  with zipfile.ZipFile(path, "w") as archive:
    for key in ("text", "pooled"):
      archive.writestr(f"{key}.npy", b"not an array")
  with pytest.raises(errors.UserError, match="'text' has the shape"):
    given.texts(path, READS_TEXT)


@pytest.mark.parametrize(
  ("array", "text"),
  [
    (np.zeros((4, 8, 2)), r"\[4, 8, 2\]; it must be \[N, 4, 8, 2\]"),
    (np.zeros((1, 8, 4, 2)), r"it must be \[N, 4, 8, 2\]"),
    (np.zeros((0, 4, 8, 2)), "at least one"),
    (np.zeros(()), r"has the shape \[\]"),
    (np.full((1, 4, 8, 2), "a"), "holds <U1"),
    (np.full((1, 4, 8, 2), 1j), "must hold real numbers"),
    (np.full((1, 4, 8, 2), np.nan), "64 of its 64 numbers are not finite"),
  ],
)
def test_a_start_that_is_none_is_refused(tmp_path, array, text):
  np.save(tmp_path / "start.npy", array)
  with pytest.raises(errors.UserError, match=text):
    given.start(tmp_path / "start.npy", READS_TEXT)


def test_a_start_is_one_array(tmp_path):
  np.save(tmp_path / "start.npy", np.ones((3, 4, 8, 2), np.int8))
  start = given.start(tmp_path / "start.npy", READS_TEXT)
  assert start.shape == (3, 4, 8, 2) and start.dtype == np.float32
  np.savez(tmp_path / "start.npz", a=start, b=start)
  with pytest.raises(errors.UserError, match="holds several arrays"):
    given.start(tmp_path / "start.npz", READS_TEXT)


def told_sizes(told=True, **flags):
  model = types.SimpleNamespace(image_size=(4, 8), size_conditioning=told)
  config = types.SimpleNamespace(
    model=model, data=types.SimpleNamespace(source="digits")
  )
  found = types.SimpleNamespace(
    config=config,
    run=types.SimpleNamespace(experiment=config),
    directory="runs/x",
  )
  args = types.SimpleNamespace(original_size=None, crop=None)
  vars(args).update(flags)
  return given.sizes(args, found, 2)


def test_sizes_are_those_that_are_drawn_unless_they_are_given():
  plain = told_sizes()["size_crop"]
  np.testing.assert_array_equal(plain, [[4, 8, 0, 0, 4, 8]] * 2)
  given_ones = told_sizes(original_size=(64, 32), crop=(5, 0))["size_crop"]
  np.testing.assert_array_equal(given_ones, [[64, 32, 5, 0, 4, 8]] * 2)
  assert told_sizes(told=False) == {}
  with pytest.raises(errors.UserError, match="--original-size and --crop"):
    told_sizes(told=False, crop=(5, 0))
