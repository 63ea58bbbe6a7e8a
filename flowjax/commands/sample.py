"""Draws samples from a workdir into one PNG.

Image i of a seed is the same however many are drawn, on whatever devices.

example:
  flowjax sample --workdir=runs/digits --out=grid.png --num=40 --guidance=2
"""

import pathlib

from flowjax import errors
from flowjax.commands import restored
from flowjax.evaluate import pictures
from flowjax.flow import solvers
from flowjax.train import progress, workdir


def add_flags(parser) -> None:
  """Adds the flags of `sample`; what is not given is as in the config."""
  restored.add_run(parser)
  parser.add_argument("--out", type=pathlib.Path, default="grid.png")
  parser.add_argument("--num", type=int, default=100, help="how many images")
  parser.add_argument(
    "--labels", help="classes in turn, such as 3,1,4; default: all"
  )
  parser.add_argument("--steps", type=int, help="steps of the solver")
  parser.add_argument("--solver", choices=sorted(solvers.SOLVERS))
  parser.add_argument(
    "--guidance", type=float, help="guidance scale; 1 is none"
  )
  parser.add_argument("--seed", type=int, default=0)


def run(args) -> None:
  """Draws, writes the PNG, and says where it is."""
  for name in ("num", "steps"):
    value = getattr(args, name)
    if value is not None and value < 1:
      raise errors.UserError(f"--{name}={value} must be at least 1.")
  if args.out.suffix.lower() != ".png":
    raise errors.UserError(f"--out={args.out} must end in .png.")
  workdir.require_writable(args.out, "--out")
  found = restored.open(args.workdir, ema=args.ema)
  labels = restored.parse_labels(
    args.labels, args.num, found.config.model.num_classes
  )
  wishes = {
    "steps": args.steps,
    "solver": args.solver,
    "guidance": args.guidance,
  }
  changes = {key: value for key, value in wishes.items() if value is not None}
  with progress.counter("samples", args.num) as done:
    images = found.draw(labels, seed=args.seed, done=done, **changes)
  pictures.save_png(pictures.grid(images, columns=10), args.out)
  print(f"{args.num} samples of step {found.step}: {args.out}")
