"""Files of ours are files of safetensors' own library, and the other way."""

import json
import os
import struct

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy

from flowjax import errors
from flowjax.interop import safetensors as ours

TENSORS = {
  "b.weight": np.linspace(-3, 3, 15, dtype=np.float32).reshape(5, 3),
  "a.bias": np.array([1e-8, 0.1, -2.5], np.float32),
  "scalar": np.array(0.3, np.float32),
}
SHAPES = {key: value.shape for key, value in TENSORS.items()}


@pytest.fixture
def path(tmp_path):
  return tmp_path / "model.safetensors"


def write(path, dtype="float32", tensors=TENSORS):
  ours.write(path, SHAPES, tensors.items(), dtype=dtype)


def test_their_library_reads_what_we_write(path):
  write(path)
  theirs = safetensors.numpy.load_file(path)
  assert theirs.keys() == TENSORS.keys()
  for key, tensor in TENSORS.items():
    np.testing.assert_array_equal(theirs[key], tensor)
  with safetensors.safe_open(path, "np") as file:
    assert file.metadata() == {"format": "pt"}


def test_we_read_what_their_library_writes(path):
  safetensors.numpy.save_file(TENSORS, path)
  tensors = ours.read(path)
  assert tensors.keys() == TENSORS.keys()
  for key, tensor in TENSORS.items():
    np.testing.assert_array_equal(tensors[key], tensor)


@pytest.mark.parametrize("name", ours.DTYPES)
def test_each_dtype_comes_back_as_it_was_rounded(path, name):
  write(path, name)
  dtype = ours.DTYPES[name][1]
  for key, tensor in ours.read(path).items():
    assert tensor.dtype == dtype
    np.testing.assert_array_equal(tensor, TENSORS[key].astype(dtype))


def test_bfloat16_is_what_torch_reads(path):
  torch = pytest.importorskip("torch")
  import safetensors.torch

  write(path, "bfloat16")
  tensor = safetensors.torch.load_file(path)["b.weight"]
  assert tensor.dtype == torch.bfloat16
  expected = TENSORS["b.weight"].astype(ml_dtypes.bfloat16)
  np.testing.assert_array_equal(tensor.float().numpy(), expected)


def test_a_value_beyond_float16_is_named(path):
  large = TENSORS | {"a.bias": np.array([1.0, 1e5, 0.0], np.float32)}
  with pytest.raises(errors.UserError, match="a.bias holds 1e.05"):
    write(path, "float16", large)


def test_a_file_cut_short_names_the_key(path):
  write(path)
  path.write_bytes(path.read_bytes()[:-4])
  with pytest.raises(errors.CheckpointError, match="scalar should hold 4"):
    ours.read(path)


def test_a_header_that_lies_about_a_shape_names_the_key(path):
  write(path)
  content = path.read_bytes()
  path.write_bytes(content.replace(b"[5,3]", b"[5,9]"))
  with pytest.raises(errors.CheckpointError, match="b.weight should hold 180"):
    ours.read(path)


def test_an_unknown_dtype_names_the_key(path):
  safetensors.numpy.save_file({"steps": np.arange(3)}, path)
  with pytest.raises(
    errors.CheckpointError, match="steps is of type I64.*Save them"
  ):
    ours.read(path)


@pytest.mark.parametrize(
  "content",
  [
    b"short",
    struct.pack("<Q", 1 << 40) + b"{}",
    struct.pack("<Q", 4) + b"PK\x03\x04",
  ],
)
def test_another_kind_of_file_is_refused(path, content):
  path.write_bytes(content)
  with pytest.raises(errors.CheckpointError, match="is not a safetensors file"):
    ours.read(path)


def test_the_tensors_are_aligned(path):
  write(path)
  content = path.read_bytes()
  (length,) = struct.unpack("<Q", content[:8])
  assert length % 8 == 0
  assert json.loads(content[8 : 8 + length])["b.weight"]["shape"] == [5, 3]


