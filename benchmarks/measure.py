"""Clocks, and the record of the machine that they ran on."""

import datetime
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import time
from typing import Any, Protocol

Handle = Any


class Side(Protocol):
  """One library at work. What is enqueued is not yet done: `wait` for it."""

  def step(self) -> Handle: ...
  def matmul(self) -> Handle: ...
  def wait(self, handle: Handle) -> None: ...


def one_by_one(side: Side, count: int) -> dict[str, list[float]]:
  """Returns the wall and the CPU seconds of each of `count` steps.

  CPU seconds are those of all threads of this process: they say what a step
  costs when other processes take their share of the machine.
  """
  wall, cpu = [], []
  for _ in range(count):
    before = time.perf_counter(), time.process_time()
    side.wait(side.step())
    wall.append(time.perf_counter() - before[0])
    cpu.append(time.process_time() - before[1])
  return {"wall": wall, "cpu": cpu}


def sustained(side: Side, seconds: float) -> dict[str, Any]:
  """Steps for at least `seconds`, with the next step always enqueued.

  `first` and `last` are the seconds per step in the first and the last tenth
  of the time: a device that grows hot slows down.
  """
  side.wait(side.step())
  marks = [time.perf_counter()]
  pending = side.step()
  while marks[-1] - marks[0] < seconds or len(marks) < 4:
    following = side.step()
    side.wait(pending)
    marks.append(time.perf_counter())
    pending = following
  side.wait(pending)
  marks.append(time.perf_counter())
  each = [b - a for a, b in zip(marks, marks[1:], strict=False)]
  tenth = max(1, len(each) // 10)
  return {
    "seconds": marks[-1] - marks[0],
    "steps": len(each),
    "step_seconds": (marks[-1] - marks[0]) / len(each),
    "step_seconds_median": statistics.median(each),
    "step_seconds_first": statistics.mean(each[:tenth]),
    "step_seconds_last": statistics.mean(each[-tenth:]),
  }


def matmul_rate(
  side: Side, flops: int, seconds: float, at_once: int = 1
) -> dict[str, float]:
  """Returns the FLOP/s of the library's own matrix product.

  Products are enqueued `at_once`, for at least `seconds`. `per_cpu_second` is
  the best rate by the CPU seconds that all threads spent.
  """
  side.wait(side.matmul())
  rates: list[float] = []
  by_cpu: list[float] = []
  begun = time.perf_counter()
  while len(rates) < 3 or time.perf_counter() - begun < seconds:
    before = time.perf_counter(), time.process_time()
    for _ in range(at_once):
      last = side.matmul()
    side.wait(last)
    rates.append(at_once * flops / (time.perf_counter() - before[0]))
    by_cpu.append(at_once * flops / (time.process_time() - before[1]))
  return {
    "best": max(rates),
    "median": statistics.median(rates),
    "per_cpu_second": max(by_cpu),
  }


class Others:
  """How many cores other processes kept busy, on average, since its birth.

  All that the kernel counted as busy, less what `ours`, and this process,
  used.
  """

  def __init__(self, ours: list[int]):
    self.ours = [os.getpid(), *ours]
    self.before = time.monotonic(), _busy_ticks(), self._our_ticks()

  def cores(self) -> float:
    begun, busy, ours = self.before
    spent = _busy_ticks() - busy - (self._our_ticks() - ours)
    elapsed = time.monotonic() - begun
    return max(0.0, spent / os.sysconf("SC_CLK_TCK") / elapsed)

  def _our_ticks(self) -> int:
    total = 0
    for pid in self.ours:
      text = pathlib.Path(f"/proc/{pid}/stat").read_text()
      # Fields 14 and 15 of proc(5); the name, in brackets, may hold spaces.
      total += sum(map(int, text.rpartition(")")[2].split()[11:13]))
    return total


def _busy_ticks() -> int:
  cpu = pathlib.Path("/proc/stat").read_text().splitlines()[0].split()
  user, nice, system, _, _, irq, softirq, steal = map(int, cpu[1:9])
  return user + nice + system + irq + softirq + steal


def load_average() -> list[float]:
  """Returns the load of the last 1, 5 and 15 minutes."""
  return list(os.getloadavg())


def machine() -> dict[str, Any]:
  """Describes the processor, its cores, the graphics cards and the date."""
  cpuinfo = pathlib.Path("/proc/cpuinfo")
  lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
  models = [
    x.split(":")[1].strip() for x in lines if x.startswith("model name")
  ]
  return {
    "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    "command": " ".join([pathlib.Path(sys.argv[0]).name, *sys.argv[1:]]),
    "cpu": models[0].strip() if models else platform.processor(),
    "cores": len(os.sched_getaffinity(0)),
    "python": platform.python_version(),
    "gpus": gpus(),
    "load_average": load_average(),
  }


def gpus() -> list[dict[str, str]]:
  """Returns what nvidia-smi says of each card now; empty without one."""
  keys = (
    "name,driver_version,clocks.sm,clocks.mem,power.draw,power.limit,"
    "temperature.gpu,memory.used"
  )
  command = ["nvidia-smi", f"--query-gpu={keys}", "--format=csv,noheader"]
  try:
    found = subprocess.run(
      command, capture_output=True, text=True, timeout=20, check=True
    )
  except (OSError, subprocess.SubprocessError):
    return []
  return [
    dict(zip(keys.split(","), line.split(", "), strict=False))
    for line in found.stdout.splitlines()
  ]


def write(path: pathlib.Path, result: dict[str, Any]) -> None:
  """Writes a result whole: a reader never sees half of one."""
  path.parent.mkdir(parents=True, exist_ok=True)
  partial = path.with_suffix(".partial")
  partial.write_text(json.dumps(result, indent=1) + "\n")
  partial.replace(path)
