"""Compares runs: samples, losses and Fréchet distance, in one PNG and table.

The error is that of the data which each network sees in x_t, at equal log-SNR:
the same question to all, whatever path they are on and whatever they predict.
The Fréchet distance (of digits) is drawn against the evaluations of the network
that a sample costs, each run with its own solver, unguided. Beside the PNG lies
the same as JSON.

example:
  flowjax compare --workdirs runs/straight runs/vp --out=compare.png
"""

import dataclasses
import pathlib
from typing import Any

import jax.numpy as jnp
import numpy as np

from flowjax import errors
from flowjax.commands import drawing, flags, restored, train
from flowjax.data import sources
from flowjax.evaluate import comparison, digits, pictures
from flowjax.flow import losses, prediction
from flowjax.parallel import distributed
from flowjax.parallel import mesh as meshes
from flowjax.train import curves, flows, loop, methods, progress, workdir

# From nearly noise to nearly data.
LOG_SNRS = tuple(float(value) for value in np.linspace(-8.0, 8.0, 9))


def add_flags(parser) -> None:
  """Adds the flags of `compare`."""
  parser.add_argument(
    "--workdirs",
    type=flags.path,
    nargs="+",
    required=True,
    help="the folders that `flowjax train` wrote",
  )
  parser.add_argument(
    "--out", type=flags.path, default="compare.png", help="the PNG"
  )
  parser.add_argument(
    "--evaluations",
    default="4,8,16,32,64",
    help="evaluations of the network per sample, about",
  )
  parser.add_argument(
    "--num", type=flags.count, default=1000, help="samples for each distance"
  )
  parser.add_argument("--seed", type=flags.seed, default=0, help="of the noise")


def run(args) -> None:
  """Measures each run, draws all, and prints the table."""
  counts = _counts(args.evaluations)
  if args.num < 2:
    raise errors.UserError(f"--num={args.num} samples have no distance; 1000.")
  workdir.require_writable(args.out, "--out")
  pictures.require_own(args.out, "--out")
  runs = [restored.open(directory) for directory in args.workdirs]
  for found in runs:
    restored.require_field(found, "compare")
  judge = _judge(runs, args.seed)
  names = _names(args.workdirs)
  rows = []
  for name, found in zip(names, runs, strict=True):
    rows.append(_measure(name, found, judge, counts, args))
  real = judge.frechet_real if judge else None
  saved = args.out.with_suffix(".json")
  if distributed.is_first():
    comparison.draw(rows, args.out, frechet_real=real, style=curves.STYLE)
    workdir.write_json(saved, _plain(rows, real))
  print(comparison.table(rows, real))
  print(f"\n  {'picture':<10} {args.out}\n  {'numbers':<10} {saved}")


def _measure(name, found, judge, counts, args) -> comparison.Run:
  method = dataclasses.replace(
    found.config.sample, guidance=methods.GuidanceConfig()
  )
  labels = np.arange(args.num) % max(1, found.config.model.num_classes)
  spent, distances = [], []
  images = np.zeros((0,))
  wanted = counts if found.run.network.inverse is None else counts[-1:]
  with progress.counter(name, len(wanted) * args.num) as done:
    for i, count in enumerate(wanted):
      chosen, cost = _costing(method, found, count)
      images = _draw(found, chosen, labels, args, lambda n, i=i: done(
        i * args.num + n
      ))  # fmt: skip
      if judge and cost not in spent:
        spent.append(cost)
        distances.append(float(judge.score(images, labels)["frechet"]))
  log_snr, error = _errors(found)
  return comparison.Run(
    name=name,
    samples_NHWC=images[:32],
    log_snr=log_snr,
    error=error,
    evaluations=spent,
    frechet=distances,
  )


def _draw(found, method, labels, args, done) -> np.ndarray:
  draw = drawing.build(found.run, method, found.config.data.batch_size)
  cond = drawing.conditions(found.run, len(labels), labels)
  return draw(found.params, cond, seed=args.seed, done=done, count=len(labels))


