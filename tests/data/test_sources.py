import sys

import pytest

from flowjax import errors, schema
from flowjax.data import config as config_lib
from flowjax.data import sources


@pytest.mark.parametrize(
  "name, hint",
  [
    ("digit", "Did you mean 'digits'?"),
    ("tdfs:mnist", "Did you mean 'tfds'?"),
    ("tfds", "tfds:<name>"),
    ("folder:", "folder:<dir>"),
    ("scenes:8", "scenes"),
  ],
)
def test_an_unknown_source_names_the_closest(name, hint):
  with pytest.raises(errors.UserError) as caught:
    sources.open(config_lib.DataConfig(source=name), "train")
  assert repr(name) in str(caught.value) and hint in str(caught.value)


def test_an_unknown_split_is_refused():
  with pytest.raises(ValueError, match="held_out"):
    sources.open(config_lib.DataConfig(), "test")


@pytest.mark.parametrize(
  "change, error, text",
  [
    ({"num_classes": 9}, errors.DataError, "num_classes=10"),
    ({"channels": 3}, errors.UserError, "8x8x3"),
    ({"image_size": (8, 16)}, errors.UserError, "8x16x1"),
  ],
)
def test_a_model_of_another_size_is_refused(change, error, text):
  source = sources.open(config_lib.DataConfig(), "held_out")
  model = {"num_classes": 10, "channels": 1, "image_size": (8, 8)}
  model["batch_size"] = 8

  sources.check(source, **model)
  with pytest.raises(error, match=text):
    sources.check(source, **(model | change))


@pytest.mark.parametrize(
  "key, value",
  [
    ("image_size", (0, 8)),
    ("batch_size", 0),
    ("channels", 0),
    ("prefetch", 0),
    ("workers", -1),
    ("shuffle_seed", -1),
    ("on_corrupt", "ignore"),
    ("held_out", 1.0),
    ("held_out", -0.1),
  ],
)
def test_an_impossible_value_is_refused_with_its_key(key, value):
  with pytest.raises(errors.UserError, match=f"config.data: {key}="):
    schema.build(config_lib.DataConfig, {key: value}, "config.data")


def test_a_missing_scikit_learn_says_what_to_install(monkeypatch):
  monkeypatch.setitem(sys.modules, "sklearn", None)
  with pytest.raises(errors.UserError, match=r"pip install -e '.\[demo\]'"):
    sources.open(config_lib.DataConfig(), "train")


def test_a_missing_tfds_says_what_to_install(monkeypatch):
  monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
  with pytest.raises(errors.UserError, match=r"pip install -e '.\[tfds\]'"):
    sources.open(config_lib.DataConfig(source="tfds:mnist"), "train")


def test_a_missing_pillow_says_what_to_install(monkeypatch, tmp_path):
  monkeypatch.setitem(sys.modules, "PIL", None)
  config = config_lib.DataConfig(source=f"folder:{tmp_path}")
  with pytest.raises(errors.UserError, match="pip install pillow"):
    sources.open(config, "train")


def test_what_is_allowed_and_unusual_is_said(caplog):
  source = sources.open(config_lib.DataConfig(), "held_out")
  model = {"channels": 1, "image_size": (8, 8)}
  sources.check(source, **model, num_classes=10, batch_size=8)
  assert not caplog.records
  sources.check(source, **model, num_classes=12, batch_size=8)
  assert "config.model.num_classes=10 would do" in caplog.text
  sources.check(source, **model, num_classes=10, batch_size=1000)
  assert "more than once" in caplog.text
