"""Flags are set where they help, and a user's own are left alone."""

import glob
import importlib.util
import os
import re

import jax
import pytest

from flowjax.parallel import compiler_flags, platforms


@pytest.fixture(autouse=True)
def _as_before(monkeypatch):
  for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS"):
    monkeypatch.setenv(name, "")
  level = jax.config.jax_optimization_level
  yield
  jax.config.update("jax_optimization_level", level)


def test_a_cpu_needs_none():
  assert "none are needed" in compiler_flags.apply("cpu")
  assert not os.environ["XLA_FLAGS"]


@pytest.mark.parametrize("platform", sorted(compiler_flags.RECOMMENDED))
def test_what_is_recommended_is_set_and_printed(platform):
  wanted = compiler_flags.RECOMMENDED[platform]
  said = compiler_flags.apply(platform)
  for name, value in wanted.flags.items():
    assert f"--{name}={value}" in os.environ[wanted.variable].split()
    assert f"--{name}={value}" in said
  assert "--no-compiler_flags" in said and "\n" not in said
  for name, value in wanted.options.items():
    assert getattr(jax.config, name) == value and f"{name}={value}" in said


def test_what_a_user_has_set_stays(monkeypatch):
  own = "--xla_gpu_enable_latency_hiding_scheduler=false --xla_other=1"
  monkeypatch.setenv("XLA_FLAGS", own)
  monkeypatch.setenv("JAX_OPTIMIZATION_LEVEL", "O2")
  said = compiler_flags.apply("gpu")
  found = os.environ["XLA_FLAGS"]
  assert found.startswith(own)
  assert len(re.findall("latency_hiding", found)) == 1
  assert "as you have set them: xla_gpu_enable_latency_hiding" in said
  assert "O1" not in said


@pytest.mark.slow(1)
def test_flags_are_known_to_this_compiler():
  """An unknown one would abort: the parser of a CPU knows those of a GPU."""
  import subprocess
  import sys

  code = "import jax; jax.jit(lambda x: x + 1)(1)"
  wanted = compiler_flags.RECOMMENDED["gpu"].flags
  for flags, ends in (
    (" ".join(f"--{k}={v}" for k, v in wanted.items()), 0),
    ("--xla_gpu_no_such_flag=true", 1),
  ):
    done = subprocess.run(
      [sys.executable, "-c", code],
      env={**os.environ, "XLA_FLAGS": flags},
      capture_output=True,
    )
    assert bool(done.returncode) == bool(ends), done.stderr


@pytest.mark.parametrize(
  ("named", "packages", "files", "expected"),
  [
    ("cpu", ["libtpu"], ["/dev/accel0"], "cpu"),
    ("cuda,cpu", [], [], "gpu"),
    ("", ["libtpu"], ["/dev/accel0"], "tpu"),
    ("", ["libtpu"], ["/dev/vfio/0"], "tpu"),
    ("", ["libtpu"], [], "cpu"),
    ("", ["jax_cuda13_plugin"], ["/dev/nvidia0"], "gpu"),
    ("", [], ["/dev/nvidia0"], "cpu"),
  ],
)
def test_the_platform_is_known_before_it_is_touched(
  monkeypatch, named, packages, files, expected
):
  import fnmatch

  monkeypatch.setenv("JAX_PLATFORMS", named)
  monkeypatch.setattr(
    importlib.util, "find_spec", lambda name: name in packages or None
  )
  monkeypatch.setattr(
    glob, "glob", lambda pattern: fnmatch.filter(files, pattern)
  )
  assert platforms.guess() == expected
