"""Eight virtual devices for every test.

NPROC is read by XLA's CPU client when jax is imported: with fewer threads than
devices its collectives can wait for each other for ever.
"""

import atexit
import collections
import gc
import os
import shutil
import sys
import tempfile
from importlib import metadata

# Many tests, and the commands that they start, compile the same programs: the
# first process makes a place where all of them find what one has compiled, if
# that took longer than it takes to write and to find it.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
  _cache = tempfile.mkdtemp(prefix="flowjax-tests-")
  os.environ["JAX_COMPILATION_CACHE_DIR"] = _cache
  os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
  os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
  atexit.register(shutil.rmtree, _cache, ignore_errors=True)

# Nothing here needs torchvision, and one that was built for another torch would
# break the imports of those that look for it: diffusers, transformers.
sys.modules.setdefault("torchvision", None)  # type: ignore[arg-type]

# torch and numpy divide even the smallest array among all cores, and one of two
# workers has but one.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["NPROC"] = "16"
os.environ["JAX_PLATFORMS"] = "cpu"
# The tests are small and compile much: unoptimised programs halve their time,
# and the older code generator, which jaxlib had before 0.11, halves it again.
# Whole programs, not 32 parts of each: the other core has its own tests.
_flags = ["--xla_force_host_platform_device_count=8"]
_flags += ["--xla_backend_optimization_level=0"]
_flags += ["--xla_cpu_parallel_codegen_split_count=1"]
if tuple(map(int, metadata.version("jaxlib").split(".")[:2])) < (0, 11):
  _flags += ["--xla_cpu_use_fusion_emitters=false"]
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *_flags])

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")


# Tracing a program makes many objects at once, of which few go in circles.
gc.set_threshold(50_000, 20, 50)


@pytest.fixture(autouse=True, scope="module")
def _what_is_old_stays():
  """Keeps the collector from searching all that earlier modules left."""
  gc.freeze()


def pytest_collection_modifyitems(items):
  """Puts the longest files first, so that no worker is left alone with one."""
  weight = collections.Counter()
  for item in items:
    weight[item.path] += 10 if item.get_closest_marker("slow") else 1
  items.sort(key=lambda item: -weight[item.path])
