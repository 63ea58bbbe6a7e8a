"""Keeps libtpu quiet where it is installed, for `plan`, and no TPU is there."""

import glob
import os

# What it asks for, and complains of not being told, as JAX starts.
TOLD = {
  "TPU_WORKER_HOSTNAMES": "localhost",
  "TPU_ACCELERATOR_TYPE": "v5litepod-4",
}
DEVICES = ("/dev/accel*", "/dev/vfio/*")


def without_tpu() -> None:
  """Tells libtpu what it would ask for; where a TPU is, nothing."""
  if not any(glob.glob(pattern) for pattern in DEVICES):
    for name, value in TOLD.items():
      os.environ.setdefault(name, value)
