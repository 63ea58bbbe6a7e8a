"""The main job, end to end: train on digits, score, export, and say where.

  python launch/demo.py [WORKDIR [--config.KEY=VALUE ...]]

WORKDIR is runs/demo by default. It runs the same commands that are printed, so
each can be repeated by hand. Exits with 1 if a score is not what it should be.
"""

import collections.abc
import importlib.util
import json
import pathlib
import shlex
import sys

from flowjax import __main__ as door
from flowjax.commands import evaluate

HERE = pathlib.Path(__file__).resolve().parent.parent
# What every demo leaves behind.
FILES = {
  "sample grid": "samples.png",
  "curves": "curves.png",
  "metrics": "metrics.jsonl",
  "samples on the way": "samples",
  "checkpoint": "checkpoints",
  "scores": "report.json",
}

Goals = collections.abc.Callable[[dict], dict[str, bool]]


def main(workdir: str = "runs/demo", *overrides: str) -> int:
  """Runs the demo into `workdir` and returns an exit code."""
  torch = importlib.util.find_spec("torch") is not None
  into = f"--workdir={workdir}"
  commands = [
    ["train", f"--config={HERE / 'configs/digits_dit.py'}", into, *overrides],
    ["evaluate", into],
    ["export", into, "--format=torch", f"--out={workdir}/export"]
    + ["--verify"] * torch,
  ]
  files = {**FILES, "weights for PyTorch": "export"}
  code = tell(commands, pathlib.Path(workdir), goals, files)
  if not torch and code in (0, 1):
    print("  (pip install -e '.[torch]' to check the weights in PyTorch)")
  return code


def tell(
  commands: list[list[str]],
  folder: pathlib.Path,
  goals: Goals,
  files: collections.abc.Mapping[str, str],
) -> int:
  """Runs commands, and prints the scores, the goals and where everything is.

  Returns the code of the first command that fails, or 1 if a goal is missed.
  """
  for words in commands:
    print(f"\n$ flowjax {shlex.join(words)}", flush=True)
    code = door.main(words)
    if code:
      return code
  report = json.loads((folder / "report.json").read_text())
  print("\nScores, on the averaged weights and data that training never saw:")
  evaluate.print_report(report)
  reached = goals(report)
  print("\nWhat these scores should be:")
  for text, is_met in reached.items():
    print(f"  {'met   ' if is_met else 'MISSED'}  {text}")
  print("\nWhere everything is:")
  for name, file in files.items():
    print(f"  {name:<20} {folder / file}")
  return 0 if all(reached.values()) else 1


def goals(report: dict) -> dict[str, bool]:
  """Returns what the demo promises, and whether the report keeps it."""
  return {
    "the judge recognises at least 97% of held-out digits": (
      report["classifier_accuracy"] >= 0.97
    ),
    "at least 98% of guided samples are recognised as their class": (
      report["sample_accuracy"] >= 0.98
    ),
    "unguided, the Frechet distance is at most twice that of real digits": (
      report["frechet_unguided"] <= 2.0 * report["frechet_real"]
    ),
    "no sample is a copy of a training image": (
      report["nearest_neighbour"]["copies"] == 0.0
    ),
  }


if __name__ == "__main__":
  sys.exit(main(*sys.argv[1:]))
