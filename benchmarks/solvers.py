"""What solvers cost beyond the network's own time, on a CPU, in one run.

  python benchmarks/solvers.py --out=benchmarks/results/solvers.json

1. Whole solves in one jit, beside the same number of evaluations of the bare
   network in one jit.
2. The same steps in a Python loop, and in diffusers' loop in PyTorch.
3. Guidance within an interval, beside guidance everywhere and none.

benchmarks/README.md says how to read the result.
"""

import argparse
import importlib.util
import os
import pathlib
import sys
import time
from collections.abc import Sequence
from typing import Any

import measure
import parent
import turns
import workload

# One per family and more; those that choose their own steps have no count.
SOLVERS = (
  *("euler", "heun", "ab2", "dpmpp_2m", "dpmpp_3m", "dpmpp_sde_2m", "unipc"),
  *("ddim", "euler_maruyama", "edm_heun"),
)
INTERVAL = (0.25, 0.75)


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
  """Reads the flags."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  add = parser.add_argument
  add("--out", type=pathlib.Path, required=True, help="where the JSON goes")
  add("--size", choices=workload.SIZES, default="s")
  add("--batch", type=int, default=4, help="of the solvers (1)")
  add("--threads", type=int, default=len(os.sched_getaffinity(0)))
  add("--solvers", nargs="+", default=list(SOLVERS))
  add("--evaluations", type=int, default=6, help="at most, of a solve (1)")
  add("--rounds", type=int, default=5, help="of the solvers (1)")
  add("--steps", type=int, default=50, help="of the loops (2)")
  add("--loop-batch", type=int, default=1, help="of the loops (2)")
  add("--loop-rounds", type=int, default=3, help="of the loops (2)")
  add("--small-rounds", type=int, default=15, help="of the small networks")
  add("--guided-steps", type=int, default=16, help="of guidance (3)")
  add("--guided-batch", type=int, default=2, help="of guidance (3)")
  add("--guided-rounds", type=int, default=3, help="of guidance (3)")
  add("--xla", default="default", help="a set of parent.XLA, or flags")
  return parser.parse_args(words)


def main() -> None:
  """Measures part after part, and writes what there is after each."""
  flags = parse()
  prepare(flags)
  result = run(flags)
  show(result)


def prepare(flags: argparse.Namespace) -> None:
  """Sets what the libraries read when they are imported."""
  work = workload.Workload(threads=flags.threads, xla=flags.xla)
  os.environ.update(parent.environment(work))
  os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: flags.threads])
  sys.path.insert(0, str(parent.HERE.parent))


def run(flags: argparse.Namespace) -> dict[str, Any]:
  """Returns what was found, having written it."""
  import loops_flowjax

  versions = loops_flowjax.versions()
  if has_diffusers():
    import loops_torch

    loops_torch.use_threads(flags.threads)
    versions += f", {loops_torch.versions()}"
  work = workload.Workload(size=flags.size)
  result: dict[str, Any] = {
    "benchmark": "solvers",
    "machine": measure.machine(),
    "versions": versions,
    "model": {"size": flags.size, "tokens": work.tokens, **work.model()},
    "dtype": "float32",
    "threads": flags.threads,
    "xla_flags": os.environ.get("XLA_FLAGS", ""),
  }
  for key, part in (
    ("solvers", solver_overhead),
    ("loops", beside_loops),
    ("guidance", guidance_interval),
  ):
    others, begun = measure.Others([]), time.perf_counter()
    result[key] = part(flags)
    result[key]["cores_used_by_others"] = others.cores()
    result[key]["seconds"] = time.perf_counter() - begun
    result["load_average_after"] = measure.load_average()
    measure.write(flags.out, result)
  return result


def has_diffusers() -> bool:
  """Says whether the loops in PyTorch can run here."""
  names = ("torch", "safetensors", "diffusers")
  return all(importlib.util.find_spec(name) for name in names)


def solver_overhead(flags: argparse.Namespace) -> dict[str, Any]:
  """Measures whole solves beside bare loops of as many evaluations.

  Once around the network; and once around a multiplication in its place, where
  what the solver itself does is all there is.
  """
  import loops_flowjax as loops

  counts, plans = {}, {}
  for name in flags.solvers:
    steps = loops.steps_for(name, flags.evaluations)
    plans[name] = _plan(name, steps)
    counts[name] = len(loops.rows(plans[name], flags.batch))

  made = loops.field(flags.size, flags.batch)
  contestants = {name: loops.solve(made, plans[name]) for name in plans}
  for count in sorted(set(counts.values())):
    contestants[f"bare_{count}"] = loops.bare(made, count)
  # How far two measurements of one and the same thing lie apart.
  most = max(counts.values())
  contestants["bare_again"] = contestants[f"bare_{most}"]
  clocks = turns.take_turns(contestants, flags.rounds)

  tiny = loops.field(loops.MULTIPLICATION, flags.batch)
  longer = {name: _plan(name, flags.steps) for name in plans}
  own = turns.take_turns(
    {name: loops.solve(tiny, longer[name]) for name in plans},
    flags.small_rounds,
  )

  found = {}
  for name, count in counts.items():
    row = turns.overhead(clocks[name], clocks[f"bare_{count}"], count)
    own_count = len(loops.rows(longer[name], flags.batch))
    alone = {
      kind: value / own_count
      for kind, value in turns.summary(own[name]).items()
    }
    found[name] = {
      "steps": len(plans[name].grid) - 1,
      "evaluations": count,
      **row,
      "own_steps": flags.steps,
      "own_evaluations": own_count,
      "own_microseconds_min": 1e6 * alone["min"],
      "own_microseconds_median": 1e6 * alone["median"],
      "own_percent": 100.0
      * alone["median"]
      / row["bare_seconds_per_evaluation_median"],
    }
  return {
    "batch": flags.batch,
    "bare_beside_itself": turns.overhead(
      clocks["bare_again"], clocks[f"bare_{most}"], most
    ),
    "by_name": found,
  }


def _plan(name: str, steps: int) -> Any:
  import loops_flowjax as loops

  from flowjax.flow import grids, paths

  return loops.method(name, grids.build("uniform", paths.straight(), steps))


def beside_loops(flags: argparse.Namespace) -> dict[str, Any]:
  """Measures solves in one jit beside loops in Python, network by network."""
  import loops_flowjax as loops

  networks = {
    loops.MULTIPLICATION: flags.small_rounds,
    "tiny": flags.small_rounds,
    flags.size: flags.loop_rounds,
  }
  return {
    "batch": flags.loop_batch,
    "steps": flags.steps,
    "networks": {
      size: _loops_of(size, rounds, flags) for size, rounds in networks.items()
    },
  }


def _loops_of(
  size: str, rounds: int, flags: argparse.Namespace
) -> dict[str, Any]:
  import loops_flowjax as loops

  from flowjax.flow import grids, paths

  made, steps = loops.field(size, flags.loop_batch), flags.steps
  euler = grids.build("flow_match", paths.straight(), steps, compat=True)
  multistep = euler
  theirs: dict[str, turns.Run] = {}
  if has_diffusers():
    import loops_torch

    multistep = loops_torch.sigmas("dpmpp_2m", steps)
    network = loops_torch.Network(made)
    theirs = {
      f"diffusers_{name}": loops_torch.diffusers_loop(network, name, steps)
      for name in loops_torch.SCHEDULERS
    }
    theirs["torch_bare"] = loops_torch.bare(network, steps)
  contestants = {
    "flowjax_bare": loops.bare(made, steps),
    "flowjax_euler": loops.solve(made, loops.method("euler", euler)),
    "flowjax_dpmpp_2m": loops.solve(made, loops.method("dpmpp_2m", multistep)),
    "python_euler": loops.python_loop(made, euler, jitted_step=False),
    "python_euler_jitted_step": loops.python_loop(
      made, euler, jitted_step=True
    ),
    **theirs,
  }
  ends: dict[str, Any] = {}
  clocks = turns.take_turns(contestants, rounds, ends)
  return {
    "by_name": {
      name: turns.beyond(
        clocks[name],
        clocks["torch_bare" if name in theirs else "flowjax_bare"],
        steps,
        nothing=size == loops.MULTIPLICATION,
      )
      for name in contestants
    },
    "ends_apart": {
      name: turns.distance(
        ends[name], ends[f"flowjax_{name.partition('_')[2]}"]
      )
      for name in theirs
      if name != "torch_bare"
    }
    | {
      name: turns.distance(ends[name], ends["flowjax_euler"])
      for name in contestants
      if name.startswith("python_")
    },
  }


def guidance_interval(flags: argparse.Namespace) -> dict[str, Any]:
  """Measures what guidance in an interval saves of what it costs everywhere.

  Of N evaluations, k inside, guidance is paid k times instead of N:

    saved = (everywhere - interval) / (everywhere - none)  ->  (N - k) / N

  whatever a doubled batch costs beside a single one.
  """
  import loops_flowjax as loops

  from flowjax.flow import grids, guidance, paths

  grid = grids.build("uniform", paths.straight(), flags.guided_steps)
  ways: dict[str, dict[str, Any]] = {
    "none": {"scale": 1.0},
    "interval": {"scale": loops.SCALE, "interval": INTERVAL},
    "everywhere": {"scale": loops.SCALE, "interval": guidance.ALWAYS},
  }
  batch = flags.guided_batch
  plans = {
    name: loops.method("euler", grid, **way) for name, way in ways.items()
  }
  rows = {name: loops.rows(plan, batch) for name, plan in plans.items()}
  made = loops.field(flags.size, batch)
  clocks = turns.take_turns(
    {name: loops.solve(made, plan) for name, plan in plans.items()},
    flags.guided_rounds,
  )
  found: dict[str, Any] = {
    name: {
      "evaluations": len(seen),
      "guided_evaluations": sum(count > batch for count in seen),
      "rows": sum(seen),
      "seconds": clocks[name]["wall"],
      **{f"seconds_{k}": v for k, v in turns.summary(clocks[name]).items()},
    }
    for name, seen in rows.items()
  }
  return {
    "solver": "euler",
    "steps": flags.guided_steps,
    "batch": batch,
    "interval": INTERVAL,
    "scale": loops.SCALE,
    "by_name": found,
    "over_everywhere": {
      name: {
        "rows": row["rows"] / found["everywhere"]["rows"],
        **{
          kind: row[f"seconds_{kind}"] / found["everywhere"][f"seconds_{kind}"]
          for kind in ("min", "median")
        },
      }
      for name, row in found.items()
    },
    "saved": {
      kind: turns.saved(*(found[name][kind] for name in ways))
      for kind in ("rows", "seconds_min", "seconds_median")
    },
  }


def show(result: dict[str, Any]) -> None:
  """Prints tables of what was found."""
  part = result["solvers"]
  print(
    f"\n{'beyond the network':<26}{'evaluations':>12}{'min %':>8}"
    f"{'median %':>10}{'own us':>8}{'own %':>8}"
  )
  for name, row in part["by_name"].items():
    print(
      f"{name:<26}{row['evaluations']:>12}{row['overhead_percent_min']:>8.2f}"
      f"{row['overhead_percent_median']:>10.2f}"
      f"{row['own_microseconds_median']:>8.1f}{row['own_percent']:>8.3f}"
    )
  row = part["bare_beside_itself"]
  print(
    f"{'bare beside itself':<38}{row['overhead_percent_min']:>8.2f}"
    f"{row['overhead_percent_median']:>10.2f}"
  )
  for size, found in result["loops"]["networks"].items():
    print(f"\n{size + ', us per step':<26}{'median':>12}{'beyond network':>16}")
    for name, row in found["by_name"].items():
      print(
        f"{name:<26}{row['microseconds_per_step_median']:>12.1f}"
        f"{row['beyond_network_microseconds_median']:>16.1f}"
      )
  part = result["guidance"]
  print(f"\n{'guidance':<26}{'rows':>12}{'of everywhere':>16}{'measured':>12}")
  for name, row in part["over_everywhere"].items():
    print(
      f"{name:<26}{part['by_name'][name]['rows']:>12}{row['rows']:>16.3f}"
      f"{row['median']:>12.3f}"
    )
  print(
    f"The interval saves {part['saved']['seconds_median']:.1%} of what "
    f"guidance costs; it should save {part['saved']['rows']:.1%}."
  )
  parts = (result[key] for key in ("solvers", "loops", "guidance"))
  others = max(part["cores_used_by_others"] for part in parts)
  print(f"Other processes kept up to {others:.2f} cores busy meanwhile.")
  if others > 0.1:
    print("That is too much: these numbers are not to be quoted.")


if __name__ == "__main__":
  main()
