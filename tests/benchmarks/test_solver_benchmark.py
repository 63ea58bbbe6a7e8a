"""solvers.py counts what is evaluated, and compares loops that do the same."""

import json
import os
import pathlib
import subprocess
import sys

import loops_flowjax
import numpy as np
import pytest
import solvers as benchmark
import turns

from flowjax.flow import grids, paths, solvers

SCRIPT = pathlib.Path(__file__).parents[2] / "benchmarks/solvers.py"
FEW = ("--solvers", "heun", "dpmpp_2m")
SMALL = (
  *("--size=tiny", "--batch=1", "--evaluations=4", "--steps=4", "--threads=1"),
  *("--rounds=2", "--small-rounds=2", "--loop-rounds=2", "--guided-rounds=2"),
  *("--guided-steps=8", "--guided-batch=3", *FEW),
)


@pytest.fixture(scope="module")
def result(tmp_path_factory):
  """Returns what the script writes: all its parts, measured once."""
  out = tmp_path_factory.mktemp("solvers") / "result.json"
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(turns, "REST_SECONDS", 0.0)
    benchmark.show(benchmark.run(benchmark.parse([*SMALL, f"--out={out}"])))
  return json.loads(out.read_text())


def _uniform(steps):
  return grids.build("uniform", paths.straight(), steps)


@pytest.mark.parametrize("name", benchmark.SOLVERS)
def test_evaluations_are_those_that_the_solver_says(name):
  steps = loops_flowjax.steps_for(name, 6)
  declared = solvers.build(name, paths.straight()).evaluations
  assert declared(steps) <= 6 < declared(steps + 1)
  seen = loops_flowjax.rows(loops_flowjax.method(name, _uniform(steps)), 3)
  assert seen == [3] * declared(steps)


def test_a_solver_that_needs_more_evaluations_is_refused():
  with pytest.raises(ValueError, match="heun evaluates the network 2 times"):
    loops_flowjax.steps_for("heun", 1)


def test_overhead_is_that_of_one_evaluation_over_the_bare_one():
  ours = {"wall": [2.2, 4.0, 2.1], "cpu": [3.0, 6.0, 3.3]}
  bare = {"wall": [2.0, 3.2, 2.0], "cpu": [2.0, 3.0, 2.5]}
  row = turns.overhead(ours, bare, 4)
  assert row["seconds_per_evaluation_min"] == pytest.approx(2.1 / 4)
  assert row["bare_seconds_per_evaluation_median"] == pytest.approx(2.0 / 4)
  assert row["overhead_percent_min"] == pytest.approx(5.0)
  assert row["overhead_percent_median"] == pytest.approx(10.0)
  assert row["overhead_percent_paired"] == pytest.approx(10.0)
  assert row["overhead_percent_by_cpu"] == pytest.approx(50.0)


def test_all_take_turns_and_another_begins_each_round(monkeypatch):
  monkeypatch.setattr(turns, "REST_SECONDS", 0.0)
  order, ends = [], {}
  contestants = {
    name: lambda name=name: order.append(name) or name for name in "abc"
  }
  clocks = turns.take_turns(contestants, 2, ends)
  assert "".join(order) == "abc" + "abc" + "bca"
  assert ends == {"a": "a", "b": "b", "c": "c"}
  assert all(len(clocks[name]["wall"]) == 2 for name in "abc")
  monkeypatch.setattr(turns, "LIMIT_SECONDS", 0.0)
  assert len(turns.take_turns(contestants, 2)["a"]["wall"]) == 1


@pytest.mark.slow
def test_solvers_are_measured_beside_as_many_evaluations(result):
  part = result["solvers"]
  assert part["bare_beside_itself"]["seconds_per_evaluation_min"] > 0.0
  assert set(part["by_name"]) == {"heun", "dpmpp_2m"}
  for name, row in part["by_name"].items():
    declared = solvers.build(name, paths.straight()).evaluations
    assert row["evaluations"] == declared(row["steps"]) == 4
    assert row["own_evaluations"] == declared(4)
    assert len(row["seconds"]) == len(row["bare_seconds"]) == 2
    assert row["own_microseconds_min"] > 0.0
    own = 1e-6 * row["own_microseconds_median"]
    share = own / row["bare_seconds_per_evaluation_median"]
    assert row["own_percent"] == pytest.approx(100.0 * share)


