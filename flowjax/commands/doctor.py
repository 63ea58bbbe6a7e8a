"""Says what FlowJAX sees here, and what is off; on one machine or across a job.

Devices, what joins them, processes, versions, the attention bodies that work,
how fast the workdir is written, and how fast devices add up along each axis of
a mesh. Ends with exit code 2, and advice, where something is off.

example:
  flowjax doctor --workdir=runs/digits --mesh=data=2,fsdp=-1
"""

import argparse
import glob
import importlib.metadata
import os
import pathlib
import re
import sys
import tempfile
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

import flowjax
from flowjax import errors
from flowjax.commands import flags
from flowjax.ops import attention
from flowjax.parallel import chips, compiler_flags, distributed, wires
from flowjax.parallel import mesh as meshes
from flowjax.train import workdir

PACKAGES = (
  "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "libtpu",
  "jax-cuda12-plugin", "jax-cuda13-plugin",
)  # fmt: skip
# Below this a checkpoint of a large run takes longer than it should.
SLOW_DISK = 50e6

Facts = dict[str, Any]


def add_flags(parser) -> None:
  """Adds the flags of `doctor`."""
  parser.add_argument(
    "--workdir", type=flags.path, help="a folder whose disk is to be measured"
  )
  parser.add_argument(
    "--write_size",
    type=flags.size,
    default="256MB",
    help="how much each process writes there",
  )
  parser.add_argument(
    "--mesh",
    type=_mesh,
    default="data=-1",
    help="axes to add up along, as config.mesh has them",
  )
  parser.add_argument(
    "--reduce_size",
    type=flags.size,
    help="what each device adds up; default: 64MB, on a CPU 4MB",
  )
  parser.add_argument("--json", type=flags.path, help="where to keep it all")


def run(args) -> None:
  """Looks at everything, prints it, and raises what is off."""
  if args.json:
    workdir.require_writable(args.json, "--json")
  off: list[str] = []
  facts: Facts = {"versions": versions()}
  print(compiler_flags.apply())
  facts["devices"] = devices(off)
  show(facts)
  facts |= {"attention": bodies(off)}
  show({"attention": facts["attention"]})
  facts |= {"all_reduce_bytes_per_second": reductions(args, off)}
  show({"all-reduce": _rates(facts["all_reduce_bytes_per_second"])})
  if args.workdir:
    facts |= {"write_bytes_per_second": disk(args, off)}
    show({"workdir": _rates(facts["write_bytes_per_second"])})
  facts["off"] = off
  if args.json and distributed.is_first():
    workdir.write_json(args.json, facts)
    print(f"written to {args.json}")
  if off:
    raise errors.UserError("This is off:\n  " + "\n  ".join(off))
  print("All is well.")


def show(facts: Facts) -> None:
  """Prints groups of facts, one fact a line."""
  for group, rows in facts.items():
    print(f"\n{group}")
    for name, value in rows.items():
      print(f"  {name:<22} {value}")


def versions() -> Facts:
  """Returns the versions of all that computes."""
  found: Facts = {
    "flowjax": flowjax.__version__,
    "python": sys.version.split()[0],
  }
  for package in PACKAGES:
    try:
      found[package] = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
      continue
  return found


def devices(off: list[str]) -> Facts:
  """Returns which devices there are, in how many processes and slices."""
  all_devices, local = jax.devices(), jax.local_devices()
  first, peers = all_devices[0], distributed.peers()
  each = np.atleast_1d(multihost_utils.process_allgather(np.array(len(local))))
  slices = {getattr(device, "slice_index", 0) for device in all_devices}
  found: Facts = {
    "devices": f"{len(all_devices)} x {first.device_kind} ({first.platform})",
    "processes": jax.process_count(),
    "devices of a process": ", ".join(map(str, sorted(set(each.tolist())))),
    "hosts": ", ".join(sorted(set(peers.hosts()))) if peers else "this one",
    "slices": len(slices),
  }
  memory = (local[0].memory_stats() or {}).get("bytes_limit")
  if memory:
    found["memory of a device"] = f"{memory / 2**30:.1f} GiB"
  peak = chips.peak_flops(first)
  if peak:
    found["peak of a device"] = f"{peak / 1e12:.0f} TFLOP/s in bfloat16"
  interconnect = chips.wires_of(first.device_kind)
  if interconnect:
    found["interconnect"] = f"{interconnect} (data sheet)"
  off += _device_trouble(first.platform, each.tolist())
  return found


def _device_trouble(platform: str, each: list[int]) -> list[str]:
  """Says what is off with the devices and the processes."""
  off, env = [], os.environ
  gpus, chips = glob.glob("/dev/nvidia[0-9]*"), glob.glob("/dev/accel*")
  if platform == "cpu" and env.get("JAX_PLATFORMS", "") != "cpu":
    if gpus:
      off.append(
        f"There are {len(gpus)} NVIDIA GPUs, and JAX runs on the CPU: pip "
        "install 'flowjax[gpu]', and look at the driver with nvidia-smi."
      )
    if chips:
      off.append(
        f"There are {len(chips)} TPU chips, and JAX runs on the CPU: pip "
        "install 'flowjax[tpu]', and see that no other process has them."
      )
  if len(set(each)) > 1:
    off.append(
      f"Processes have {sorted(set(each))} devices: a mesh needs as many of "
      "each. Look for a device that is broken or taken."
    )
  threads = int(env.get("NPROC", 0) or os.cpu_count() or 1)
  if platform == "cpu" and each[0] > 1 and threads < each[0] + 2:
    off.append(
      f"{each[0]} CPU devices share {threads} threads, and can wait for each "
      "other for ever: export NPROC=16 before the command."
    )
  tasks = int(env.get("SLURM_NTASKS", 1))
  if tasks > 1 and len(each) == 1:
    off.append(
      f"SLURM has {tasks} tasks for this job, and this process is alone: start "
      "it by srun."
    )
  return off


