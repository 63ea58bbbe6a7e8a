"""A run's config outlives the version that wrote it, and damage is named."""

import json

import pytest

from flowjax import errors, schema
from flowjax.train import experiment, workdir

_VALUES = experiment.defaults()
_VALUES.update(
  model={"image_size": (8, 8), "channels": 1}, data={"image_size": (8, 8)}
)
CONFIG = experiment.build(_VALUES)


def write(directory, change, *, reseal=False):
  """Changes config.json; resealed it is as an earlier version wrote it."""
  workdir.claim(directory, CONFIG)
  path = directory / "config.json"
  values = json.loads(path.read_text())
  seal = values.pop(workdir.SEAL)
  change(values)
  if reseal:
    seal["checksum"] = workdir._checksum(values)
  path.write_text(json.dumps({workdir.SEAL: seal, **values}))


def test_a_config_comes_back(tmp_path):
  workdir.claim(tmp_path, CONFIG)
  assert workdir.read_config(tmp_path) == CONFIG
  assert not workdir.changes(tmp_path, CONFIG)


def test_a_key_that_is_newer_than_the_run_has_its_default(tmp_path):
  def older(values):
    del values["sample"]["path"], values["optim"]["clip_norm"]

  write(tmp_path, older, reseal=True)
  assert workdir.read_config(tmp_path) == CONFIG
  assert not workdir.changes(tmp_path, CONFIG)


def test_what_was_written_before_there_was_a_seal_is_read(tmp_path):
  values = schema.to_dict(CONFIG)
  del values["sample"]["path"]
  values["flow"]["distance"] = "l2_cosine"  # Before it was a group.
  (tmp_path / "config.json").write_text(json.dumps(values))
  found = workdir.read_config(tmp_path)
  assert found.sample == CONFIG.sample
  assert found.flow.distance.name == "l2_cosine"


def test_a_key_that_was_lost_is_named(tmp_path):
  write(tmp_path, lambda values: values["optim"].pop("clip_norm"))
  with pytest.raises(errors.UserError, match="config.optim.clip_norm is miss"):
    workdir.read_config(tmp_path)


@pytest.mark.parametrize("seal", ["sound", 1, [], {}])
def test_a_seal_that_is_none_is_broken(tmp_path, seal):
  values = schema.to_dict(CONFIG)
  path = tmp_path / "config.json"
  path.write_text(json.dumps({workdir.SEAL: seal, **values}))
  assert workdir.read_config(tmp_path) == CONFIG
  del values["optim"]["clip_norm"]
  path.write_text(json.dumps({workdir.SEAL: seal, **values}))
  with pytest.raises(errors.UserError, match="config.optim.clip_norm is miss"):
    workdir.read_config(tmp_path)


def test_the_folder_of_something_else_is_no_workdir(tmp_path):
  workdir.require_no_other(tmp_path)
  workdir.claim(tmp_path, CONFIG)
  path = tmp_path / "config.json"
  values = json.loads(path.read_text())
  workdir.require_no_other(tmp_path)
  # Before there was a seal; and sealed, with a key that is of no config.
  for change in (lambda v: v.pop("flowjax"), lambda v: v.update(a=1)):
    changed = dict(values)
    change(changed)
    path.write_text(json.dumps(changed))
    workdir.require_no_other(tmp_path)
  for text in ('{"a": 1}', '{"_class_name": "DiTTransformer2DModel"}'):
    path.write_text(text)
    with pytest.raises(errors.UserError, match="of something else"):
      workdir.require_no_other(tmp_path)
    assert path.read_text() == text


def test_a_value_may_be_edited(tmp_path):
  write(tmp_path, lambda values: values["sample"].update(steps=7))
  assert workdir.read_config(tmp_path).sample.steps == 7


def test_what_would_be_computed_may_not_change(tmp_path):
  write(tmp_path, lambda values: values.update(seed=5), reseal=True)
  assert workdir.changes(tmp_path, CONFIG) == ["config.seed: 5 -> 0"]
