"""Imports 2 GB of weights: how fast, and in how much memory of the host.

  python benchmarks/weights_io.py --out=benchmarks/results/weights_io.json

Writes a folder of diffusers with weights of FLUX's shapes, in shards, and reads
it by turns: as plain bytes, which is the disk's own speed, and as
`flowjax import` does, onto the mesh. What the kernel remembers of the files is
dropped before each. benchmarks/README.md says how to read the result.
"""

import argparse
import concurrent.futures
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from typing import Any

import measure
import numpy as np
import parent
import workload

BLOCK = 16 * 2**20
THREADS = (1, 8)
# With memory that the process has not had before, and with some that it has.
IMPORTS = ("import", "import_touched")
# Of FLUX's shapes: 547 million parameters, 2.2 GB in float32.
SIZES: dict[str, dict[str, Any]] = {
  "flux": dict(double_depth=1, single_depth=1),
  "tiny": dict(
    image_size=(8, 8),
    width=64,
    heads=2,
    double_depth=1,
    single_depth=1,
    rope_axes=(8, 12, 12),
    text_width=32,
    pooled_width=16,
  ),
}
SHARD_BYTES = {"flux": 500 * 10**6, "tiny": 200 * 10**3}


def parse() -> argparse.Namespace:
  """Reads the flags."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  add = parser.add_argument
  add("--out", type=pathlib.Path, help="where the JSON goes")
  add("--folder", help="on the disk to measure; default: that of temporaries")
  add("--device", choices=("gpu", "cpu"), default="cpu")
  add("--size", choices=SIZES, default="flux")
  add("--dtype", default="float32", help="of the weights in the files")
  add("--rounds", type=int, default=3)
  # What the processes that this one starts are to do.
  add("--do", choices=("write", *IMPORTS), help=argparse.SUPPRESS)
  flags = parser.parse_args()
  if not (flags.out or flags.do):
    parser.error("the following arguments are required: --out")
  return flags


def write(folder: pathlib.Path, size: str, dtype: str) -> dict[str, Any]:
  """Writes a transformer's folder of diffusers, all weights N(0, 0.02^2)."""
  from flowjax.interop import diffusers_configs, folder_export, formats, shards
  from flowjax.models import flux

  config = flux.FluxConfig(**SIZES[size])
  keys = formats.layout(config, "diffusers").keys
  rng = np.random.default_rng(0)
  drawn = (
    (key, 0.02 * rng.standard_normal(shape, np.float32))
    for key, shape in keys.items()
  )
  stem = folder_export.STEMS["diffusers"]
  shards.write(
    folder, stem, keys, drawn, dtype=dtype, max_bytes=SHARD_BYTES[size]
  )
  content = json.dumps(diffusers_configs.write(config))
  (folder / "config.json").write_text(content)
  return {}


def place(folder: pathlib.Path, *, touched: bool) -> dict[str, Any]:
  """Reads a folder onto the mesh as `flowjax import` does.

  If `touched`, this process has had as much memory before.
  """
  import jax

  from flowjax import schema
  from flowjax.interop import weights
  from flowjax.train import begin, experiment, parts

  config = experiment.defaults("flux")
  model = weights.open(folder).config()
  config.model.update(schema.to_dict(model))
  config.data.update(
    image_size=model.image_size, channels=model.channels, batch_size=8
  )
  run = parts.build(experiment.build(config))
  # What libraries load at first use is no part of the reading.
  begin.place(run, ())
  touch_seconds = touch(4 * run.parameters) if touched else None
  pathlib.Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew.
  before, began = memory("VmRSS"), time.perf_counter()
  found = weights.open(folder)
  _, leaves = found.leaves(run.experiment.model)
  placed = jax.block_until_ready(begin.place(run, leaves))
  seconds = time.perf_counter() - began
  device = jax.devices()[0]
  # The memory of the host that these arrays take is theirs to take.
  held = sum(x.nbytes for x in placed.values())
  held = held if device.platform == "cpu" else 0
  peak = memory("VmHWM")
  return {
    "seconds": seconds,
    "touch_seconds": touch_seconds,
    "from_disk_bytes": from_disk(),
    "parameters": sum(x.size for x in placed.values()),
    "peak_bytes": peak,
    "before_bytes": before,
    "arrays_on_host_bytes": held,
    "beyond_arrays_bytes": peak - before - held,
    "device": device.device_kind,
    "versions": f"jax {jax.__version__}",
  }


def touch(size: int) -> float:
  """Takes memory and gives it back; returns the seconds that it took.

  A virtual machine has memory of its host's when it first touches it, and loses
  it again when it has not needed it for a while.
  """
  began = time.perf_counter()
  np.empty(size, np.uint8)[::4096] = 1
  return time.perf_counter() - began


def memory(key: str) -> int:
  """Returns a line of /proc/self/status in bytes."""
  lines = pathlib.Path("/proc/self/status").read_text().splitlines()
  (line,) = (x for x in lines if x.startswith(f"{key}:"))
  return int(line.split()[1]) * 1024


