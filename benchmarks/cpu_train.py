"""Trains DiT-S/2 on a CPU: FlowJAX beside PyTorch, in one run, interleaved.

  python benchmarks/cpu_train.py --out=benchmarks/results/cpu.json

Every variant lives in a process of its own, built once. Then, round after
round, each takes a step and some matrix products while the others sleep.
benchmarks/README.md says how to read the result.
"""

import argparse
import contextlib
import dataclasses
import os
import pathlib
import shutil
import statistics
import subprocess
import tempfile
import time
from typing import Any

import measure
import parent
import workload

HERE = pathlib.Path(__file__).resolve().parent
# Threads spin for a while after their work; the next variant is not to pay.
REST_SECONDS = 0.3


@dataclasses.dataclass(frozen=True)
class Variant:
  """What sets one variant apart.

  `mkl` loads mkl_vendor.c before MKL; `huge_pages` has the C library ask the
  kernel for huge pages, which spares a page fault for every 4 KiB.
  """

  library: str
  dtype: str = "float32"
  compile: str = "none"
  mkl: bool = False
  huge_pages: bool = False


VARIANTS = {
  "flowjax": Variant("flowjax"),
  "flowjax_huge": Variant("flowjax", huge_pages=True),
  "flowjax_bf16": Variant("flowjax", "bfloat16"),
  "torch": Variant("torch"),
  "torch_bf16": Variant("torch", "bfloat16"),
  "torch_compile": Variant("torch", compile="whole"),
  "torch_compile_bf16": Variant("torch", "bfloat16", compile="whole"),
  "torch_mkl": Variant("torch", mkl=True),
  "torch_mkl_compile": Variant("torch", compile="whole", mkl=True),
  "torch_mkl_huge": Variant("torch", mkl=True, huge_pages=True),
}


