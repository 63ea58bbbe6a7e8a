"""The door: help, mistakes that name the remedy, and exit codes."""

import os
import pathlib
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from flowjax import __main__ as door
from flowjax import commands, errors
from flowjax.commands import configs, restored
from flowjax.evaluate import pictures

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
DIGITS = str(CONFIGS / "digits_dit.py")


def _run(capsys, *words):
  code = door.main(list(map(str, words)))
  return code, capsys.readouterr()


@pytest.mark.parametrize("command", commands.COMMANDS)
def test_help_says_what_a_command_does_with_an_example(command, capsys):
  with pytest.raises(SystemExit) as done:
    door.main([command, "--help"])
  assert done.value.code == 0
  text = capsys.readouterr().out
  assert f"flowjax {command} --" in text.split("example:")[1]
  assert "42" in text


def test_help_comes_at_once():
  started = time.monotonic()
  done = subprocess.run(
    [sys.executable, "-X", "importtime", "-m", "flowjax", "--help"],
    capture_output=True,
    text=True,
    env=dict(os.environ),
  )
  assert time.monotonic() - started < 60
  assert done.returncode == 0
  for name in commands.COMMANDS:
    assert f"  {name} " in done.stdout
  # What makes it fast: nothing heavy is imported.
  imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines()}
  assert imported.isdisjoint({"jax", "numpy", "flax"})


def test_who_reads_no_more_is_shown_no_traceback():
  text = (
    "from flowjax import __main__ as door\n"
    "door._run = lambda words: [print(n) for n in range(10**6)] and 0\n"
    "door.entry()"
  )
  with subprocess.Popen(
    [sys.executable, "-c", text],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  ) as process:
    assert process.stdout.readline() == "0\n"
    process.stdout.close()
    assert process.stderr.read() == ""
  assert process.returncode == 141


def test_what_is_printed_may_have_no_place():
  words = [sys.executable, "-m", "flowjax", "--help"]
  for unbuffered in ("", "1"):
    with open("/dev/full", "w") as full:
      done = subprocess.run(
        words,
        env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
        stdout=full,
        stderr=subprocess.PIPE,
        text=True,
      )
    assert done.returncode == 2
    assert done.stderr.startswith("flowjax: What is printed cannot be written")
  closed = subprocess.run(["sh", "-c", '"$@" >&-', "sh", *words], text=True)
  assert closed.returncode == 0