def from_disk() -> int:
  """Returns how many bytes this process has had read from a disk."""
  words = pathlib.Path("/proc/self/io").read_text().split()
  return int(words[words.index("read_bytes:") + 1])


def forget(files: list[pathlib.Path]) -> None:
  """Has the kernel write the files out and drop what it remembers of them."""
  for path in files:
    with open(path, "rb+") as file:
      os.fsync(file.fileno())
      os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_plainly(files: list[pathlib.Path], threads: int) -> dict[str, Any]:
  """Reads all bytes of the files to no use, several at a time."""
  pieces = [
    (path, start)
    for path in files
    for start in range(0, path.stat().st_size, BLOCK)
  ]

  def read(piece):
    path, start = piece
    with open(path, "rb", buffering=0) as file:
      file.seek(start)
      # Not kept: a buffer of each thread's own would do no other work.
      file.readinto(bytearray(BLOCK))

  disk, began = from_disk(), time.perf_counter()
  with concurrent.futures.ThreadPoolExecutor(threads) as pool:
    list(pool.map(read, pieces))
  seconds = time.perf_counter() - began
  return {"seconds": seconds, "from_disk_bytes": from_disk() - disk}


def start(flags: argparse.Namespace, do: str, folder: pathlib.Path) -> dict:
  """Does something in a process of its own, and returns what it found.

  This one stays small: a child's peak memory begins with its parent's.
  """
  command = [
    *(sys.executable, __file__, f"--do={do}", f"--folder={folder}"),
    *(f"--size={flags.size}", f"--dtype={flags.dtype}"),
  ]
  done = subprocess.run(
    command,
    env=parent.environment(workload.Workload(device=flags.device)),
    stdout=subprocess.PIPE,
    text=True,
    check=True,
  )
  return json.loads(done.stdout.splitlines()[-1])


def one_round(flags, folder: pathlib.Path, files: list) -> dict[str, Any]:
  """Reads the files in every way, each from the disk."""
  row: dict[str, Any] = {}
  for threads in THREADS:
    forget(files)
    row[f"plain_{threads}"] = read_plainly(files, threads)
  for name in IMPORTS:
    forget(files)
    row[name] = start(flags, name, folder)
  return row


def conclude(result: dict[str, Any], rounds: list[dict[str, Any]]) -> None:
  """Says what the fastest of each way took, and the most memory."""
  size = result["bytes"]
  best = {
    name: min(row[name]["seconds"] for row in rounds) for name in rounds[0]
  }
  disk = min(best.pop(f"plain_{threads}") for threads in THREADS)
  most = max(
    row[name]["beyond_arrays_bytes"] for row in rounds for name in IMPORTS
  )
  cached = any(
    way["from_disk_bytes"] < 0.9 * size
    for row in rounds
    for way in row.values()
  )
  result |= {
    "rounds": rounds,
    "disk_gb_per_second": size / disk / 1e9,
    "gb_per_second": {name: size / best[name] / 1e9 for name in IMPORTS},
    "share_of_disk": {name: disk / best[name] for name in IMPORTS},
    "memory_over_largest_shard": most / result["largest_shard_bytes"],
    "some_came_from_memory": cached,
  }
  for name in IMPORTS:
    print(
      f"{name} {result['gb_per_second'][name]:.2f} GB/s, "
      f"{result['share_of_disk'][name]:.0%} of the disk's "
      f"{result['disk_gb_per_second']:.2f}"
    )
  print(
    f"Beyond the arrays {result['memory_over_largest_shard']:.2f} of the "
    "largest shard."
  )
  if cached:
    print("Not all came from the disk: its speed is not to be quoted.")
  if result["cores_used_by_others"] > 0.1:
    print("The machine was not quiet: its speeds are not to be quoted.")


def main() -> None:
  """Writes, reads by turns, compares."""
  flags = parse()
  if flags.do:
    folder = pathlib.Path(flags.folder)
    if flags.do == "write":
      print(json.dumps(write(folder, flags.size, flags.dtype)))
    else:
      touched = flags.do == "import_touched"
      print(json.dumps(place(folder, touched=touched)))
    return
  with tempfile.TemporaryDirectory(dir=flags.folder) as name:
    folder = pathlib.Path(name)
    start(flags, "write", folder)
    files = sorted(folder.glob("*.safetensors"))
    sizes = [path.stat().st_size for path in files]
    result: dict[str, Any] = {
      "benchmark": "weights_io",
      "machine": measure.machine(),
      "dtype": flags.dtype,
      "bytes": sum(sizes),
      "shards": len(files),
      "largest_shard_bytes": max(sizes),
    }
    others = measure.Others([])
    time.sleep(1.0)
    result["cores_used_by_others"] = others.cores()
    rounds = [one_round(flags, folder, files) for _ in range(flags.rounds)]
  conclude(result, rounds)
  result["load_average_after"] = measure.load_average()
  measure.write(flags.out, result)


if __name__ == "__main__":
  main()
