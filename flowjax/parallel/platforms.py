"""What kind of device JAX will run on, known before one is touched."""

import glob
import importlib.util
import os

_GPU_PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin")


def guess() -> str:
  """Returns "cpu", "gpu" or "tpu": the first that JAX will find.

  JAX_PLATFORMS says it, or the packages for a device together with the device
  itself. No backend is started: its compiler flags may still be chosen.
  """
  named = os.environ.get("JAX_PLATFORMS", "").split(",")[0].strip().lower()
  if named:
    return {"cuda": "gpu", "rocm": "gpu"}.get(named, named)
  if _is_installed("libtpu") and (
    glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*")
  ):
    return "tpu"
  if any(map(_is_installed, _GPU_PLUGINS)) and glob.glob("/dev/nvidia[0-9]*"):
    return "gpu"
  return "cpu"


def _is_installed(package: str) -> bool:
  return importlib.util.find_spec(package) is not None
