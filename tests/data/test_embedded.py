"""Latents and embedded texts of a folder, for networks that read text."""

import zipfile

import numpy as np
import pytest

from flowjax import errors
from flowjax.data import config as config_lib
from flowjax.data import loader, sources


def config_of(root, **changes) -> config_lib.DataConfig:
  values = {"image_size": (4, 6), "channels": 16, "held_out": 0.0}
  values |= {"batch_size": 4, **changes}
  return config_lib.DataConfig(source=f"embedded:{root}", **values)


def save(root, name, *, tokens=3, **changes):
  rng = np.random.default_rng(abs(hash(name)) % 1000)
  arrays = {
    "image": rng.standard_normal((4, 6, 16)),
    "text": rng.standard_normal((tokens, 5)).astype(np.float16),
    "pooled": rng.standard_normal(7),
    **changes,
  }
  (root / name).parent.mkdir(parents=True, exist_ok=True)
  np.savez(root / name, **{k: v for k, v in arrays.items() if v is not None})
  return arrays


def test_what_a_file_holds_comes_through(tmp_path):
  mask = np.array([1, 1, 0])
  arrays = save(tmp_path, "deep/a.npz", text_mask=mask, other=np.zeros(9))
  source = sources.open(config_of(tmp_path), "train")
  assert len(source) == 1 and source.num_classes == 0
  found = source[0]
  assert sorted(found) == ["image", "pooled", "text", "text_mask"]
  assert found["text_mask"].dtype == bool
  for key in ("image", "text", "pooled"):
    assert found[key].dtype == np.float32
    np.testing.assert_allclose(found[key], arrays[key], rtol=1e-6)


def test_batches_hold_texts_and_the_last_is_filled_up(tmp_path):
  for i in range(6):
    save(tmp_path, f"{i}.npz")
  config = config_of(tmp_path)
  source = sources.open(config, "train")
  batch = next(loader.batches(source, config))
  assert batch["text"].shape == (4, 3, 5) and batch["pooled"].shape == (4, 7)
  first, last = loader.epoch_batches(source, 4)
  assert list(last["mask"]) == [1, 1, 0, 0]
  assert not last["text"][2:].any() and first["text"].all()


@pytest.mark.parametrize(
  ("damage", "text"),
  [
    (dict(text=np.zeros((2, 5))), r"'text' must be of the shape \(3, 5\)"),
    (dict(image=np.zeros((4, 4, 16))), r"\(4, 6, 16\) is asked for"),
    (dict(pooled=None), "has no 'pooled'"),
    (dict(text=np.array([{}], object)), "is corrupt"),
    (dict(text=np.zeros((1, 3, 5))), r"'text' has the shape \(1, 3, 5\)"),
    (dict(pooled=np.zeros((1, 7))), r"must be \[P\], of one example"),
    (dict(pooled=np.array(["a"] * 7)), "'pooled' holds <U1"),
    (dict(text=np.zeros((3, 5), int)), "embeddings, not tokens"),
    (dict(image=np.zeros((4, 6, 16), np.uint8)), "'image' holds uint8"),
    (dict(image=np.full((4, 6, 16), np.nan)), "384 numbers of 'image' are not"),
    (dict(pooled=np.full(7, 1e300)), "7 numbers of 'pooled' are not finite"),
    (dict(text_mask=np.ones(3)), "give all of them a 'text_mask'"),
    (dict(text_mask=np.ones(2)), "of 2 tokens, and 'text' has 3"),
    (dict(text_mask=np.array([0.5, 1, 1])), "must hold true or false"),
    (dict(text_mask=np.array(["a", "b", "c"])), "must hold true or false"),
  ],
)
def test_what_does_not_fit_is_corrupt(tmp_path, damage, text):
  save(tmp_path, "0.npz")
  save(tmp_path, "1.npz", **damage)
  source = sources.open(config_of(tmp_path), "train")
  with pytest.raises(sources.Corrupt, match=text):
    source[1]


def test_a_mask_that_only_the_first_file_has_is_missed(tmp_path):
  save(tmp_path, "0.npz", text_mask=np.array([True, True, False]))
  save(tmp_path, "1.npz")
  source = sources.open(config_of(tmp_path), "train")
  assert source[0]["text_mask"].sum() == 2
  with pytest.raises(sources.Corrupt, match="1.npz holds image, text, pooled,"):
    source[1]


def test_what_is_no_archive_of_arrays_is_corrupt(tmp_path):
  save(tmp_path, "0.npz")
  with open(tmp_path / "1.npz", "wb") as file:
    np.save(file, np.zeros(3))
  with zipfile.ZipFile(tmp_path / "2.npz", "w") as archive:
    for key in ("image", "text", "pooled"):
      archive.writestr(f"{key}.npy", b"not an array")
  rng = np.random.default_rng(0)
  np.savez_compressed(tmp_path / "3.npz", image=rng.integers(0, 9, 9000))
  content = bytearray((tmp_path / "3.npz").read_bytes())
  content[100:400] = bytes(300)
  (tmp_path / "3.npz").write_bytes(content)
  source = sources.open(config_of(tmp_path), "train")
  with pytest.raises(sources.Corrupt, match="one array without a name"):
    source[1]
  with pytest.raises(sources.Corrupt, match="2.npz: 'image' has the shape"):
    source[2]
  with pytest.raises(sources.Corrupt, match="3.npz is corrupt"):
    source[3]


def test_a_first_file_of_another_shape_is_the_data_at_fault(tmp_path):
  save(tmp_path, "0.npz", image=np.zeros((4, 4, 16)))
  save(tmp_path, "1.npz")
  source = sources.open(config_of(tmp_path), "train")
  with pytest.raises(errors.DataError, match="It is the first file"):
    source[1]


def test_a_file_cut_short_is_corrupt_and_if_it_is_the_first_the_data_is(
  tmp_path,
):
  save(tmp_path, "0.npz")
  content = (tmp_path / "0.npz").read_bytes()
  (tmp_path / "1.npz").write_bytes(content[:100])
  source = sources.open(config_of(tmp_path), "train")
  with pytest.raises(sources.Corrupt, match="1.npz is corrupt"):
    source[1]
  (tmp_path / "0.npz").write_bytes(content[:100])
  source = sources.open(config_of(tmp_path), "train")
  with pytest.raises(errors.DataError, match="It is the first file"):
    source[1]


def test_an_empty_folder_is_said_so(tmp_path):
  with pytest.raises(errors.DataError, match="of its 0 .npz files"):
    sources.open(config_of(tmp_path), "train")
  with pytest.raises(errors.DataError, match="no folder"):
    sources.open(config_of(tmp_path / "no"), "train")


def test_texts_and_labels_are_not_taken_for_each_other(tmp_path):
  save(tmp_path, "0.npz")
  source = sources.open(config_of(tmp_path), "train")
  sizes = dict(batch_size=1, channels=16, image_size=(4, 6))
  sources.check(source, num_classes=0, **sizes)
  with pytest.raises(errors.UserError, match="has texts"):
    sources.check(source, num_classes=10, **sizes)
  widths = {key: source.blank[key].shape[-1] for key in ("text", "pooled")}
  for key, width in widths.items():
    sources.check(source, num_classes=0, **sizes, **{f"{key}_width": width})
    with pytest.raises(errors.UserError, match=f"'{key}' is {width} wide"):
      sources.check(source, num_classes=0, **sizes, **{f"{key}_width": 99})
