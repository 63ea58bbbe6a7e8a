"""Times the training step of a config on this machine, on random data.

Prints the rate beside that of this machine's own matrix product in the same
run, and the share of the peak where it is known. The figures are this
machine's, at this load; `--json` keeps them.

example:
  flowjax bench --config=configs/imagenet_dit.py:s_2 \\
    --config.data.batch_size=8 --json=step.json
"""

import time

import jax
import jax.numpy as jnp
import numpy as np

from flowjax import __version__, errors
from flowjax.commands import configs, flags
from flowjax.parallel import chips, compiler_flags, distributed, placing, room
from flowjax.train import aspects, loop, parts, workdir


def add_flags(parser) -> None:
  """Adds the flags of `bench`."""
  parser.add_argument("--config", required=True, help=configs.HELP)
  parser.add_argument(
    "--seconds", type=float, default=20.0, help="how long to step, about"
  )
  parser.add_argument("--json", type=flags.path, help="where to keep it")
  flags.add_compiler_flags(parser)


def run(args) -> None:
  """Steps on random data for a while, and prints the rates."""
  if not args.seconds > 0:
    raise errors.UserError(f"--seconds={args.seconds} must be above 0.")
  config = configs.load(args.config, args.overrides)
  if args.compiler_flags:
    print(compiler_flags.apply())
  if args.json:
    workdir.require_writable(args.json, "--json")
  built = parts.build(aspects.largest(config))
  if config.data.buckets:
    print(aspects.said(config.data))
  with loop.out_of_memory_advice():
    result = measure(built, args.seconds)
  for name, value in result.items():
    text = f"{value:.4g}" if isinstance(value, float) else value
    print(f"{name:<26} {text}")
  if args.json and distributed.is_first():
    workdir.write_json(args.json, result)
    print(f"{'written to':<26} {args.json}")


def measure(built: parts.Parts, seconds: float) -> dict:
  """Returns the compile time, the median step time, and the rates."""
  config = built.experiment
  matmul = matmul_flops(config.model.dtype)
  started = time.monotonic()
  step = loop.lower_step(built).compile()
  compile_seconds = time.monotonic() - started
  room.require(step)
  state, batch = built.initial_state(), random_batch(built)
  times: list[float] = []
  distributed.meet()
  begun = time.monotonic()
  # By the clock of process 0: all must take as many steps.
  while len(times) < 4 or placing.of_first(time.monotonic() - begun) < seconds:
    before = time.monotonic()
    state, metrics = step(state, batch)
    jax.block_until_ready((state, metrics))
    times.append(time.monotonic() - before)
  median = float(np.median(times[1:]))
  count = jax.device_count()
  flops = built.flops * config.data.batch_size / median / count
  peak = chips.peak_flops(jax.devices()[0])
  return {
    "device": f"{count} x {jax.devices()[0].device_kind}",
    "versions": f"flowjax {__version__}, jax {jax.__version__}",
    "parameters": built.parameters,
    "image_size": "x".join(map(str, config.data.image_size)),
    "batch_size": config.data.batch_size,
    "compile_seconds": compile_seconds,
    "steps": len(times) - 1,
    "step_seconds_median": median,
    "step_seconds_min": min(times[1:]),
    "images_per_second": config.data.batch_size / median,
    "tflops_per_device": flops / 1e12,
    "matmul_tflops_per_device": matmul / 1e12,
    "share_of_matmul": flops / matmul,
    "mfu": flops / peak if peak else "peak not known",
  }


def random_batch(built: parts.Parts) -> dict[str, jax.Array]:
  """Returns a batch of noise with random conditions, on the devices."""
  config, rng = built.experiment, np.random.default_rng(0)
  # An autoencoder has no labels.
  labels = getattr(config.model, "num_classes", 0)
  kinds = config.text.vocabulary or labels or 1

  def drawn(x):
    if x.dtype == bool:
      return np.ones(x.shape, bool)
    if x.dtype == np.int32:
      return rng.integers(kinds, size=x.shape, dtype=x.dtype)
    return rng.standard_normal(x.shape, np.float32).astype(x.dtype)

  batch = jax.tree.map(drawn, loop.batch_shapes(built))
  return placing.put_whole(built.mesh)(batch)


def matmul_flops(dtype: str, size: int | None = None) -> float:
  """Returns the FLOP/s of one device's own square matrix product."""
  if size is None:
    size = 2048 if jax.devices()[0].platform == "cpu" else 8192
  x = jax.random.normal(jax.random.key(0), (size, size)).astype(dtype)
  x = jax.device_put(x, jax.local_devices()[0])
  product = jax.jit(jnp.matmul)
  product(x, x).block_until_ready()
  times = []
  for _ in range(10):
    before = time.monotonic()
    product(x, x).block_until_ready()
    times.append(time.monotonic() - before)
  return 2 * size**3 / min(times)