@pytest.mark.slow
@pytest.mark.parametrize(
  ("words", "text"),
  [
    (["trian"], "'train'"),
    (["train", "--confg=x", "--workdir=y"], "'--config'"),
    (["sample", "--workdir=x", "--guidence=2"], "'--guidance'"),
    (
      ["train", "--configs.optim.clip_norm=1", "--workdir=y"],
      "'--config.optim.clip_norm'",
    ),
    (["train", "--config=nowhere.py", "--workdir=x"], "nowhere.py"),
    (
      ["train", f"--config={CONFIGS}/digit_dit.py", "--workdir=x"],
      "'digits_dit.py'",
    ),
    (
      ["export", "--workdir=x", "--out=y", "--format=difusers"],
      "invalid choice: 'difusers'. Did you mean 'diffusers'?",
    ),
    (
      ["describe", f"--config={DIGITS}", "--config.optim.schedule=cosin"],
      "schedule='cosin' is not known. Did you mean 'cosine'?",
    ),
    (["sample", "--workdir=/nowhere"], "no workdir"),
    (["export", "--workdir=/nowhere", "--config.steps=3"], "no flag"),
    (["sample", "--workdir=x", "--num=0"], "--num: '0' must be"),
    (["sample", "--workdir=x", "--seed=-1"], "from 0 on"),
    (["sample", "--workdir="], "names nothing"),
    (["train", f"--config={DIGITS}", "--workdir="], "names nothing"),
    (["bench", f"--config={DIGITS}", "--seconds=0"], "--seconds=0"),
    (["describe", f"--config={DIGITS}", "--config.model=3"], "group of keys"),
    (
      ["describe", f"--config={DIGITS}", "--config.model.depth=abc"],
      "of type int, such as 4",
    ),
    (
      ["describe", f"--config={DIGITS}", "--config.model.image_size=8"],
      "'--config.model.image_size=(A, B)'",
    ),
    (["compare", "--workdirs", "x", "--evaluations=a"], "commas"),
    (["describe", f"--config={CONFIGS}/digits_dit.py:edmm"], "'edm'"),
    (["sample", "--workdir=x", "--out=grid.jpg"], ".png"),
    (
      ["describe", f"--config={DIGITS}", "--config.optim.learnin_rate=1"],
      "'learning_rate'",
    ),
    (
      ["describe", f"--config={DIGITS}", "--config.optim.learning_rate=x"],
      "learning_rate",
    ),
    (["describe", f"--config={DIGITS}", "--config.modl.depth=1"], "'model'"),
    (["describe", f"--config={DIGITS}", "--config.steps.x=1"], "is a value"),
    (["describe", f"--config={DIGITS}", "--config.model.depth=None"], "None"),
    (
      ["describe", f"--config={DIGITS}", "--config.model.patch_size=3"],
      "patch_size",
    ),
    (
      ["describe", f"--config={DIGITS}", "--config.mesh.fsdp=16"],
      "Nearest that do",
    ),
    (
      ["describe", f"--config={DIGITS}", "--config.data.batch_size=12"],
      "Sizes that are: 8, 16",
    ),
    (["describe", f"--config={CONFIGS}/imagenet_dit.py:xxl_2"], "xl_2"),
    (
      ["describe", f"--config={DIGITS}", "--config.mesh.tensor=8"],
      "config.mesh.tensor = 8 does not divide the model's heads = 4",
    ),
    (
      ["describe", f"--config={DIGITS}", "--config.model.attention=cudnn"],
      "config.model: ",
    ),
    (
      [
        "describe",
        f"--config={DIGITS}",
        '--config.optim.weight_decay_rules=((".*/kernel", 1.0),)',
      ],
      "No rule matches",
    ),
    (
      ["describe", f"--config={DIGITS}", "--config.log.validation_every=-1"],
      "validation_every",
    ),
    (
      ["describe", f"--config={DIGITS}", "--config.optim.warmup_steps=1000"],
      "warmup_steps",
    ),
  ],
)
def test_a_mistake_exits_with_2_and_names_the_remedy(words, text, capsys):
  code, out = _run(capsys, *words)
  assert code == 2
  assert text in out.err
  assert "Traceback" not in out.err


@pytest.mark.parametrize(
  ("body", "found"),
  [
    ("def get_config():\n  a = 1\n  return b\n", ", line 3: name 'b'"),
    ("import nowhere_at_all\n", ", line 1: No module named"),
    ("def get_config():\n  raise ValueError('meant')\n", ": meant"),
    ("def get_config(\n", "was never closed (config.py, line 1)"),
  ],
)
def test_what_a_config_raises_is_said_with_its_line(tmp_path, body, found):
  (tmp_path / "config.py").write_text(body)
  with pytest.raises(errors.UserError) as caught:
    configs.load(str(tmp_path / "config.py"), [])
  assert found in str(caught.value)


def test_overrides_reach_the_experiment():
  config = configs.load(
    DIGITS,
    [
      "--config.optim.learning_rate=3e-4",
      "--config.model.image_size=(16, 16)",
      "--config.data.image_size=(16, 16)",
      "--config.checkpoint.keep_every=7",
      "--config.optim.clip_norm=None",
      "--config.sample.solver.name=euler",
    ],
  )
  assert config.optim.learning_rate == 3e-4
  assert config.model.image_size == (16, 16)
  assert config.checkpoint.keep_every == 7
  assert config.optim.clip_norm is None
  assert config.sample.solver.name == "euler"


def test_labels():
  assert list(restored.parse_labels(None, 4, 3)) == [0, 1, 2, 0]
  assert list(restored.parse_labels("2,1", 3, 3)) == [2, 1, 2]
  with pytest.raises(errors.UserError, match="classes are 0 to 2"):
    restored.parse_labels("3", 1, 3)
  with pytest.raises(errors.UserError, match="numbers"):
    restored.parse_labels("a", 1, 3)


