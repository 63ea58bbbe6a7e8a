"""The main job, end to end: train on digits, score, export, and say where.

  python launch/demo.py [WORKDIR [--config.KEY=VALUE ...]]

WORKDIR is runs/demo by default. It runs the same commands that are printed, so
each can be repeated by hand.
"""

import importlib.util
import json
import pathlib
import shlex
import sys

from flowjax import __main__ as door

HERE = pathlib.Path(__file__).resolve().parent.parent


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
  for words in commands:
    print(f"\n$ flowjax {shlex.join(words)}", flush=True)
    code = door.main(words)
    if code:
      return code
  folder = pathlib.Path(workdir)
  print("\nScores, on the averaged weights and data that training never saw:")
  report = json.loads((folder / "report.json").read_text())
  print(json.dumps(report, indent=2))
  print("\nWhere everything is:")
  for name, file in (
    ("sample grid", "samples.png"),
    ("curves", "curves.png"),
    ("checkpoint", "checkpoints"),
    ("weights for PyTorch", "export"),
    ("scores", "report.json"),
  ):
    print(f"  {name:<20} {folder / file}")
  if not torch:
    print("  (pip install 'flowjax[torch]' to check the weights in PyTorch)")
  return 0


if __name__ == "__main__":
  sys.exit(main(*sys.argv[1:]))
