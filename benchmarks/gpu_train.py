"""Trains a network on one NVIDIA GPU: FlowJAX beside PyTorch, in one run.

  python benchmarks/gpu_train.py --out=benchmarks/results/gpu_h200.json
  python benchmarks/gpu_train.py --size=flux_4096 --out=gpu_flux_4096.json

`--size` is a DiT, by default XL/2; "flux_1024" or "flux_4096", with so many
image tokens and 512 of text, of which 12 of the 57 blocks are left, so that
one card of 141 GB holds it with its optimizer; or "mmdit_1024" or "mmdit_4096",
SD3-medium with all of its 24 blocks. text_networks.py says more.

Each side first tries a few settings for some seconds each, every one in a
process of its own; then the best of each side steps for --seconds. The result
is written after every stage, so that a run cut short leaves what it has.
benchmarks/README.md says how to read it.
"""

import argparse
import dataclasses
import pathlib
import tempfile
from typing import Any

import measure
import parent
import text_networks
import workload

# Dense bfloat16 of an H100 or H200 SXM, by the datasheet.
PEAK_TFLOPS = 989.0
LIBRARIES = ("flowjax", "torch")

START_HELP = "settings to try, each as key=value,key=value"
THEN_HELP = "changes to try on the best so far, kept where they are faster"
START = {
  # A scan moves all that it saves into stacks and out again; unrolled layers
  # do not, and take longer to compile.
  "flowjax": [
    "batch=256,attention=cudnn,scan=no",
    "batch=256,attention=cudnn,scan=yes",
  ],
  "torch": ["batch=256,compile=blocks", "batch=128,compile=blocks"],
}
# The same for networks that read texts, whose activations are larger: what does
# not fit fails, and the next is tried.
TEXT_START = {
  "flowjax": [
    "batch={},attention=cudnn,scan=no",
    "batch={},attention=cudnn,scan=no,remat=save_attention",
  ],
  "torch": ["batch={},compile=blocks"],
}
TEXT_BATCHES = {"1024": (32, 16), "4096": (8, 4), "tiny": (2,)}
# What compiles slowest comes last: time may run out.
THEN = {
  "flowjax": ["batch=128", "xla=no_triton"],
  "torch": ["attention=cudnn", "compile=whole"],
}