@pytest.mark.parametrize(
  "offsets, text",
  [([8, 20], "overlap"), ([16, 28], "leave bytes that belong to none")],
)
def test_every_byte_belongs_to_one_tensor(path, offsets, text):
  tensors = {"a": np.ones(3, np.float32), "b": np.ones(4, np.float32)}
  safetensors.numpy.save_file(tensors, path)
  content = path.read_bytes()
  (length,) = struct.unpack("<Q", content[:8])
  header = json.loads(content[8 : 8 + length])
  header["b"] = {"dtype": "F32", "shape": [3], "data_offsets": offsets}
  new = json.dumps(header).encode()
  path.write_bytes(struct.pack("<Q", len(new)) + new + content[8 + length :])
  with pytest.raises(errors.CheckpointError, match=text):
    ours.read(path)


def test_what_is_not_wanted_may_be_of_any_type(path):
  safetensors.numpy.save_file({"w": np.ones(2), "steps": np.arange(3)}, path)
  assert sorted(ours.keys(path)) == ["steps", "w"]
  assert ours.read(path, lambda key: False) == {}


@pytest.mark.parametrize(
  "name, wanted",
  [
    ("pytorch_model.bin", "model"),
    ("diffusion_pytorch_model.bin", "diffusion_pytorch_model"),
    # Not over the pickle itself.
    ("model.safetensors", "model_converted"),
  ],
)
def test_a_pickle_is_to_be_saved_under_the_name_that_is_read(
  tmp_path, name, wanted
):
  (tmp_path / name).write_bytes(b"PK\x03\x04")
  with pytest.raises(errors.UserError, match=f'"{wanted}.safetensors"'):
    ours.refuse_pickle(tmp_path / name)


def test_a_length_that_looks_like_a_pickle_is_none(path):
  """A header of 640 bytes begins as a pickle of protocol 2: 80 02."""
  header = {"__metadata__": {"format": "pt"}}
  header["a"] = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
  text = json.dumps(header).encode().ljust(640)
  start = struct.pack("<Q", len(text))
  assert start[:2] == b"\x80\x02"
  path.write_bytes(start + text + np.float32(0.5).tobytes())
  assert ours.read(path)["a"] == 0.5
  path.write_bytes(b"\x80\x02}q\x00X\x01\x00\x00\x00a")
  with pytest.raises(errors.UserError, match="is a pickle"):
    ours.read(path)


def test_a_file_that_is_cut_while_it_is_read_is_told(path):
  write(path)
  tensors = ours.read(path)
  path.write_bytes(path.read_bytes()[:-1])
  with pytest.raises(errors.CheckpointError, match="cut short while it was"):
    for tensor in tensors.values():
      ours.touch(tensor)


def test_a_file_gives_little_at_a_time(path, monkeypatch):
  write(path)
  read = os.preadv
  monkeypatch.setattr(
    os, "preadv", lambda file, rooms, at: read(file, [rooms[0][:7]], at)
  )
  for key, tensor in ours.read(path).items():
    np.testing.assert_array_equal(ours.touch(tensor), TENSORS[key])


def test_what_takes_the_name_of_a_file_is_not_read_for_it(path):
  write(path)
  tensors = ours.read(path)
  other = path.with_name("other.safetensors")
  write(other)
  other.rename(path)
  with pytest.raises(errors.CheckpointError, match="was replaced while"):
    ours.touch(tensors["b.weight"])
  path.unlink()
  with pytest.raises(errors.CheckpointError, match="cannot be read"):
    ours.touch(tensors["b.weight"])


def test_a_disk_that_fails_is_told(path, monkeypatch):
  write(path)
  tensors = ours.read(path)

  def fail(*unused):
    raise OSError(5, "Input/output error")

  monkeypatch.setattr(os, "preadv", fail)
  with pytest.raises(errors.CheckpointError, match="cannot be read: .*Input"):
    ours.touch(tensors["b.weight"])
