"""Draws samples from a workdir into one PNG.

Image i of a seed is the same however many are drawn, on whatever devices. Any
key of config.sample can be changed: --config.sample.guidance.name=apg.

example:
  flowjax sample --workdir=runs/digits --out=grid.png --num=40 --guidance=2
"""

from flowjax import errors
from flowjax.commands import flags, restored
from flowjax.evaluate import pictures
from flowjax.train import progress, workdir


def add_flags(parser) -> None:
  """Adds the flags of `sample`; what is not given is as in the config."""
  restored.add_run(parser)
  parser.add_argument(
    "--out", type=flags.path, default="grid.png", help="the PNG"
  )
  parser.add_argument(
    "--num",
    type=flags.count,
    help="how many images; default: 100, or one per label",
  )
  parser.add_argument(
    "--labels", help="classes in turn, such as 3,1,4; default: all"
  )
  restored.add_method(parser)
  parser.add_argument(
    "--worse",
    type=flags.path,
    help="a workdir to be guided away from, instead of from no label",
  )
  parser.add_argument("--seed", type=flags.seed, default=0, help="of the noise")


def run(args) -> None:
  """Draws, writes the PNG, and says where it is."""
  if args.out.suffix.lower() != ".png":
    raise errors.UserError(f"--out={args.out} must end in .png.")
  workdir.require_writable(args.out, "--out")
  found = restored.open(args.workdir, ema=args.ema)
  method = restored.method(found.config, args)
  worse = restored.worse(args.worse, found)
  if worse and method.guidance.scale == 1.0:
    raise errors.UserError(
      "--worse has no effect at guidance scale 1; set --guidance above it."
    )
  count = args.num or (len(args.labels.split(",")) if args.labels else 100)
  labels = restored.parse_labels(
    args.labels, count, found.config.model.num_classes
  )
  with progress.counter("samples", count) as done:
    images = found.draw(
      labels, seed=args.seed, done=done, method=method, worse=worse
    )
  pictures.save_png(pictures.grid(images, columns=10), args.out)
  print(f"{count} samples of step {found.step}: {args.out}")
