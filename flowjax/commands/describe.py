"""Shows what a config builds, without training: nothing is allocated.

A table of parameters with their sharding, the FLOPs of a step, and the memory
per device. `--devices` imagines that many; `--compile` also compiles the step,
for the memory of its activations.

example:
  flowjax describe --config=configs/imagenet_dit.py:xl_2 --devices=8 \\
    --config.mesh.fsdp=8
"""

import dataclasses
import math
from typing import Any

import jax
import rich.console
import rich.table

from flowjax import models
from flowjax.commands import configs, flags
from flowjax.parallel import host, rules
from flowjax.parallel import mesh as meshes
from flowjax.train import aspects, loop, parts

# Wider than any table: nothing is cut, also in a pipe or a narrow terminal.
WIDTH = 1000
# Pixels for a latent, in the autoencoders of Stable Diffusion and FLUX.
LATENT = 8


def add_flags(parser) -> None:
  """Adds the flags of `describe`."""
  parser.add_argument("--config", required=True, help=configs.HELP)
  parser.add_argument(
    "--devices", type=flags.count, help="imagine so many devices (on CPU)"
  )
  parser.add_argument(
    "--compile", action="store_true", help="compile the training step"
  )


def run(args) -> None:
  """Prints the tables."""
  if args.devices is not None:
    # Before a config is checked, which computes.
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", args.devices)
  config = configs.load(args.config, args.overrides)
  built = parts.build(aspects.largest(config))
  places = rules.places(built.rules, built.abstract.params, built.mesh)
  rich.console.Console(width=WIDTH).print(_parameters(places, built.mesh))
  for name, value in _summary(built, places).items():
    print(f"{name:<34} {value}")
  if args.compile:
    for name, value in _compiled(built).items():
      print(f"{name:<34} {value}")


def _parameters(
  places: dict[str, rules.Placement], mesh: jax.sharding.Mesh
) -> rich.table.Table:
  table = rich.table.Table(title="parameters")
  for name in ("name", "shape", "size", "sharding", "bytes per device"):
    left = name in ("name", "sharding", "shape")
    table.add_column(name, justify="left" if left else "right", no_wrap=True)
  for place in places.values():
    axes = [
      axis if mesh.shape.get(axis, 1) > 1 else None for axis in place.spec
    ]
    spec = ", ".join(axis or "-" for axis in axes) if any(axes) else "-"
    whole = f"  (dim {place.undivided[0]} whole)" if place.undivided else ""
    table.add_row(
      place.name,
      "x".join(map(str, place.shape)),
      f"{math.prod(place.shape):,}",
      spec + whole,
      f"{place.bytes_per_device:,}",
    )
  return table


def _summary(built: parts.Parts, places: dict) -> dict[str, str]:
  config = built.experiment
  forward, batch = built.network.flops, config.data.batch_size
  params = sum(place.bytes_per_device for place in places.values())
  trained = [p for name, p in places.items() if name not in built.frozen]
  leaves = jax.tree.leaves(built.abstract)
  away = [leaf for leaf in leaves if host.is_there(leaf.sharding)]
  stowed = sum(map(_bytes_here, away))
  state = sum(map(_bytes_here, leaves)) - stowed
  kept = "parameters, EMA" if away else "parameters, EMA, optimizer"
  buckets = config.data.buckets
  return {
    **({"buckets": aspects.said(config.data)} if buckets else {}),
    "parameters": f"{built.parameters:,}",
    **_trained(trained, built),
    "forward FLOPs per image": f"{forward:,}",
    **_by_resolution(config.model),
    "training FLOPs per step": f"{built.flops * batch:,} "
    f"({built.flops / forward:.3g} x forward x batch)",
    "mesh": _mesh(built),
    "images per device": f"{batch / meshes.batch_ways(built.mesh):g}",
    "parameters per device": _size(params),
    "state per device": f"{_size(state)} ({kept})",
    **({"  and in its host": f"{_size(stowed)} (optimizer)"} if away else {}),
    "gradients per device": _size(sum(p.bytes_per_device for p in trained)),
  }


def _mesh(built: parts.Parts) -> str:
  """Returns the axes of the mesh, and into how many slices it falls."""
  axes = " x ".join(f"{axis}={n}" for axis, n in built.mesh.shape.items())
  slices = built.experiment.mesh.slices
  if slices == -1:
    slices = meshes.slice_count(built.mesh.devices.ravel().tolist())
  return axes + (f", data over {slices} slices" if slices > 1 else "")


def _trained(trained: list, built: parts.Parts) -> dict[str, str]:
  """Returns how many parameters are trained, where some are frozen."""
  if not built.frozen:
    return {}
  count = sum(math.prod(place.shape) for place in trained)
  return {"  of which trained": f"{count:,}"}


def _by_resolution(model: Any) -> dict[str, str]:
  """Returns the arithmetic of usual sizes, for a network of latents."""
  if model.channels in (1, 3):
    return {}
  found = {}
  for pixels in (512, 1024):
    side = pixels // LATENT
    sized = dataclasses.replace(model, image_size=(side, side))
    name = f"  of {pixels}x{pixels} pixels"
    found[name] = f"{models.build(sized).flops:,} ({side}x{side} latents)"
  return found


def _bytes_here(leaf: jax.ShapeDtypeStruct) -> int:
  """Returns the bytes of a leaf on one device."""
  assert leaf.sharding is not None
  return leaf.dtype.itemsize * math.prod(leaf.sharding.shard_shape(leaf.shape))


def _compiled(built: parts.Parts) -> dict[str, str]:
  """Compiles the step for these devices and asks for its memory."""
  memory = loop.lower_step(built).compile().memory_analysis()
  total = memory.argument_size_in_bytes + memory.temp_size_in_bytes
  kind = jax.devices()[0].platform
  return {
    f"compiled for {kind}, not run": "",
    "  state and batch per device": _size(memory.argument_size_in_bytes),
    "  activations per device": _size(memory.temp_size_in_bytes),
    "  in all per device": _size(total),
    **_in_host(memory),
  }


def _in_host(memory: Any) -> dict[str, str]:
  """Returns what a compiled step keeps in the memory of the host, if any.

  On a CPU that is the memory of its devices, and counted there.
  """
  size = memory.host_argument_size_in_bytes + memory.host_temp_size_in_bytes
  return {"  and in its host": _size(size)} if size else {}


def _size(count: float) -> str:
  for unit in ("B", "KiB", "MiB", "GiB"):
    if count < 1024:
      return f"{count:.4g} {unit}"
    count /= 1024
  return f"{count:.4g} TiB"