def parse() -> argparse.Namespace:
  """Reads the flags."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  add = parser.add_argument
  add("--out", type=pathlib.Path, required=True, help="where the JSON goes")
  add("--size", choices=workload.SIZES, default="s")
  add("--batch", type=int, default=8)
  add("--threads", type=int, default=len(os.sched_getaffinity(0)))
  add("--rounds", type=int, default=10)
  add("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
  add("--depths", nargs="*", type=int, default=[12, 24], help="to compile")
  add("--xla", default="default", help="a set of parent.XLA, or flags")
  add("--kernels", action="store_true", help="also record where time goes")
  return parser.parse_args()


def main() -> None:
  """Builds, measures, compares."""
  flags = parse()
  work = workload.Workload(
    size=flags.size, batch=flags.batch, threads=flags.threads, xla=flags.xla
  )
  result: dict[str, Any] = {
    "benchmark": "cpu_train",
    "machine": measure.machine(),
    "model": {"size": flags.size, "tokens": work.tokens, **work.model()},
    "batch": flags.batch,
    "threads": flags.threads,
    "xla_flags": parent.environment(work)["XLA_FLAGS"],
    "train_gflops_per_step": work.train_flops() * flags.batch / 1e9,
  }
  with tempfile.TemporaryDirectory() as text, contextlib.ExitStack() as stack:
    folder = pathlib.Path(text)
    children, built = {}, {}
    for name in flags.variants:
      child = start(name, work, folder)
      children[name] = stack.enter_context(child)
      built[name] = child.ask("build")
      child.ask("steps", count=2)
      print(f"{name:<18} built in {built[name]['build_seconds']:.1f} s")
    others = measure.Others([x.process.pid for x in children.values()])
    clocks = take_turns(children, flags.rounds)
    result["cores_used_by_others"] = others.cores()
    result["variants"] = {
      name: {
        **dataclasses.asdict(VARIANTS[name]),
        **built[name],
        **child.ask("report"),
        **summary(clocks[name], work),
      }
      for name, child in children.items()
    }
    if flags.kernels:
      for name, child in children.items():
        result["variants"][name] |= child.ask("kernels", count=2)
  result["compile"] = compile_times(work, flags.depths, flags.rounds)
  result["load_average_after"] = measure.load_average()
  measure.write(flags.out, result)
  show(result)


def start(
  name: str, work: workload.Workload, folder: pathlib.Path
) -> parent.Child:
  """Starts the process of a variant, whose compiler starts from nothing."""
  variant = VARIANTS[name]
  environment = {
    "TORCHINDUCTOR_CACHE_DIR": str(folder / f"{name}_inductor"),
    "TORCHINDUCTOR_COMPILE_THREADS": "1",
  }
  if variant.mkl:
    environment["LD_PRELOAD"] = str(build_mkl_vendor(folder))
  if variant.huge_pages:
    environment["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
  work = dataclasses.replace(
    work,
    library=variant.library,
    dtype=variant.dtype,
    compile=variant.compile,
  )
  return parent.Child(work, folder / f"{name}.log", environment)


def build_mkl_vendor(folder: pathlib.Path) -> pathlib.Path:
  """Compiles mkl_vendor.c into a shared library."""
  if shutil.which("cc") is None:
    raise SystemExit("There is no C compiler cc: leave out torch_mkl variants.")
  library = folder / "mkl_vendor.so"
  source = str(HERE / "mkl_vendor.c")
  subprocess.run(
    ["cc", "-shared", "-fPIC", "-O1", "-o", str(library), source], check=True
  )
  return library


def take_turns(
  children: dict[str, parent.Child], rounds: int
) -> dict[str, dict[str, list[float]]]:
  """Returns the clocks of every variant, by round."""
  names = list(children)
  clocks: dict[str, dict[str, list[float]]] = {
    name: {"wall": [], "cpu": [], "matmul": [], "matmul_by_cpu": []}
    for name in names
  }
  for i in range(rounds):
    # Another one begins each time, so that none always follows the same.
    first = i % len(names)
    for name in names[first:] + names[:first]:
      row, child = clocks[name], children[name]
      time.sleep(REST_SECONDS)
      step = child.ask("steps", count=1)
      row["wall"] += step["wall"]
      row["cpu"] += step["cpu"]
      time.sleep(REST_SECONDS)
      matmul = child.ask("matmul", seconds=0.2)
      row["matmul"].append(matmul["best"])
      row["matmul_by_cpu"].append(matmul["per_cpu_second"])
    print(f"round {i + 1} of {rounds}", flush=True)
  return clocks


def summary(
  clocks: dict[str, list[float]], work: workload.Workload
) -> dict[str, Any]:
  """Returns the minimum, the median and the rates of one variant's clocks.

  `share_of_matmul` is that of the same library and dtype in the same run: once
  by the wall, once by CPU seconds, which other processes disturb less.
  """
  flops = work.train_flops() * work.batch
  wall, cpu = min(clocks["wall"]), min(clocks["cpu"])
  return {
    "step_seconds": clocks["wall"],
    "step_seconds_min": wall,
    "step_seconds_median": statistics.median(clocks["wall"]),
    "step_cpu_seconds_min": cpu,
    "step_cpu_seconds_median": statistics.median(clocks["cpu"]),
    "images_per_second": work.batch / wall,
    "gflops": flops / wall / 1e9,
    "matmul_gflops": max(clocks["matmul"]) / 1e9,
    "matmul_gflops_per_cpu_second": max(clocks["matmul_by_cpu"]) / 1e9,
    "share_of_matmul": flops / wall / max(clocks["matmul"]),
    "share_of_matmul_by_cpu": flops / cpu / max(clocks["matmul_by_cpu"]),
  }


def compile_times(
  work: workload.Workload, depths: list[int], rounds: int
) -> dict[str, dict[str, float]]:
  """Returns the seconds in which FlowJAX traces and compiles each depth.

  In turns, and the least of at most three rounds: the first warms what the
  others find warm.
  """
  rows: dict[str, list[dict[str, float]]] = {str(x): [] for x in depths}
  with tempfile.TemporaryDirectory() as folder:
    with parent.Child(work, pathlib.Path(folder) / "compile.log") as child:
      for _ in range(min(3, rounds) if depths else 0):
        for depth in depths:
          rows[str(depth)].append(child.ask("compile", depth=depth))
  return {
    depth: {key: min(row[key] for row in found) for key in found[0]}
    for depth, found in rows.items()
  }


def show(result: dict[str, Any]) -> None:
  """Prints a table of what was found."""
  heads = (
    "step s",
    "median",
    "cpu s",
    "images/s",
    "GFLOP/s",
    "matmul",
    "share",
  )
  print(f"{'':<18}" + "".join(f"{head:>10}" for head in heads))
  for name, row in result["variants"].items():
    print(
      f"{name:<18}{row['step_seconds_min']:>10.3f}"
      f"{row['step_seconds_median']:>10.3f}{row['step_cpu_seconds_min']:>10.3f}"
      f"{row['images_per_second']:>10.2f}{row['gflops']:>10.0f}"
      f"{row['matmul_gflops']:>10.0f}{row['share_of_matmul']:>10.1%}"
    )
  for depth, row in result["compile"].items():
    print(
      f"depth {depth}: traced in {row['lower_seconds']:.2f} s, "
      f"compiled in {row['compile_seconds']:.2f} s"
    )
  others = result["cores_used_by_others"]
  print(f"Other processes kept {others:.2f} cores busy meanwhile.")
  if others > 0.1:
    print("That is too much: these numbers are not to be quoted.")


if __name__ == "__main__":
  main()
