"""Writes the weights of a workdir for PyTorch.

The folder holds `model.safetensors`, `config.json`, `README.md` and `model.py`,
one file that needs torch and safetensors and nothing of FlowJAX.

example:
  flowjax export --workdir=runs/digits --format=torch --out=exported --verify
"""

from typing import Any

from flowjax import errors, models, schema
from flowjax.commands import flags, restored
from flowjax.interop import torch_export
from flowjax.train import workdir

# What float32 allows between the two libraries.
TOLERANCE = 1e-5


def add_flags(parser) -> None:
  """Adds the flags of `export`."""
  restored.add_run(parser)
  parser.add_argument(
    "--format", choices=["torch"], default="torch", help="for whom"
  )
  parser.add_argument(
    "--out", type=flags.path, required=True, help="the folder to write"
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
  report = read_report(found, ema=args.ema)
  card = {
    "config": schema.to_dict(found.config),
    "step": found.step,
    "weights": weights_name(args.ema),
    "scores": report,
  }
  params = {k: v for k, v in found.params.items() if k != "uncertainty"}
  torch_export.export(
    params,
    found.config.model,
    args.out,
    card=card,
    path=found.config.flow.path.name,
    prediction=found.config.flow.prediction,
  )
  print(f"Weights of step {found.step} for PyTorch: {args.out}")
  if args.verify:
    difference = torch_export.verify(
      args.out, models.build(found.config.model), params
    )
    print(f"Largest difference between JAX and PyTorch: {difference:.2e}")
    # Written so that nan is refused too.
    if not difference <= TOLERANCE:
      raise errors.UserError(
        f"The export in {args.out} differs from JAX by {difference:.2e}, more "
        f"than {TOLERANCE}: it is not to be used."
      )
    report |= {
      **identity(found, ema=args.ema),
      "torch_max_abs_diff": difference,
    }
    workdir.write_json(args.workdir / "report.json", report)


def weights_name(ema: bool) -> str:
  """Returns what a report calls the weights that it is about."""
  return "averaged (EMA)" if ema else "raw"


def identity(found: restored.Restored, *, ema: bool) -> dict[str, Any]:
  """Returns the entries of a report that say which weights it is about."""
  return {
    "step": found.step,
    "weights": weights_name(ema),
    # Another run that came to the same step took another time.
    "train_seconds": round(found.extra["train_seconds"], 1),
  }


def read_report(found: restored.Restored, *, ema: bool) -> dict[str, Any]:
  """Returns what is reported of exactly these weights, if anything."""
  path = found.directory / "report.json"
  report = workdir.read_json(path) if path.exists() else {}
  ours = identity(found, ema=ema)
  return report if ours.items() <= report.items() else {}
