"""Layouts and images that `sample` is shown, and runs on them scored."""

import json

import numpy as np
import pytest
from PIL import Image

from flowjax import __main__ as door
from flowjax import errors
from flowjax.commands import shown, variations
from flowjax.data import layouts, scenes

pytestmark = pytest.mark.usefixtures(
  "traced_once", "hashed_by_numpy", "fitted_once"
)

SMALL = (
  "--config.steps=2",
  "--config.optim.warmup_steps=0",
  "--config.model.depth=1",
  "--config.model.heads=2",
  "--config.model.head_size=8",
  "--config.data.batch_size=8",
  "--config.sample.steps=2",
  "--config.log.tensorboard=False",
  "--config.log.validation_every=0",
  "--config.log.samples_every=0",
  # The mesh of a run that is only read, so that its programs are the same.
  "--config.mesh.data=1",
  "--config.mesh.fsdp=-1",
)
OF_LAYOUT = (
  "--config.layout.width=16",
  "--config.layout.depth=1",
  "--config.model.text_width=16",
  "--config.model.pooled_width=16",
)
OF_VARIATION = "--config.embedding.width=16", "--config.embedding.depth=1"


def write(path, content):
  path.write_text(json.dumps(content))
  return path


def test_boxes_are_read_from_a_file(tmp_path):
  layout = layouts.Layout(2, scenes.NAMES)
  box = {"class": "red 3", "box": [0, 0.25, 0.5, 1]}
  path = write(tmp_path / "boxes.json", [[box], []])
  assert shown.boxes(path, layout) == [[("red 3", 0, 0.25, 0.5, 1)], []]


@pytest.mark.parametrize(
  ("content", "said"),
  [
    ([], "must hold a list, with"),
    ({"class": "red 3"}, "must hold a list, with"),
    ([[], [{"class": "red 3"}]], "layout 1: a box is"),
    ([[{"class": "red", "box": [0, 0, 1, 1]}]], "layout 0: .*'red' in it"),
    ([3 * [{"class": "red 3", "box": [0, 0, 1, 1]}]], "3 boxes are more"),
  ],
)
def test_a_file_of_no_layouts_is_named(tmp_path, content, said):
  path = write(tmp_path / "boxes.json", content)
  with pytest.raises(errors.UserError, match=f"boxes.json.*{said}"):
    shown.boxes(path, layouts.Layout(2, scenes.NAMES))


def test_a_file_that_is_none_is_named(tmp_path):
  layout, path = layouts.Layout(2, scenes.NAMES), tmp_path / "boxes.json"
  with pytest.raises(errors.UserError, match="cannot be read"):
    shown.boxes(path, layout)
  path.write_text("[" * 100_000)
  with pytest.raises(errors.UserError, match="cannot be read"):
    shown.boxes(path, layout)


def test_variations_stand_beside_their_originals():
  originals = np.array([-1.0, 1.0]).reshape(2, 1, 1, 1)
  drawn = np.array([-1.0, 1.0, -1.0, 1.0, -1.0]).reshape(5, 1, 1, 1)
  sheet = variations.beside(originals, drawn)
  # Two rows of four; where a variation is missing it is black.
  height, width = sheet.shape[0] // 2, sheet.shape[1] // 4
  middle = sheet[height // 2 :: height, width // 2 :: width, 0]
  assert middle.tolist() == [[0, 0, 0, 0], [255, 255, 255, 0]]


def command(*words):
  assert door.main(list(map(str, words))) == 0


@pytest.mark.slow(11)
def test_a_run_on_layouts_is_drawn_and_scored(tmp_path, capsys):
  into = f"--workdir={tmp_path / 'run'}"
  command(
    "train", "--config=configs/scenes_layout.py", into, *SMALL, *OF_LAYOUT
  )
  # As many at once as are drawn below: one program.
  command("evaluate", into, "--num=4", "--judge_steps=2")
  report = json.loads((tmp_path / "run/report.json").read_text())
  for name in ("drawn", "unguided", "shuffled", "judge"):
    assert set(report[name]) == {"digits", "colours", "both", "iou"}
  assert report["judge"]["iou"] > 0.9
  box = {"class": "red 3", "box": [0.1, 0.1, 0.5, 0.5]}
  path = write(tmp_path / "boxes.json", [[box], []])
  out = tmp_path / "out.png"
  command("sample", into, f"--boxes={path}", "--num=4", f"--out={out}")
  # Four pictures, large enough for what is said below each.
  assert np.asarray(Image.open(out)).shape[1] == 4 * (160 + 4)
  assert door.main(["sample", into, f"--image={out}", f"--out={path}.png"]) == 2
  assert "reads no images" in capsys.readouterr().err
  assert door.main(["sample", into, "--labels=3", f"--out={out}"]) == 2
  assert "told layouts, and nothing in words" in capsys.readouterr().err
  assert door.main(["export", into, f"--out={tmp_path}/export"]) == 2
  assert "reads layouts by an encoder" in capsys.readouterr().err


@pytest.mark.slow(11)
def test_a_run_that_varies_images_is_drawn_and_scored(tmp_path, capsys):
  into = f"--workdir={tmp_path / 'run'}"
  config = "--config=configs/digits_variation.py"
  command("train", config, into, *SMALL, *OF_VARIATION)
  command("evaluate", into, "--num=20")
  report = json.loads((tmp_path / "run/report.json").read_text())
  assert report["samples"] == 20
  assert report["real"]["same_class"] > 0.9
  assert report["real"]["copies"] == 0.0
  Image.fromarray(np.eye(8, dtype=np.uint8) * 255).save(tmp_path / "in.png")
  out = tmp_path / "out.png"
  image = f"--image={tmp_path}/in.png"
  # As many at once as were scored: one program.
  command("sample", into, image, image, "--num=8", f"--out={out}")
  # A row for each: itself, and four variations.
  assert np.asarray(Image.open(out)).shape == (2 * 36, 5 * 36, 3)
  path = tmp_path / "boxes.json"
  assert door.main(["sample", into, f"--boxes={path}", f"--out={out}"]) == 2
  assert "reads no layouts" in capsys.readouterr().err
  assert door.main(["sample", into, f"--image={path}", f"--out={out}"]) == 2
  assert "cannot be read" in capsys.readouterr().err
