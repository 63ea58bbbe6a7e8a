"""Writes the weights of a workdir for PyTorch.

The folder holds `model.safetensors`, `config.json`, `README.md` and `model.py`,
one file that needs torch and safetensors and nothing of FlowJAX.

example:
  flowjax export --workdir=runs/digits --format=torch --out=exported --verify
"""

import pathlib

from flowjax import errors, schema
from flowjax.commands import restored
from flowjax.interop import torch_export
from flowjax.train import workdir

# What float32 allows between the two libraries.
TOLERANCE = 1e-5


def add_flags(parser) -> None:
  """Adds the flags of `export`."""
  restored.add_run(parser)
  parser.add_argument("--format", choices=["torch"], default="torch")
  parser.add_argument("--out", type=pathlib.Path, required=True)
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
  report = read_report(args.workdir, found.step, ema=args.ema)
  card = {
    "config": schema.to_dict(found.config),
    "step": found.step,
    "weights": weights_name(args.ema),
    "scores": report,
  }
  torch_export.export(found.params, found.config.model, args.out, card=card)
  print(f"Weights of step {found.step} for PyTorch: {args.out}")
  if args.verify:
    difference = torch_export.verify(args.out, found.run.network, found.params)
    print(f"Largest difference between JAX and PyTorch: {difference:.2e}")
    # Written so that nan is refused too.
    if not difference <= TOLERANCE:
      raise errors.UserError(
        f"The export in {args.out} differs from JAX by {difference:.2e}, more "
        f"than {TOLERANCE}: it is not to be used."
      )
    report |= {"step": found.step, "weights": weights_name(args.ema)}
    report["torch_max_abs_diff"] = difference
    workdir.write_json(args.workdir / "report.json", report)


def weights_name(ema: bool) -> str:
  """Returns what a report calls the weights that it is about."""
  return "averaged (EMA)" if ema else "raw"


def read_report(directory: pathlib.Path, step: int, *, ema: bool) -> dict:
  """Returns what is reported of these weights of this step, if anything."""
  path = directory / "report.json"
  report = workdir.read_json(path) if path.exists() else {}
  ours = (step, weights_name(ema))
  return report if (report.get("step"), report.get("weights")) == ours else {}
