"""A folder is complete or untouched, whatever goes wrong."""

import json
import os

import pytest

from flowjax import errors
from flowjax.interop import files


def export(directory, text, *, fail=None):
  folder = files.export_folder(directory, format="ours-1", marker="config.json")
  with folder as new:
    (new / "weights").write_text(text)
    (new / "config.json").write_text(json.dumps({"format": "ours-1"}))
    if fail:
      raise fail


def names(directory):
  return sorted(path.name for path in directory.iterdir())


@pytest.fixture
def out(tmp_path):
  return tmp_path / "new" / "export"


def test_writes_a_folder_with_its_parents(out):
  export(out, "one")
  assert names(out) == ["config.json", "weights"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError()])
def test_interrupted_it_leaves_nothing(out, error):
  with pytest.raises(type(error)):
    export(out, "one", fail=error)
  assert not out.exists()


def test_interrupted_it_leaves_the_earlier_export(out):
  export(out, "one")
  with pytest.raises(RuntimeError):
    export(out, "two", fail=RuntimeError())
  assert names(out) == ["config.json", "weights"]
  assert (out / "weights").read_text() == "one"


def test_a_full_disk_is_told(out):
  full = OSError(28, "No space left on device")
  with pytest.raises(errors.UserError, match="No space left.*another folder"):
    export(out, "one", fail=full)
  assert not out.exists()


def test_replaces_an_earlier_export_and_keeps_what_lies_beside(out):
  export(out, "one")
  (out / "grid.png").write_text("a picture")
  export(out, "two")
  assert (out / "weights").read_text() == "two"
  assert (out / "grid.png").read_text() == "a picture"


def test_a_folder_killed_while_files_moved_is_not_complete_and_is_ours(
  out, monkeypatch
):
  export(out, "one")
  moved = []

  def replace(source, target):
    if moved:
      raise KeyboardInterrupt
    moved.append(target)
    os.rename(source, target)

  with monkeypatch.context() as patch:
    patch.setattr(files.os, "replace", replace)
    with pytest.raises(KeyboardInterrupt):
      export(out, "two")
  assert files.format_of(out / "config.json") is None
  export(out, "three")
  assert (out / "weights").read_text() == "three"
  assert names(out) == ["config.json", "weights"]


@pytest.mark.parametrize("marker", [None, "{}", "[1]", "not json"])
def test_refuses_the_folder_of_a_stranger(tmp_path, marker):
  (tmp_path / "thesis.tex").write_text("years of work")
  if marker:
    (tmp_path / "config.json").write_text(marker)
  with pytest.raises(errors.UserError, match="no earlier export.*thesis.tex"):
    export(tmp_path, "one")
  assert "weights" not in names(tmp_path)


def test_refuses_a_file(tmp_path):
  (tmp_path / "out").write_text("")
  with pytest.raises(errors.UserError, match="is a file"):
    export(tmp_path / "out", "one")


def test_an_empty_folder_will_do(tmp_path):
  export(tmp_path, "one")
  assert names(tmp_path) == ["config.json", "weights"]
