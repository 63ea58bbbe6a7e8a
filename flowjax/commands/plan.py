"""Says whether a run fits a cluster that is not here, and how fast it would be.

Compiles the step that `flowjax train` runs for that cluster, on a machine
without a TPU or GPU, and reads the program: memory, and what it sends over the
wires. Times are a model's. Needs the extra tpu-aot or gpu-aot; without it, or
with --model_only, everything is modelled.

topologies: v5p:8x8x8  v5e:16x16  v6e:16x16  v4:4x4x4  tpu7x:4x4x4, a slice by
its torus; h100:16x8, nodes x GPUs.

example:
  flowjax plan --config=configs/flux_dev.py --topology=v5p:8x8x8 \\
    --mesh=fsdp=64,tensor=2 --batch=512 --json=plan.json
"""

import argparse
import dataclasses
import time

import rich.console
import rich.table

from flowjax import errors
from flowjax.commands import configs, flags
from flowjax.parallel import collectives, topology
from flowjax.train import experiment, plan, search, workdir

WIDTH = 110
GIB = 2**30


def add_flags(parser) -> None:
  """Adds the flags of `plan`."""
  parser.add_argument("--config", required=True, help=configs.HELP)
  parser.add_argument(
    "--topology", required=True, help="the cluster, such as v5p:8x8x8"
  )
  parser.add_argument(
    "--slices",
    type=flags.count,
    default=1,
    help="how many such slices of TPUs, joined by a network",
  )
  parser.add_argument(
    "--mesh",
    type=_mesh,
    default=[],
    help="short for --config.mesh.AXIS=SIZE of each, as fsdp=64,tensor=2",
  )
  parser.add_argument(
    "--batch", type=flags.count, help="instead of config.data.batch_size"
  )
  parser.add_argument(
    "--search",
    action="store_true",
    help="find the fastest mesh, remat and batch per device that fit",
  )
  parser.add_argument(
    "--model_only", action="store_true", help="compile nothing"
  )
  parser.add_argument("--json", type=flags.path, help="where to keep it")


def run(args) -> None:
  """Prints the plan of a config on a topology, or the best that fit."""
  where = topology.parse(args.topology, args.slices)
  if args.json:
    workdir.require_writable(args.json, "--json")
  # Before JAX looks for devices, as it does when a config is checked.
  topology.prepare()
  config = configs.load(args.config, [*args.overrides, *args.mesh])
  if args.batch:
    with errors.naming("--batch"):
      data = dataclasses.replace(config.data, batch_size=args.batch)
      config = dataclasses.replace(config, data=data)
  compile_it = not args.model_only and topology.is_installed(where)
  if not compile_it and not args.model_only:
    print(
      f"Modelled, not compiled: to compile for {where.name}, install "
      f"flowjax[{where.extra}].\n"
    )
  if args.search:
    found = _search(config, where, compile_it)
  else:
    found = _one(config, where, compile_it)
  if args.json:
    workdir.write_json(args.json, found.to_json())
    print(f"\nwritten to {args.json}")


def _one(
  config: experiment.Experiment, where: topology.Topology, compile_it: bool
) -> plan.Plan:
  started = time.monotonic()
  if compile_it:
    print(f"Compiling for {where}; minutes for billions of parameters ...")
    found, _ = plan.compiled(config, where)
    print(f"Compiled in {time.monotonic() - started:.0f} s.\n")
  else:
    found = plan.modelled(config, where)
  show(found)
  return found


def _search(
  config: experiment.Experiment, where: topology.Topology, compile_it: bool
) -> plan.Plan:
  found = search.run(
    config,
    where,
    compiles=search.COMPILED if compile_it else 0,
    told=lambda line: print(line, flush=True),
  )
  table = rich.table.Table(title="what fits, the fastest first")
  for name in ("mesh", "batch", "remat", "memory", "images/s", "MFU"):
    table.add_column(name, no_wrap=True)
  for one in found:
    split = {axis: n for axis, n in one.shape.items() if n > 1}
    table.add_row(
      " ".join(f"{axis}={n}" for axis, n in split.items()) or "one device",
      f"{one.batch_size:,}",
      one.remat,
      f"{_gib(one.bytes_per_device)}, {one.source}",
      f"{one.batch_size / one.step.seconds:,.0f}, modelled",
      f"{100 * one.mfu:.1f}%",
    )
  rich.console.Console(width=WIDTH).print(table)
  best = found[0]
  axes = " ".join(
    f"--config.mesh.{axis}={size}" for axis, size in best.shape.items()
  )
  print(
    f"The first as flags: {axes} --config.data.batch_size={best.batch_size} "
    f"--config.model.remat={best.remat}\n"
  )
  show(best)
  return best