def test_a_damaged_config_of_a_workdir_is_named(tmp_path, capsys):
  for damage in (b"\xff\xfe", b"[1]", b'{"model": '):
    (tmp_path / "config.json").write_bytes(damage)
    code, out = _run(capsys, "sample", f"--workdir={tmp_path}")
    assert code == 2
    assert "config.json is damaged" in out.err


def test_an_impossible_out_is_refused_before_anything_is_drawn(
  tmp_path, capsys
):
  (tmp_path / "file").write_text("")
  out = tmp_path / "file" / "grid.png"
  code, text = _run(capsys, "sample", f"--workdir={tmp_path}", f"--out={out}")
  assert code == 2
  assert "--out=" in text.err


def test_a_picture_that_a_user_made_is_not_drawn_over(tmp_path, capsys):
  photo, own = tmp_path / "photo.png", tmp_path / "own.png"
  Image.new("L", (8, 8)).save(photo)
  before = photo.read_bytes()
  for command in ("sample", "compare"):
    words = [command, f"--out={photo}"]
    words += ["--workdirs", "x"] if command == "compare" else ["--workdir=x"]
    code, text = _run(capsys, *words)
    assert code == 2 and "not of FlowJAX's making" in text.err
  pictures.save_png(np.zeros((4, 4, 1), np.uint8), own)
  pictures.require_own(own, "--out")
  for word in (f"--init-image={own}", f"--mask={own}"):
    words = ["sample", "--workdir=x", f"--out={own}", word]
    words += [f"--init-image={photo}"] * ("mask" in word)
    code, text = _run(capsys, *words)
    assert code == 2 and "would be lost" in text.err
  assert photo.read_bytes() == before


@pytest.mark.parametrize(
  ("file", "word"),
  [
    ("digits_dit.py:sit", "sample.solver.name=heun"),
    ("digits_dit.py:iddpm", "sample.solver.name=ddim"),
    ("digits_paths/edm.py", "sample.grid.name=uniform"),
    ("digits_dit.py:flux", "sample.grid.name=karras"),
    ("digits_paths/edm.py", "flow.law.name=uniform"),
  ],
)
def test_another_name_has_none_of_the_options_of_the_old_one(file, word):
  configs.load(f"{CONFIGS}/{file}", [f"--config.{word}"])
  # What is given with it is heeded.
  group = word.rpartition(".")[0]
  with pytest.raises(errors.UserError, match="no option"):
    configs.load(
      f"{CONFIGS}/{file}",
      [f"--config.{word}", f"--config.{group}.{OTHERS[group]}"],
    )


OTHERS = {
  "sample.solver": "order=2",
  "sample.grid": "terminal=0.5",
  "flow.law": "a=1.0",
}


@pytest.mark.parametrize(
  "word",
  [
    "flow.law.mean=nan",
    "flow.sigma_data=inf",
    "sample.guidance.scale=nan",
    "optim.learning_rate=inf",
  ],
)
def test_numbers_that_are_not_finite_are_refused(word):
  with pytest.raises(errors.UserError, match="must be a finite number"):
    configs.load(f"{CONFIGS}/digits_dit.py", [f"--config.{word}"])


@pytest.mark.parametrize(
  ("words", "message"),
  [
    (["sample.steps=1000000000"], "at most 100000"),
    (["sample.guidance.skip_interval=(0.1, 0.2)"], "without skip_layers"),
    (["flow.coupling.sigma=0.3", "sample.solver.name=ddpm"], "with its sigma"),
    (["flow.coupling.name=target", "sample.solver.name=ddpm"], "'target'"),
    (
      ["sample.grid.name=karras", "sample.grid.shift_by=flux"],
      "shifts the grids uniform, flow_match",
    ),
    (["sample.grid.name=flow_match", "sample.grid.table=0"], "at least 1"),
    (["sample.grid.name=flow_match", "sample.grid.table=10"], "at most 10"),
    (["sample.solver.name=huen"], "config.sample: There is no solver"),
  ],
)
def test_what_cannot_be_sampled_is_refused(words, message):
  with pytest.raises(errors.UserError, match=message):
    configs.load(
      f"{CONFIGS}/digits_dit.py", [f"--config.{word}" for word in words]
    )
