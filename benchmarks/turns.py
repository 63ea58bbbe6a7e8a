"""Contestants that take turns, and what follows from their clocks."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

# Threads spin for a while after their work; the next one is not to pay.
REST_SECONDS = 0.1
# No further round is begun after so long: a busy machine gets fewer.
LIMIT_SECONDS = 150.0

Run = Callable[[], Any]
Clocks = dict[str, list[float]]


def take_turns(
  contestants: dict[str, Run],
  rounds: int,
  ends: dict[str, Any] | None = None,
) -> dict[str, Clocks]:
  """Returns the wall and CPU seconds of each contestant, by round.

  All run once before, which compiles them; what that returned goes to `ends`.
  """
  begun = time.monotonic()
  names = list(contestants)
  clocks: dict[str, Clocks] = {}
  for name in names:
    clocks[name] = {"wall": [], "cpu": []}
    end = contestants[name]()
    if ends is not None:
      ends[name] = end
  for i in range(rounds):
    if i and time.monotonic() - begun > LIMIT_SECONDS:
      print(f"no time for rounds {i + 1} to {rounds}")
      break
    # Another one begins each time, so that none always follows the same.
    first = i % len(names)
    for name in names[first:] + names[:first]:
      time.sleep(REST_SECONDS)
      before = time.perf_counter(), time.process_time()
      contestants[name]()
      clocks[name]["wall"].append(time.perf_counter() - before[0])
      clocks[name]["cpu"].append(time.process_time() - before[1])
  print(
    f"{len(names)} took turns for {time.monotonic() - begun:.0f} s", flush=True
  )
  return clocks


def summary(clocks: Clocks) -> dict[str, float]:
  """Returns the fastest and the median."""
  wall = clocks["wall"]
  return {"min": min(wall), "median": statistics.median(wall)}


def overhead(clocks: Clocks, bare: Clocks, count: int) -> dict[str, Any]:
  """Returns what one of `count` evaluations takes, and beyond the bare one's.

  In percent of the bare one: by the fastest, by the medians, by the median of
  the ratios within a round, and by the fewest CPU seconds of all threads.
  """
  wall, own = summary(clocks), summary(bare)
  ratios = [a / b for a, b in zip(clocks["wall"], bare["wall"], strict=True)]
  return {
    "seconds": clocks["wall"],
    "bare_seconds": bare["wall"],
    "seconds_per_evaluation_min": wall["min"] / count,
    "seconds_per_evaluation_median": wall["median"] / count,
    "bare_seconds_per_evaluation_min": own["min"] / count,
    "bare_seconds_per_evaluation_median": own["median"] / count,
    "overhead_percent_min": _percent(wall["min"] / own["min"]),
    "overhead_percent_median": _percent(wall["median"] / own["median"]),
    "overhead_percent_paired": _percent(statistics.median(ratios)),
    "overhead_percent_by_cpu": _percent(min(clocks["cpu"]) / min(bare["cpu"])),
  }


def beyond(
  clocks: Clocks,
  bare: Clocks,
  steps: int,
  nothing: bool,
) -> dict[str, Any]:
  """Returns microseconds per step, and beyond the same library's bare network.

  All of it is beyond where the network is next to `nothing`.
  """
  wall, own = summary(clocks), summary(bare)
  row: dict[str, Any] = {"seconds": clocks["wall"]}
  for kind in wall:
    less = 0.0 if nothing else own[kind]
    row[f"microseconds_per_step_{kind}"] = 1e6 * wall[kind] / steps
    row[f"beyond_network_microseconds_{kind}"] = (
      1e6 * (wall[kind] - less) / steps
    )
  return row


def saved(none: float, interval: float, everywhere: float) -> float:
  """Returns the share of guidance's cost that an interval saves."""
  return (everywhere - interval) / (everywhere - none)


def distance(a: Any, b: Any) -> float:
  """Returns |a - b| / |b|: loops that do the same end in the same place."""
  a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
  return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def _percent(ratio: float) -> float:
  return 100.0 * (ratio - 1.0)
