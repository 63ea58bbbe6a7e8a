"""Reads a real data set in array_record files, prepared here by a builder."""

import io
import json
import pathlib
import pickle
import shutil
import sys

import numpy as np
import PIL.Image
import pytest

from flowjax import errors
from flowjax.data import config as config_lib
from flowjax.data import loader, sources

tfds = pytest.importorskip("tensorflow_datasets")

CORRUPT = 5  # The record of "spoilt" that is no image.


def encoded(value: int, size=(9, 11)) -> bytes:
  file = io.BytesIO()
  PIL.Image.fromarray(np.full((*size, 3), value, np.uint8)).save(file, "PNG")
  return file.getvalue()


class HouseShades(
  tfds.core.GeneratorBasedBuilder,
  skip_registration=True,  # So that only its files are known, not its code.
):
  """Even images whose shade is their number and tells their class."""

  VERSION = tfds.core.Version("1.2.0")
  BUILDER_CONFIGS = [
    tfds.core.BuilderConfig(name="usual", description="image and label"),
    tfds.core.BuilderConfig(name="other", description="picture and kind"),
    tfds.core.BuilderConfig(name="bare", description="no label"),
    tfds.core.BuilderConfig(name="told", description="texts and label"),
  ]

  def _keys(self):
    return {
      "usual": ("image", "label"),
      "other": ("picture", "kind"),
      "bare": ("image", None),
      "told": ("image", "label"),
    }[self.builder_config.name]

  def _info(self):
    image, label = self._keys()
    features = {
      image: tfds.features.Image(shape=(None, None, 3)),
      "thumbnail": tfds.features.Image(shape=(None, None, 3)),
      "number": np.int64,
    }
    if image != "image":
      del features["thumbnail"]
    if self.builder_config.name == "told":
      features["said"] = tfds.features.Text()
    if label:
      features[label] = tfds.features.ClassLabel(names=["a", "b", "c"])
    return tfds.core.DatasetInfo(
      builder=self,
      features=tfds.features.FeaturesDict(features),
      disable_shuffling=True,
    )

  def _split_generators(self, dl_manager):
    del dl_manager
    return {
      "train": self._generate_examples(30),
      "validation": self._generate_examples(7),
      "spoilt": self._generate_examples(12, corrupt=CORRUPT),
      "unlabelled": self._generate_examples(4, label=-1),
    }

  def _generate_examples(self, count, corrupt=None, label=None):
    image_key, label_key = self._keys()
    for i in range(count):
      content = b"no image" if i == corrupt else encoded(i)
      example = {image_key: content, "number": i}
      if image_key == "image":
        example["thumbnail"] = encoded(0, (2, 2))
      if label_key:
        example[label_key] = i % 3 if label is None else label
      if self.builder_config.name == "told":
        example["said"] = f"Häuschen {i} 赤"
      yield i, example


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory) -> str:
  path = str(tmp_path_factory.mktemp("tfds"))
  tfds.disable_progress_bar()
  for name in ("usual", "other", "bare", "told"):
    builder = HouseShades(
      data_dir=path, config=name, file_format="array_record"
    )
    builder.download_and_prepare(
      download_config=tfds.download.DownloadConfig(num_shards=2)
    )
  return path


def config_of(data_dir, name="usual:1.2.0", **changes):
  values = {"image_size": (4, 4), "channels": 3, "data_dir": data_dir}
  return config_lib.DataConfig(
    source=f"tfds:house_shades/{name}", **(values | changes)
  )


def shade(example) -> int:
  (value,) = np.unique(example["image"].round(6))
  return round(float(value + 1) * 127.5)


def test_the_builder_reads_back_what_was_written(data_dir):
  source = sources.open(config_of(data_dir), "train")

  assert len(source) == 30 and source.num_classes == 3
  assert source.class_names == ("a", "b", "c")
  assert source[0]["image"].shape == (4, 4, 3)
  assert source[0]["image"].dtype == np.float32
  assert [shade(source[i]) for i in range(30)] == list(range(30))
  assert [int(source[i]["label"]) for i in range(30)] == [0, 1, 2] * 10
  assert source.name == "tfds:house_shades/usual/1.2.0[train]"


def test_no_tensorflow_is_needed(data_dir, monkeypatch):
  monkeypatch.setitem(sys.modules, "tensorflow", None)
  assert shade(sources.open(config_of(data_dir), "train")[3]) == 3


def test_held_out_is_the_split_that_the_config_names(data_dir):
  assert len(sources.open(config_of(data_dir), "held_out")) == 7
  config = config_of(data_dir, train_split="train[:50%]", channels=1)
  config_rest = config_of(data_dir, eval_split="train[50%:]", channels=1)
  train = sources.open(config, "train")
  rest = sources.open(config_rest, "held_out")

  shades = [shade(train[i]) for i in range(len(train))]
  others = [shade(rest[i]) for i in range(len(rest))]
  assert sorted(shades + others) == list(range(30))
  assert train.fingerprint()["hash"] != rest.fingerprint()["hash"]


def test_the_only_image_and_label_need_no_usual_name(data_dir):
  source = sources.open(config_of(data_dir, "other"), "train")
  assert shade(source[7]) == 7 and int(source[7]["label"]) == 1


def test_texts_are_read_where_the_config_asks_for_them(data_dir):
  labelled = sources.open(config_of(data_dir, "told"), "train")
  assert labelled.num_classes == 3
  for asked in ({"captions": True}, {"caption_key": "said"}):
    source = sources.open(config_of(data_dir, "told", **asked), "train")
    assert source.num_classes == 0 and shade(source[7]) == 7
    assert source[7]["caption"] == "Häuschen 7 赤"
  assert source.fingerprint() != labelled.fingerprint()
  with pytest.raises(errors.DataError, match="'number' of the kind Text"):
    sources.open(config_of(data_dir, "told", caption_key="number"), "train")
  with pytest.raises(errors.DataError, match="of the kind Text, and has none"):
    sources.open(config_of(data_dir, captions=True), "train")


