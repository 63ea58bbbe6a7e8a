"""Where the time of a step goes, by the profilers of jax and torch."""

import collections
import collections.abc
import pathlib
import tempfile
from typing import Any

Run = collections.abc.Callable[[], None]
TOP = 25


def of_jax(run: Run, steps: int) -> list[dict[str, Any]]:
  """Returns the operations that take the most time, with seconds per step."""
  import jax

  with tempfile.TemporaryDirectory() as folder:
    with jax.profiler.trace(folder):
      run()
    (file,) = pathlib.Path(folder).rglob("*.xplane.pb")
    data = jax.profiler.ProfileData.from_file(str(file))
  total: collections.Counter[str] = collections.Counter()
  for plane in data.planes:
    on_gpu = plane.name.startswith("/device:GPU")
    for line in plane.lines:
      if on_gpu and not line.name.startswith("Stream"):
        continue  # The same kernels again, grouped in other ways.
      spans = [
        (event.start_ns, event.start_ns + event.duration_ns, event.name)
        for event in line.events
        if on_gpu or "hlo_op" in dict(event.stats)
      ]
      total.update(own_time(spans))
  return _table(total, steps, 1e-9)


def own_time(
  spans: list[tuple[float, float, str]],
) -> collections.Counter[str]:
  """Returns the time of each name without that of the spans inside it."""
  total: collections.Counter[str] = collections.Counter()
  open_spans: list[tuple[float, str]] = []
  for start, end, name in sorted(spans, key=lambda span: (span[0], -span[1])):
    while open_spans and open_spans[-1][0] <= start:
      open_spans.pop()
    if open_spans:
      total[open_spans[-1][1]] -= end - start  # type: ignore[assignment]
    total[name] += end - start  # type: ignore[assignment]
    open_spans.append((end, name))
  return total


def of_torch(run: Run, steps: int) -> list[dict[str, Any]]:
  """Returns the kernels that take the most time, with seconds per step."""
  import torch

  on_gpu = torch.cuda.is_available()
  kind = torch.profiler.ProfilerActivity
  activity = kind.CUDA if on_gpu else kind.CPU
  with torch.profiler.profile(activities=[activity]) as profile:
    run()
  total: collections.Counter[str] = collections.Counter()
  for event in profile.key_averages():
    spent = (
      event.self_device_time_total if on_gpu else event.self_cpu_time_total
    )
    total[event.key] += spent
  return _table(total, steps, 1e-6)


def _table(
  total: collections.Counter[str], steps: int, unit: float
) -> list[dict[str, Any]]:
  everything = sum(total.values())
  rows = [("all", everything), *total.most_common(TOP)]
  return [
    {
      "name": name[:120],
      "seconds": spent * unit / steps,
      "share": spent / everything if everything else 0.0,
    }
    for name, spent in rows
  ]
