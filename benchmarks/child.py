"""The process in which one library works: it answers requests on its stdin."""

import importlib
import json
import os
import sys
import time

import measure
import workload

MATMUL_SIZE = {"cpu": 2048, "gpu": 8192}


def main() -> None:
  """Answers requests, one JSON line each, until the parent hangs up.

  What libraries print goes to stderr, so that stdout carries answers alone.
  """
  answers = os.fdopen(os.dup(1), "w")
  os.dup2(2, 1)
  work = workload.from_json(sys.argv[1])
  if work.threads is not None:
    # Before the library is there: it counts processors when it is imported.
    allowed = sorted(os.sched_getaffinity(0))[: work.threads]
    os.sched_setaffinity(0, allowed)
  side = importlib.import_module(f"side_{work.library}").Side(work)
  for line in sys.stdin:
    print(json.dumps(answer(side, json.loads(line))), file=answers, flush=True)


def answer(side, request: dict) -> dict:
  """Returns the answer to one request."""
  on_gpu = side.work.device == "gpu"
  match request["do"]:
    case "build":
      return _timed(side.build)
    case "steps":
      return measure.one_by_one(side, request["count"])
    case "sustain":
      return measure.sustained(side, request["seconds"])
    case "matmul":
      flops = 2 * MATMUL_SIZE[side.work.device] ** 3
      return measure.matmul_rate(
        side, flops, request["seconds"], at_once=50 if on_gpu else 1
      )
    case "compile":
      return side.compile(request["depth"])
    case "kernels":
      return {"kernels": side.kernels(request["count"])}
    case "report":
      return side.report()
  raise ValueError(f"unknown request {request}")


def _timed(build) -> dict:
  before = time.perf_counter(), time.process_time()
  found = build()
  return {
    **found,
    "build_seconds": time.perf_counter() - before[0],
    "build_cpu_seconds": time.process_time() - before[1],
  }


if __name__ == "__main__":
  main()