def test_templates_make_texts_of_its_labels(data_dir):
  config = config_of(data_dir, templates=("a house of shade {}",))
  assert sources.open(config, "train")[4]["caption"] == "a house of shade b"


def test_it_survives_the_way_to_a_worker(data_dir):
  source = sources.open(config_of(data_dir), "train")
  copy = pickle.loads(pickle.dumps(source))
  assert shade(copy[11]) == 11 and copy.fingerprint() == source.fingerprint()


def test_what_goes_to_a_worker_needs_no_code_of_the_data_set(data_dir):
  class HouseShades(tfds.core.GeneratorBasedBuilder):  # Now it is registered.
    VERSION = tfds.core.Version("1.2.0")
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name="usual")]

    def _info(self):
      return tfds.core.DatasetInfo(builder=self)

    def _split_generators(self, dl_manager): ...
    def _generate_examples(self): ...

  try:
    source = sources.open(config_of(data_dir, "usual"), "train")
  finally:
    del tfds.core.registered._DATASET_REGISTRY["house_shades"]
  assert shade(pickle.loads(pickle.dumps(source))[11]) == 11


def test_batches_hold_each_record_once_an_epoch(data_dir):
  config = config_of(data_dir, batch_size=10)
  batches = loader.batches(sources.open(config, "train"), config)
  shades = [
    shade({"image": i}) for _ in range(3) for i in next(batches)["image"]
  ]
  assert sorted(shades) == list(range(30)) != shades


def test_a_corrupt_record_is_named_by_file_and_number(data_dir):
  source = sources.open(config_of(data_dir, train_split="spoilt"), "train")
  with pytest.raises(sources.Corrupt) as caught:
    source[CORRUPT]
  name = "house_shades-spoilt.array_record-00000-of-00002"
  assert name in str(caught.value) and f"Record {CORRUPT} of" in str(
    caught.value
  )


def test_a_record_of_a_later_shard_is_counted_from_its_start(data_dir):
  config = config_of(data_dir, train_split="spoilt[3:]")
  source = sources.open(config, "train")
  with pytest.raises(sources.Corrupt, match=f"Record {CORRUPT} of .*00000-of"):
    source[CORRUPT - 3]
  assert source._place(8).startswith("Record 5 of ")  # 12 records in 2 files.
  assert source._place(8).endswith("00001-of-00002")


def test_broken_bytes_on_disk_are_corrupt_records(data_dir, tmp_path):
  copy = shutil.copytree(data_dir, tmp_path / "copy")
  (shard,) = copy.glob("**/usual/**/*train.array_record-00000-of-*")
  content = bytearray(shard.read_bytes())
  for i in range(1000, 1300):
    content[i] ^= 0xFF
  shard.write_bytes(content)
  source = sources.open(config_of(str(copy)), "train")

  broken = []
  for i in range(len(source)):
    try:
      assert shade(source[i]) == i
    except sources.Corrupt as error:
      assert str(shard) in str(error)
      broken.append(i)

  assert 1 <= len(broken) < 15


def test_a_label_out_of_range_is_refused(data_dir):
  source = sources.open(config_of(data_dir, train_split="unlabelled"), "train")
  with pytest.raises(errors.DataError, match="label -1"):
    source[0]


def refused(config) -> str:
  with pytest.raises(errors.DataError) as caught:
    sources.open(config, "train")
  return str(caught.value)


def test_a_data_set_without_labels_is_refused(data_dir):
  text = refused(config_of(data_dir, "bare"))
  assert "ClassLabel" in text and "number" in text
  alone = sources.open(config_of(data_dir, "bare", images_alone=True), "train")
  assert set(alone[0]) == set(sources.blank(alone)) == {"image"}


def test_a_split_that_is_not_there_names_those_that_are(data_dir):
  text = refused(config_of(data_dir, train_split="test"))
  assert "'test'" in text
  assert "train, validation, spoilt, unlabelled" in text
  assert "config.data.train_split" in text


@pytest.mark.parametrize("name", ["house_shades/usual:3.0.0", "no_such_thing"])
def test_what_is_unknown_says_how_to_prepare_it(data_dir, name):
  config = config_lib.DataConfig(source=f"tfds:{name}", data_dir=data_dir)
  text = refused(config)
  assert f"tfds build {name} --file_format=array_record" in text
  assert f"--data_dir={data_dir}" in text


def test_a_data_set_that_is_known_but_not_prepared_says_so(tmp_path):
  config = config_lib.DataConfig(source="tfds:mnist", data_dir=str(tmp_path))
  text = refused(config)
  assert "is not prepared" in text and "tfds build mnist" in text


def test_files_without_random_access_are_refused(data_dir, tmp_path):
  copy = shutil.copytree(data_dir, tmp_path / "copy")
  info = pathlib.Path(copy, "house_shades/usual/1.2.0/dataset_info.json")
  content = json.loads(info.read_text()) | {"fileFormat": "tfrecord"}
  info.write_text(json.dumps(content))
  text = refused(config_of(str(copy)))
  assert "tfrecord" in text and "--file_format=array_record" in text


def test_a_missing_shard_is_named_before_training(data_dir, tmp_path):
  copy = shutil.copytree(data_dir, tmp_path / "copy")
  (shard,) = copy.glob("**/usual/**/*train.array_record-00001-of-*")
  shard.unlink()
  assert f"1 of 2 files are missing, the first is {shard}" in refused(
    config_of(str(copy))
  )
