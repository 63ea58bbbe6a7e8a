"""What libraries say that a user is not to hear."""

import glob
import logging
import os

# What it asks for, and complains of not being told, as JAX starts.
TOLD = {
  "TPU_WORKER_HOSTNAMES": "localhost",
  "TPU_ACCELERATOR_TYPE": "v5litepod-4",
}
DEVICES = ("/dev/accel*", "/dev/vfio/*")


def libraries() -> None:
  """Shows what FlowJAX says, and of libraries no more than warnings."""
  logging.basicConfig(level=logging.INFO, format="%(message)s")
  for name in ("absl", "orbax", "jax", "grain"):
    logging.getLogger(name).setLevel(logging.WARNING)


def without_tpu() -> None:
  """Tells libtpu what it would ask for; where a TPU is, nothing.

  It may be installed for `plan`, where no TPU is.
  """
  if not any(glob.glob(pattern) for pattern in DEVICES):
    for name, value in TOLD.items():
      os.environ.setdefault(name, value)
