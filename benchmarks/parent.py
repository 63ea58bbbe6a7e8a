"""Starts the processes in which the libraries work, and asks them."""

import json
import os
import pathlib
import select
import subprocess
import sys
import time
from typing import Any

import workload

HERE = pathlib.Path(__file__).resolve().parent

# Named sets of XLA flags; any other value of `xla` is taken as flags.
XLA = {
  "default": "",
  "no_triton": "--xla_gpu_enable_triton_gemm=false",
  "latency": "--xla_gpu_enable_latency_hiding_scheduler=true",
  "no_graphs": "--xla_gpu_enable_command_buffer=",
  "no_remat": "--xla_disable_hlo_passes=rematerialization",
}


class Failed(Exception):
  """The child died or did not answer in time; the text says which."""


def environment(
  work: workload.Workload, extra: dict[str, str] | None = None
) -> dict[str, str]:
  """Returns the variables of a child: this process's, and only ours of XLA."""
  variables = dict(os.environ)
  for name in ("XLA_FLAGS", "JAX_PLATFORMS", "NPROC", "LD_PRELOAD"):
    variables.pop(name, None)
  variables["PYTHONPATH"] = os.pathsep.join(
    [str(HERE.parent), variables.get("PYTHONPATH", "")]
  ).rstrip(os.pathsep)
  variables["XLA_FLAGS"] = XLA.get(work.xla, work.xla)
  if work.device == "cpu":
    variables["JAX_PLATFORMS"] = "cpu"
  if work.threads is not None:
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NPROC"):
      variables[name] = str(work.threads)
  return {**variables, **(extra or {})}


class Child:
  """One process, one workload."""

  def __init__(
    self,
    work: workload.Workload,
    log: pathlib.Path,
    extra_environment: dict[str, str] | None = None,
  ):
    self.work, self.log = work, log
    with open(log, "wb") as errors:
      self.process = subprocess.Popen(
        [sys.executable, str(HERE / "child.py"), work.to_json()],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=errors,
        env=environment(work, extra_environment),
      )

  def __enter__(self) -> "Child":
    return self

  def __exit__(self, *_) -> None:
    self.close()

  def ask(
    self, do: str, timeout: float | None = None, **values: Any
  ) -> dict[str, Any]:
    """Returns the answer to one request, or raises Failed."""
    question = json.dumps({"do": do, **values}) + "\n"
    assert self.process.stdin is not None and self.process.stdout is not None
    try:
      self.process.stdin.write(question.encode())
      self.process.stdin.flush()
    except BrokenPipeError:
      pass  # It died, and the log says of what.
    ready, _, _ = select.select([self.process.stdout], [], [], timeout)
    line = self.process.stdout.readline() if ready else b""
    if line:
      return json.loads(line)
    if not ready:
      self.close()
      raise Failed(f"no answer to {do!r} within {timeout:.0f} s")
    self.process.wait()
    raise Failed(self._last_words())

  def close(self) -> None:
    """Ends the process and waits until its memory is free."""
    if self.process.poll() is None:
      self.process.kill()
    self.process.wait()

  def _last_words(self) -> str:
    lines = self.log.read_text(errors="replace").strip().splitlines()
    notable = [x for x in lines if "Error" in x or "OutOfMemory" in x]
    return (notable or lines or ["it said nothing"])[-1][:400]


class Deadline:
  """The seconds that are left of a budget."""

  def __init__(self, seconds: float):
    self.end = time.monotonic() + seconds

  @property
  def left(self) -> float:
    return self.end - time.monotonic()