def show(found: plan.Plan) -> None:
  """Prints a plan; each line says whether it is compiled or modelled."""
  here, step = found.source, found.step
  room = found.hbm_bytes - found.bytes_per_device
  verdict = (
    f"fits, {_gib(room)} to spare"
    if found.fits
    else f"DOES NOT FIT: {_gib(-room)} too much"
  )
  _line("cluster", f"{found.topology}")
  _line("mesh", f"{_shape(found)}, batch {found.batch_size:,}")
  _line(
    "memory per device",
    f"{_gib(found.bytes_per_device)} of {_gib(found.hbm_bytes)}: {verdict}",
    here,
  )
  for name, size in found.memory.items():
    counted = name in ("parameters", "average", "optimizer")
    compiled = here if name in ("batch", "temporaries") else "modelled"
    _line(f"  {name}", _gib(size), "counted" if counted else compiled)
  per_image = found.flops_per_step / found.batch_size
  _line("FLOPs per step", f"{found.flops_per_step:.4g}", "formula")
  _line("  per image", f"{per_image:.4g}", "formula")
  _line(
    "  done, with what is remade",
    f"{found.flops_done:.4g} ({found.flops_done / found.flops_per_step:.2f}x)",
    "counted",
  )
  _wires(found)
  _line("step", f"{_seconds(step.seconds)}", "modelled")
  _line("  compute", _seconds(step.compute), "modelled")
  _line("  memory (norms, optimizer)", _seconds(step.memory), "modelled")
  _line(
    "  exposed communication",
    f"{_seconds(step.exposed)} of {_seconds(step.wires)} on the wires",
    "modelled",
  )
  rate = found.batch_size / step.seconds
  _line("images per second", f"{rate:,.0f}", "modelled")
  _line("MFU", f"{100 * found.mfu:.1f}%, bound by {step.bound_by}", "modelled")
  for note in found.notes:
    print(f"\n{note}")


def _wires(found: plan.Plan) -> None:
  table = rich.table.Table(title=f"collectives of a step, {found.source}")
  for name in ("kind", "axis", "dtype", "where", "a step", "bytes a step"):
    right = name in ("a step", "bytes a step")
    table.add_column(name, justify="right" if right else "left", no_wrap=True)
  rows = collectives.table(found.moved, found.layer_depth)
  for row in rows:
    table.add_row(
      row["kind"],
      row["axis"],
      row["dtype"],
      "in the layers" if row["in_layer_loop"] else "once",
      f"{row['count_per_step']:,}",
      f"{row['bytes_per_step']:,}",
    )
  if rows:
    rich.console.Console(width=WIDTH).print(table)
  else:
    _line("collectives", "none", found.source)


def _mesh(text: str) -> list[str]:
  words = text.split(",")
  for word in words:
    axis, _, size = word.partition("=")
    if not axis or not size:
      raise argparse.ArgumentTypeError(
        f"{text!r} must be axes with their sizes, such as fsdp=64,tensor=2"
      )
  return [f"--config.mesh.{word}" for word in words]


def _line(name: str, value: str, source: str = "") -> None:
  print(f"{name:<30} {value:<52} {source}".rstrip())


def _shape(found: plan.Plan) -> str:
  return " x ".join(f"{axis}={n}" for axis, n in found.shape.items())


def _gib(size: float) -> str:
  return f"{size / GIB:.2f} GiB"


def _seconds(seconds: float) -> str:
  return f"{seconds:.3g} s" if seconds >= 0.1 else f"{1000 * seconds:.3g} ms"