def _costing(
  method: methods.SampleConfig, found: restored.Restored, count: int
) -> tuple[methods.SampleConfig, int]:
  """Returns the method with as many steps as cost at most `count`."""
  flow, tokens = found.config.flow, flows.tokens_of(found.config.model)
  if found.run.network.inverse is not None:
    return method, 1
  if hasattr(method.method(flow, tokens).solver, "run"):
    raise errors.UserError(
      f"{found.directory}: the solver {method.solver.name!r} decides while "
      "running how often it evaluates the network, and cannot be asked for so "
      "many. Compare runs whose solver follows a grid."
    )

  def cost(steps: int) -> int:
    chosen = dataclasses.replace(method, steps=steps)
    return chosen.method(flow, tokens).evaluations

  # From the most steps down: a method may pay for its first or last ones.
  for steps in range(count, 0, -1):
    if cost(steps) <= count:
      return dataclasses.replace(method, steps=steps), cost(steps)
  return dataclasses.replace(method, steps=1), cost(1)


def _errors(found: restored.Restored) -> tuple[list[float], list[float]]:
  """Returns log-SNRs of the path and the error of the data at each of them."""
  if found.run.network.inverse is not None:
    return [], []
  flow = found.config.flow
  path = flow.path.build()
  first, last = (
    float(path.log_snr(jnp.float32(t))) for t in (path.high, path.low)
  )
  log_snr = [value for value in LOG_SNRS if first <= value <= last]
  times = [float(path.log_snr_inverse(jnp.float32(v))) for v in log_snr]
  predict = flow.predictor(found.run.network)

  def data(params, x_t, t_B, cond, rng):
    value = predict(params, x_t, t_B, cond, rng)
    return prediction.convert(
      path,
      flow.prediction,
      "data",
      value,
      x_t,
      t_B,
      sigma_data=flow.sigma_data,
    )

  coupling = flow.coupling.build()
  if coupling.spread is not None:  # x_t has then more in it than x and eps.
    return [], []
  loss = losses.fixed_time(
    data, path, times, prediction="data", coupling=coupling
  )
  with meshes.use(found.run.mesh), loop.out_of_memory_advice():
    scores = train.held_out(found.run, loss).run(found.params)
  return log_snr, [scores[f"validation_loss_t{i}"] for i in range(len(times))]


def _judge(runs, seed: int) -> digits.Digits | None:
  """Returns a judge of digits, if that is what all runs draw."""
  datas = [found.config.data for found in runs]
  if any(data.source != "digits" for data in datas):
    return None
  if len({data.image_size for data in datas}) > 1:
    raise errors.UserError(
      "These runs draw images of different sizes: "
      f"{sorted({data.image_size for data in datas})}. Compare like with like."
    )
  training, held_out = (
    sources.labelled(datas[0], split) for split in sources.SPLITS
  )
  return digits.Digits(*training, *held_out, seed=seed)


def _counts(text: str) -> list[int]:
  try:
    counts = sorted({int(word) for word in text.split(",")})
  except ValueError as error:
    raise errors.UserError(
      f"--evaluations={text!r} must be numbers with commas between them."
    ) from error
  if counts[0] < 1:
    raise errors.UserError(f"--evaluations={text!r}: each is at least 1.")
  return counts


def _names(directories: list[pathlib.Path]) -> list[str]:
  names = [directory.resolve().name for directory in directories]
  if len(set(names)) < len(names):
    names = [str(directory) for directory in directories]
  return names


def _plain(rows, real: float | None) -> dict[str, Any]:
  return {
    "frechet_real": real,
    "runs": {
      row.name: {
        "log_snr": list(row.log_snr),
        "error": list(row.error),
        "evaluations": list(row.evaluations),
        "frechet": list(row.frechet),
      }
      for row in rows
    },
  }
