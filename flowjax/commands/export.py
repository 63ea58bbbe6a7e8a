"""Writes the weights of a workdir for PyTorch.

The folder holds `model.safetensors`, `config.json`, `README.md` and `model.py`,
one file that needs torch and safetensors and nothing of FlowJAX.

example:
  flowjax export --workdir=runs/digits --format=torch --out=exported --verify
"""

import argparse
import json
import pathlib

from flowjax import schema
from flowjax.commands import restored
from flowjax.interop import torch_export
from flowjax.train import workdir


def add_flags(parser) -> None:
  """Adds the flags of `export`."""
  restored.add_workdir(parser)
  parser.add_argument("--format", choices=["torch"], default="torch")
  parser.add_argument("--out", type=pathlib.Path, required=True)
  parser.add_argument(
    "--ema",
    action=argparse.BooleanOptionalAction,
    default=True,
    help="the averaged weights, or the raw ones",
  )
  parser.add_argument(
    "--verify",
    action="store_true",
    help="load the export in torch and compare the outputs",
  )


def run(args) -> None:
  """Exports, verifies if asked, and says where everything is."""
  if args.verify:
    torch_export.require_torch()
  found = restored.open(args.workdir, ema=args.ema)
  report = read_report(args.workdir)
  card = {
    "config": schema.to_dict(found.config),
    "step": found.step,
    "weights": "averaged (EMA)" if args.ema else "raw",
    "scores": report,
  }
  torch_export.export(found.params, found.config.model, args.out, card=card)
  print(f"Weights of step {found.step} for PyTorch: {args.out}")
  if args.verify:
    difference = torch_export.verify(args.out, found.run.network, found.params)
    print(f"Largest difference between JAX and PyTorch: {difference:.2e}")
    report["torch_max_abs_diff"] = difference
    workdir.write_json(args.workdir / "report.json", report)


def read_report(directory: pathlib.Path) -> dict:
  """Returns the scores that `evaluate` left in a workdir, if any."""
  path = directory / "report.json"
  return json.loads(path.read_text()) if path.exists() else {}
