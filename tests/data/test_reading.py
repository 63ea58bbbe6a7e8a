"""What becomes of corrupt records: named, replaced and counted, or refused."""

import itertools
import logging

import numpy as np
import PIL.Image
import pytest

from flowjax import errors
from flowjax.data import config as config_lib
from flowjax.data import loader, reading, sources

COUNT = 12


@pytest.fixture
def folder(tmp_path):
  """Twelve images of one class, each of its own shade."""
  (tmp_path / "a").mkdir()
  for i in range(COUNT):
    shade = np.full((4, 4), 20 * i, np.uint8)
    PIL.Image.fromarray(shade).save(tmp_path / f"a/{i:02d}.png")
  reading._warn.cache_clear()
  return tmp_path


def spoil(folder, *numbers) -> None:
  for i in numbers:
    (folder / f"a/{i:02d}.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")


def config_of(folder, **changes):
  values = {"image_size": (4, 4), "batch_size": COUNT, "held_out": 0.0}
  return config_lib.DataConfig(source=f"folder:{folder}", **(values | changes))


def shades(image_BHWC) -> np.ndarray:
  return np.round((image_BHWC[:, 0, 0, 0] + 1) * 127.5 / 20).astype(int)


def epochs(config, count=3):
  source = sources.open(config, "train")
  return list(itertools.islice(loader.batches(source, config), count))


def test_sound_files_are_not_counted(folder):
  for batch in epochs(config_of(folder)):
    assert sorted(shades(batch["image"])) == list(range(COUNT))
    assert batch["skipped"].dtype == np.int32 and not batch["skipped"].any()


def test_a_corrupt_image_is_replaced_by_the_next_sound_one_and_counted(folder):
  sound = [shades(b["image"]) for b in epochs(config_of(folder))]
  spoil(folder, 3, 4, 11)
  replaced = {3: 5, 4: 5, 11: 0}

  for before, batch in zip(sound, epochs(config_of(folder)), strict=True):
    expected = [replaced.get(i, i) for i in before]
    np.testing.assert_array_equal(shades(batch["image"]), expected)
    marks = [int(i in replaced) for i in before]
    np.testing.assert_array_equal(batch["skipped"], marks)


def test_a_skipped_image_is_named_once(folder, caplog):
  spoil(folder, 3)
  with caplog.at_level(logging.WARNING):
    epochs(config_of(folder))
  (record,) = caplog.records
  assert str(folder / "a/03.png") in record.getMessage()


def test_a_corrupt_image_stops_the_run_if_that_is_asked_for(folder):
  config = config_of(folder, on_corrupt="stop")
  for batch in epochs(config):
    assert set(batch) == {"image", "label"}

  spoil(folder, 3)
  with pytest.raises(errors.DataError) as caught:
    epochs(config)
  assert str(folder / "a/03.png") in str(caught.value)
  assert "on_corrupt='skip'" in str(caught.value)


def test_too_many_in_a_row_are_no_accident(folder, monkeypatch):
  spoil(folder, 5, 6, 7)
  monkeypatch.setattr(reading, "IN_A_ROW", 3)
  with pytest.raises(errors.DataError, match="3 records in a row .*a/07.png"):
    epochs(config_of(folder))

  monkeypatch.setattr(reading, "IN_A_ROW", 4)
  assert epochs(config_of(folder))[0]["skipped"].sum() == 3


def test_a_source_of_which_nothing_is_left_stops(folder):
  spoil(folder, *range(COUNT))
  with pytest.raises(errors.DataError, match="12 records in a row"):
    epochs(config_of(folder))


def test_an_epoch_masks_what_is_corrupt(folder):
  spoil(folder, 2, 11)
  source = sources.open(config_of(folder), "train")

  batches = list(loader.epoch_batches(source, 5))

  mask_N = np.concatenate([b["mask"] for b in batches])
  np.testing.assert_array_equal(
    np.flatnonzero(mask_N == 0), [2, 11, 12, 13, 14]
  )
  image_NHWC = np.concatenate([b["image"] for b in batches])
  left = [i for i in range(COUNT) if i not in (2, 11)]
  assert list(shades(image_NHWC)[mask_N == 1]) == left


def test_an_epoch_stops_if_that_is_asked_for(folder):
  spoil(folder, 2)
  source = sources.open(config_of(folder), "train")
  with pytest.raises(errors.DataError, match="a/02.png"):
    list(loader.epoch_batches(source, 5, on_corrupt="stop"))


def test_an_epoch_without_one_sound_record_is_refused(folder):
  spoil(folder, *range(COUNT))
  source = sources.open(config_of(folder), "train")
  with pytest.raises(errors.DataError, match="All 12 records"):
    list(loader.epoch_batches(source, 5))
