"""Eight virtual devices for every test.

NPROC is read by XLA's CPU client when jax is imported: with fewer threads than
devices its collectives can wait for each other for ever.
"""

import os

os.environ["NPROC"] = "16"
os.environ["JAX_PLATFORMS"] = "cpu"
# The tests are small and compile much: unoptimised programs halve their time.
os.environ["XLA_FLAGS"] = (
  os.environ.get("XLA_FLAGS", "")
  + " --xla_force_host_platform_device_count=8"
  + " --xla_backend_optimization_level=0"
)

import jax  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")
