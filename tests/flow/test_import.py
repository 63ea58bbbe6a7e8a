"""The mathematics imports jax, and nothing of ours outside of flow/."""

import json
import subprocess
import sys

import pytest

SCRIPT = """
import json, sys, time
import jax
before, start = set(sys.modules), time.perf_counter()
import flowjax.flow
seconds, bare = time.perf_counter() - start, set(sys.modules) - before
import flowjax.flow.guidance, flowjax.flow.losses, flowjax.flow.prediction
import flowjax.flow.solvers, flowjax.flow.times, flowjax.flow.paths
everything = set(sys.modules) - before
print(json.dumps([seconds, sorted(bare), sorted(everything)]))
"""


@pytest.mark.slow(1)
def test_import_is_light():
  run = subprocess.run(
    [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True
  )
  seconds, bare, everything = json.loads(run.stdout)
  assert seconds < 0.1
  assert set(bare) == {"flowjax", "flowjax.flow"}
  roots = {name.partition(".")[0] for name in everything}
  assert roots <= {"flowjax", "jax", "jaxlib"} | set(sys.stdlib_module_names)
  ours = {name for name in everything if name.startswith("flowjax.")}
  assert all(name.startswith("flowjax.flow") for name in ours)