@pytest.mark.slow
def test_loops_end_where_the_solve_ends(result):
  assert set(result["loops"]["networks"]) == {"multiplication", "tiny"}
  ours = {"python_euler", "python_euler_jitted_step"}
  theirs = {"diffusers_euler", "diffusers_dpmpp_2m"}
  for found in result["loops"]["networks"].values():
    apart = found["ends_apart"]
    assert set(apart) == ours | (theirs if benchmark.has_diffusers() else set())
    assert max(apart[name] for name in ours) < 1e-6
    assert max(apart.values()) < 1e-5
  found = result["loops"]["networks"]["tiny"]
  bare = found["by_name"]["flowjax_bare"]
  assert bare["beyond_network_microseconds_min"] == 0.0
  row = found["by_name"]["python_euler"]
  assert row["microseconds_per_step_min"] == pytest.approx(
    1e6 * min(row["seconds"]) / 4
  )
  assert row["beyond_network_microseconds_min"] == pytest.approx(
    row["microseconds_per_step_min"] - bare["microseconds_per_step_min"]
  )


@pytest.mark.slow
def test_guidance_is_counted_where_it_acts(result):
  part = result["guidance"]
  grid, (low, high) = _uniform(8), benchmark.INTERVAL
  inside = int(np.sum((low <= grid[:-1]) & (grid[:-1] <= high)))
  assert 0 < inside < 8
  for name, guided in (("none", 0), ("interval", inside), ("everywhere", 8)):
    row = part["by_name"][name]
    assert row["evaluations"] == 8
    assert row["guided_evaluations"] == guided
    assert row["rows"] == 3 * (8 + guided)
  assert part["saved"]["rows"] == pytest.approx((8 - inside) / 8)
  ratio = part["over_everywhere"]["interval"]
  assert ratio["rows"] == pytest.approx((8 + inside) / 16)
  times = [row["seconds_min"] for row in part["by_name"].values()]
  assert part["saved"]["seconds_min"] == turns.saved(*times)


@pytest.mark.slow(5)
def test_the_result_says_of_what_it_is(result):
  assert result["machine"]["date"] and result["machine"]["command"]
  assert result["load_average_after"] and "jax" in result["versions"]
  for part in ("solvers", "loops", "guidance"):
    assert result[part]["cores_used_by_others"] >= 0.0
    assert result[part]["seconds"] > 0.0


def test_loops_need_no_diffusers(monkeypatch, tmp_path):
  monkeypatch.setattr(turns, "REST_SECONDS", 0.0)
  monkeypatch.setattr(benchmark, "has_diffusers", lambda: False)
  flags = benchmark.parse([*SMALL, f"--out={tmp_path / 'result.json'}"])
  found = benchmark._loops_of(loops_flowjax.MULTIPLICATION, 1, flags)
  assert set(found["ends_apart"]) == {
    "python_euler",
    "python_euler_jitted_step",
  }


# Of what `main` measures another test looks at each part.
STARTED = """
import os, sys
import solvers

def run(flags):
  assert "jax" not in sys.modules
  import loops_flowjax
  print(loops_flowjax.versions())
  print(os.environ["XLA_FLAGS"], len(os.sched_getaffinity(0)))

solvers.run, solvers.show = run, lambda result: None
solvers.main()
"""


@pytest.mark.slow(2)
def test_libraries_are_imported_once_all_is_set(tmp_path):
  flag = "--xla_force_host_platform_device_count=3"
  words = [*SMALL, f"--xla={flag}", f"--out={tmp_path / 'result.json'}"]
  done = subprocess.run(
    [sys.executable, "-c", STARTED, *words],
    env={**os.environ, "PYTHONPATH": str(SCRIPT.parent)},
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stdout + done.stderr
  versions, settings = done.stdout.splitlines()
  assert versions.startswith("flowjax ")
  assert settings == f"{flag} 1"