def bodies(off: list[str]) -> Facts:
  """Runs each attention body, forth and back, and says how that went."""
  local = jax.local_devices()
  context = 2 if len(local) % 2 == 0 else 1
  mesh = meshes.build(meshes.MeshConfig(data=-1, context=context), local)
  shape = (len(local), 256, 2 * context, 64)
  q_BTNH = np.random.default_rng(0).standard_normal(shape, np.float32)
  found: Facts = {}
  for body in attention.BODIES:
    if body == "auto":
      continue

    def loss(x_BTNH, body=body):
      y_BTNH = attention.attention(x_BTNH, x_BTNH, x_BTNH, body=body)
      return jnp.sum(jnp.square(y_BTNH.astype(jnp.float32)))

    try:
      with meshes.use(mesh):
        value, grad = jax.jit(jax.value_and_grad(loss))(
          jnp.asarray(q_BTNH, jnp.bfloat16)
        )
      sound = bool(jnp.isfinite(value) & jnp.isfinite(grad).all())
      found[body] = "works" if sound else "runs, and is not finite"
      if not sound:
        off.append(f"Attention by {body!r} is not finite: do not use it here.")
    except Exception as error:  # Whatever it is: that is what one came to see.
      found[body] = f"no: {(str(error).splitlines() or [repr(error)])[0][:160]}"
  if found["xla"] != "works":
    off.append(f"Attention in plain JAX does not work: {found['xla']}")
  return found


def reductions(args, off: list[str]) -> Facts:
  """Returns bytes per second and device, along each axis of the mesh."""
  with errors.naming("--mesh"):
    mesh = meshes.build(args.mesh)
  size = args.reduce_size or (
    4 * 10**6 if jax.devices()[0].platform == "cpu" else 64 * 10**6
  )
  found: Facts = {}
  for axis, ways in mesh.shape.items():
    if ways == 1:
      continue
    try:
      found[f"{axis} ({ways})"] = wires.all_reduce(mesh, axis, size)
    except ValueError as error:
      off.append(f"{error}: a device, or a wire to it, is broken.")
  return found


def disk(args, off: list[str]) -> Facts:
  """Returns at how many bytes per second each process writes the workdir."""
  rate, problem = 0.0, ""
  try:
    args.workdir.mkdir(parents=True, exist_ok=True)
    rate = _written(args.workdir, args.write_size)
  except OSError as error:
    problem = f"{error.strerror}"
  rates = multihost_utils.process_allgather(np.array(rate, np.float32))
  found = {
    f"process {i}": float(rate) for i, rate in enumerate(np.atleast_1d(rates))
  }
  for name, value in found.items():
    if not value:
      off.append(
        f"{args.workdir} cannot be written by {name}"
        f"{f': {problem}' if problem else ''}. See to the disk, or choose "
        "another --workdir."
      )
    elif value < SLOW_DISK:
      off.append(
        f"{args.workdir} is written at {value / 1e6:.0f} MB/s by {name}: "
        "checkpoints will take long. Choose a disk that is nearer, or a larger "
        "config.checkpoint.every."
      )
  return found


def _written(folder: pathlib.Path, size: int) -> float:
  block = np.random.default_rng(0).bytes(min(size, 2**24))
  with tempfile.TemporaryFile(dir=folder) as file:
    before, left = time.monotonic(), size
    while left > 0:
      left -= file.write(block[:left])
    file.flush()
    os.fsync(file.fileno())
    return size / (time.monotonic() - before)


def _mesh(text: str) -> meshes.MeshConfig:
  pairs = re.findall(r"(\w+)=(-?\d+)", text)
  sizes = {axis: int(size) for axis, size in pairs}
  # Where there is more than such pairs, they do not make up the text.
  read = ",".join(f"{axis}={size}" for axis, size in pairs) == text
  if not text or not read or sizes.keys() - set(meshes.AXES):
    raise argparse.ArgumentTypeError(
      f"{text!r} must be sizes of axes, such as data=2,fsdp=-1. There are: "
      f"{', '.join(meshes.AXES)}"
    )
  if -1 not in sizes.values() and "data" not in sizes:
    sizes["data"] = 1
  elif -1 in sizes.values():
    sizes = {"data": 1, **sizes}
  try:
    return meshes.MeshConfig(**sizes)
  except ValueError as error:
    raise argparse.ArgumentTypeError(str(error).rstrip(".")) from error


def _rates(found: Facts) -> Facts:
  rows = {name: f"{rate / 1e9:.3g} GB/s" for name, rate in found.items()}
  return rows or {"one device": "there is nothing to add up"}