def parse() -> argparse.Namespace:
  """Reads the flags."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  add = parser.add_argument
  add("--out", type=pathlib.Path, required=True, help="where the JSON goes")
  add("--device", choices=("gpu", "cpu"), default="gpu")
  add("--size", choices=(*workload.SIZES, *text_networks.SIZES), default="xl")
  add("--dtype", default="bfloat16")
  add("--seconds", type=float, default=60.0, help="of the sustained run")
  add("--probe-seconds", type=float, default=5.0, help="of each trial")
  add("--budget", type=float, default=560.0, help="seconds for everything")
  add("--peak-tflops", type=float, default=PEAK_TFLOPS)
  add("--memory-fraction", default="0.92", help="of the card, for FlowJAX")
  add("--sides", nargs="+", choices=LIBRARIES, default=list(LIBRARIES))
  add("--kernels", action="store_true", help="also record a table of kernels")
  add("--flowjax-start", nargs="+", help=START_HELP)
  add("--flowjax-then", nargs="*", help=THEN_HELP)
  add("--torch-start", nargs="+", help=START_HELP)
  add("--torch-then", nargs="*", help=THEN_HELP)
  flags = parser.parse_args()
  text = flags.size in text_networks.SIZES
  for library in LIBRARIES:
    # A batch that would change with the kind of network is no change to try.
    then = [x for x in THEN[library] if not (text and "batch" in x)]
    for name, found in (("start", starts(flags.size, library)), ("then", then)):
      if getattr(flags, f"{library}_{name}") is None:
        setattr(flags, f"{library}_{name}", found)
  return flags


def starts(size: str, library: str) -> list[str]:
  """Returns the settings that are tried first."""
  if size not in text_networks.SIZES:
    return START[library]
  batches = TEXT_BATCHES[size.partition("_")[2]]
  return [x.format(n) for n in batches for x in TEXT_START[library]]


@dataclasses.dataclass
class Run:
  """One run of the benchmark: its flags, its clock, and what it has found."""

  flags: argparse.Namespace
  deadline: parent.Deadline
  folder: pathlib.Path
  result: dict[str, Any]

  def child(self, work: workload.Workload) -> parent.Child:
    """Starts a process; compiled code is kept for the next of the same."""
    count = len(list(self.folder.glob("*.log")))
    caches = {
      "JAX_COMPILATION_CACHE_DIR": str(self.folder / "jax"),
      "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
      "TORCHINDUCTOR_CACHE_DIR": str(self.folder / "torch"),
      "XLA_PYTHON_CLIENT_MEM_FRACTION": self.flags.memory_fraction,
    }
    log = self.folder / f"{count}_{work.library}.log"
    return parent.Child(work, log, caches)

  def rates(self, step_seconds: float, work: workload.Workload) -> dict:
    """Returns the rates of a step that takes so long."""
    images = work.batch / step_seconds
    tflops = images * work.train_flops() / 1e12
    return {
      "images_per_second": images,
      "tflops": tflops,
      "mfu": tflops / self.flags.peak_tflops,
    }

  def save(self) -> None:
    measure.write(self.flags.out, self.result)


def probe(run: Run, work: workload.Workload, seconds: float) -> float:
  """Tries settings for a moment; returns images/s, 0 if they do not run."""
  row: dict[str, Any] = {"settings": settings(work)}
  run.result[work.library]["trials"].append(row)
  if seconds < 30.0:
    row["failed"] = "no time left"
    return 0.0
  end = parent.Deadline(seconds)
  try:
    with run.child(work) as child:
      row |= child.ask("build", timeout=end.left)
      child.ask("steps", count=2, timeout=end.left)
      found = child.ask(
        "sustain", seconds=run.flags.probe_seconds, timeout=max(end.left, 1.0)
      )
      row |= run.rates(found["step_seconds"], work)
      row |= child.ask("report", timeout=20.0)
  except parent.Failed as failure:
    row["failed"] = str(failure)
  finally:
    run.save()
  rate = row.get("images_per_second", 0.0)
  said = row.get("failed") or f"{rate:.1f} images/s, MFU {row['mfu']:.1%}"
  print(f"{work.library:<8} {settings(work)}\n         {said}", flush=True)
  return rate


def search(run: Run, library: str, seconds: float) -> list[workload.Workload]:
  """Returns settings that ran, the fastest first."""
  flags, end = run.flags, parent.Deadline(seconds)
  plain = workload.Workload(
    library=library, device=flags.device, size=flags.size, dtype=flags.dtype
  )
  start = [plain.changed(x) for x in getattr(flags, f"{library}_start")]
  found: dict[workload.Workload, float] = {}
  for work in start:
    found[work] = probe(run, work, end.left)
  for change in getattr(flags, f"{library}_then"):
    work = max(found, key=lambda key: found[key]).changed(change)
    if work not in found:
      found[work] = probe(run, work, end.left)
  ran = [work for work, rate in found.items() if rate]
  return sorted(ran, key=lambda work: -found[work])


def sustain(run: Run, works: list[workload.Workload]) -> None:
  """Steps for long with the best settings, or the next best that run."""
  for work in works[:2]:
    row: dict[str, Any] = {"settings": settings(work)}
    run.result[work.library]["sustained"] = row
    try:
      with run.child(work) as child:
        row |= _sustain(run, work, child)
    except parent.Failed as failure:
      row["failed"] = str(failure)
    run.save()
    if "failed" not in row:
      return


def _sustain(run: Run, work: workload.Workload, child: parent.Child) -> dict:
  seconds = run.flags.seconds
  row = child.ask("build", timeout=max(run.deadline.left, 60.0))
  child.ask("steps", count=3, timeout=60.0)
  row["gpus_before"] = measure.gpus()
  row |= child.ask("sustain", seconds=seconds, timeout=seconds + 60.0)
  row["gpus_after"] = measure.gpus()
  row |= run.rates(row["step_seconds"], work)
  # After the steps, so that both run on a hot device.
  matmul = child.ask("matmul", seconds=min(3.0, seconds), timeout=60.0)
  row["matmul_tflops"] = {k: rate / 1e12 for k, rate in matmul.items()}
  row["share_of_matmul"] = row["tflops"] / row["matmul_tflops"]["median"]
  row |= child.ask("report", timeout=20.0)
  if run.flags.kernels:
    # Last, and alone: a profiler that fails takes nothing else with it.
    try:
      row |= child.ask("kernels", count=3, timeout=60.0)
    except parent.Failed as failure:
      row["kernels"] = f"failed: {failure}"
  return row


def settings(work: workload.Workload) -> dict[str, Any]:
  """Returns what was chosen for this side."""
  keys = ["batch", "dtype", "attention"]
  keys += ["remat", "scan", "xla"] if work.library == "flowjax" else ["compile"]
  chosen = {key: getattr(work, key) for key in keys}
  if work.library == "flowjax":
    chosen["xla_flags"] = parent.environment(work)["XLA_FLAGS"]
  return chosen


def conclude(result: dict[str, Any]) -> None:
  """Compares the two sides, and prints what was found."""
  rates = {}
  for library in LIBRARIES:
    row = result.get(library, {}).get("sustained", {})
    if "images_per_second" not in row:
      continue
    rates[library] = row["images_per_second"]
    print(
      f"{library:<8} {row['images_per_second']:8.2f} images/s  "
      f"{row['tflops']:7.2f} TFLOP/s  MFU {row['mfu']:.1%}  "
      f"{row['share_of_matmul']:.1%} of its own matmul"
    )
  if len(rates) == 2:
    result["flowjax_over_torch"] = rates["flowjax"] / rates["torch"]
    print(f"flowjax / torch = {result['flowjax_over_torch']:.3f}")


def describe(work: workload.Workload) -> dict[str, Any]:
  """Returns what is said of the network, also what was cut of it."""
  note = text_networks.NOTES.get(work.kind)
  said = {} if note is None else {"note": note}
  return {"size": work.size, "tokens": work.tokens, **work.model(), **said}


def main() -> None:
  """Tries, sustains, compares."""
  flags = parse()
  work = workload.Workload(size=flags.size)
  result: dict[str, Any] = {
    "benchmark": "gpu_train",
    "machine": measure.machine(),
    "model": describe(work),
    "train_gflops_per_image": work.train_flops() / 1e9,
    "peak_tflops": flags.peak_tflops,
  }
  for library in flags.sides:
    result[library] = {"trials": []}
  with tempfile.TemporaryDirectory() as folder:
    run = Run(
      flags, parent.Deadline(flags.budget), pathlib.Path(folder), result
    )
    # What a sustained run takes besides its steps: start, cached compilation.
    reserve = len(flags.sides) * (flags.seconds + 60.0)
    best = {}
    for i, library in enumerate(flags.sides):
      sides_left = len(flags.sides) - i
      share = (run.deadline.left - reserve) / sides_left
      best[library] = search(run, library, share)
    for library in flags.sides:
      sustain(run, best[library])
    keep_logs(run)
  conclude(result)
  result["load_average_after"] = measure.load_average()
  run.save()
  if not all("tflops" in result[x].get("sustained", {}) for x in flags.sides):
    raise SystemExit(f"Not every side ran; {flags.out} says why.")


def keep_logs(run: Run) -> None:
  """Leaves what the processes said beside the result, if one failed."""
  sides = [run.result[library] for library in run.flags.sides]
  rows = [row for x in sides for row in (*x["trials"], x.get("sustained", {}))]
  if any("failed" in row for row in rows):
    text = "".join(
      f"=== {log.name}\n{log.read_text(errors='replace')[-4000:]}\n"
      for log in sorted(run.folder.glob("*.log"))
    )
    run.flags.out.with_suffix(".log").write_text(text)


if __name__ == "__main__":
  main()
