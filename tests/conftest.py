"""Eight virtual devices for every test.

NPROC is read by XLA's CPU client when jax is imported: with fewer threads than
devices its collectives can wait for each other for ever.
"""

import atexit
import collections
import dataclasses
import functools
import gc
import hashlib
import os
import pickle
import shutil
import sys
import tempfile
from importlib import metadata

# Many tests, and the commands that they start, compile the same programs: the
# first process makes a place where all of them find what one has compiled,
# however little that was.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
  _cache = tempfile.mkdtemp(prefix="flowjax-tests-")
  os.environ["JAX_COMPILATION_CACHE_DIR"] = _cache
  os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
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
# No program is asked from which lines of Python its operations are.
os.environ["JAX_TRACEBACK_IN_LOCATIONS_LIMIT"] = "0"
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
import numpy as np  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")


# A program that is traced makes many objects, and few of them go in circles.
gc.set_threshold(50_000, 20, 50)


@pytest.fixture(autouse=True, scope="module")
def _what_is_old_stays():
  """Keeps the collector from searching all that earlier modules left."""
  gc.freeze()


@pytest.fixture(scope="module")
def on_one_device():
  """Has jax find one device alone, for which programs compile faster.

  For modules that say nothing of a mesh. Those of tests/commands that do not
  ask for this run commands on eight devices. What only those that ask do is run
  on one alone: `sample` by --init-image, --mask, --prompt or several scales of
  guidance, networks that are told nothing, autoencoders by the commands, and
  `import` of MM-DiT, FLUX and whole pipelines.
  """
  (first, *_) = jax.devices()
  with pytest.MonkeyPatch.context() as patch:
    for name in ("devices", "local_devices"):
      patch.setattr(jax, name, lambda *_: [first])
    for name in ("device_count", "local_device_count"):
      patch.setattr(jax, name, lambda *_: 1)
    yield


@pytest.fixture(scope="module")
def traced_once():
  """Gives equal runs of a module what was traced and compiled for the first.

  For modules of many runs; a test that changes what is traced says so by
  `traced_anew`.
  """
  from flowjax.commands import drawing, train
  from flowjax.train import loop, parts

  def of(config):
    """Returns all of a config that programs depend on."""
    return tuple(
      getattr(config, field.name)
      for field in dataclasses.fields(config)
      if field.name not in ("log", "checkpoint", "sample")
    )

  def key_of(item):
    if not isinstance(item, parts.Parts):
      return item
    return of(item.experiment), item.network.config, item.mesh

  made: dict = {}

  def once(make):
    @functools.wraps(make)
    def found(*items, **options):
      key = make.__name__, *map(key_of, items), *options.items()
      if key not in made:
        made[key] = make(*items, **options)
      return made[key]

    return found

  build = parts.build

  def built(config, devices=None):
    key = ("build", of(config), devices and tuple(devices))
    if key not in made:
      made[key] = build(config, devices)
    return dataclasses.replace(made[key], experiment=config)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(parts, "build", built)
    patch.setattr(loop, "jit_step", once(loop.jit_step))
    initial = once(parts.Parts.lower_initial)
    patch.setattr(parts.Parts, "lower_initial", initial)
    patch.setattr(drawing, "build", once(drawing.build))
    look = once(train.held_out_loss)
    patch.setattr(
      train,
      "held_out_loss",  # Compiled ahead it is another for buckets alone.
      lambda run, ahead=False: look(
        run, ahead=ahead and bool(run.experiment.data.buckets)
      ),
    )
    yield made


@pytest.fixture
def traced_anew(traced_once):
  """For a test that changes what is traced, in a module of `traced_once`."""
  traced_once.clear()
  yield
  traced_once.clear()


@pytest.fixture(scope="module")
def fitted_once(tmp_path_factory):
  """Gives all judges of the same digits, in all processes, one fit's weights.

  It takes seconds.
  """
  from flowjax.evaluate import classifier

  fit, folder = classifier.fit, tmp_path_factory.getbasetemp()
  if "PYTEST_XDIST_WORKER" in os.environ:
    folder = folder.parent  # What all workers of this run share.

  def once(images_NHWC, labels_N, **options):
    told = images_NHWC, labels_N, classifier.STEPS, sorted(options.items())
    name = hashlib.sha256(pickle.dumps(told)).hexdigest()
    path = folder / f"judge_{name}.pickle"
    if not path.exists():
      partial = path.with_suffix(f".{os.getpid()}")
      partial.write_bytes(pickle.dumps(fit(images_NHWC, labels_N, **options)))
      partial.rename(path)
    return pickle.loads(path.read_bytes())

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(classifier, "fit", once)
    yield


@pytest.fixture(scope="module")
def hashed_by_numpy():
  """Has numpy find the fingerprints of checkpoints, as tests/train does not.

  For modules whose runs are many and small, and about something else: of a
  state of 200 leaves the program takes seconds to compile. That the numbers
  are its own is looked at once a module.
  """
  from flowjax.train import manifest

  def mixed(x):
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)

  def fingerprint(array):
    words = np.asarray(array).reshape(-1)
    words = words.view(f"u{words.itemsize}").astype(np.uint32)
    index = np.arange(words.size, dtype=np.uint32)
    first = mixed(words + mixed(index + np.uint32(0x9E3779B9)))
    second = mixed(first + np.uint32(0x7F4A7C15))
    low, high = (int(x.sum(dtype=np.uint32)) for x in (first, second))
    return f"{high:08x}{low:08x}"

  def fingerprints(named):
    return {path: fingerprint(array) for path, array in named.items()}

  examples = {"float32": (2, 3), "bfloat16": (4,), "int32": ()}
  named = {
    name: jax.device_put(np.full(shape, 3, jax.numpy.dtype(name)))
    for name, shape in examples.items()
  }
  assert fingerprints(named) == manifest.fingerprints(named)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(manifest, "fingerprints", fingerprints)
    yield


def pytest_addoption(parser):
  parser.addoption(
    "--cpu", action="store_true", help="say what each file took of the cores"
  )


def _seconds(item):
  """Returns about how long a test takes: 4 s if slow, or what the mark says."""
  mark = item.get_closest_marker("slow")
  return 0.05 if mark is None else (mark.args or (4,))[0]


def pytest_collection_modifyitems(items):
  """Puts the longest files first, so that no worker is left alone with one."""
  weight = collections.Counter()
  for item in items:
    weight[item.path] += _seconds(item)
  items.sort(key=lambda item: -weight[item.path])


def _cpu():
  """Returns the seconds of all threads, and of processes that have ended."""
  return sum(os.times()[:4])


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item, nextitem):
  item.user_properties.append(("cpu_began", _cpu()))
  return (yield)


def pytest_runtest_teardown(item):
  began = dict(item.user_properties)["cpu_began"]
  item.user_properties.append(("cpu", _cpu() - began))


def pytest_terminal_summary(terminalreporter, config):
  if not config.getoption("cpu"):
    return
  took = collections.Counter()
  for reports in terminalreporter.stats.values():
    for report in reports:
      if getattr(report, "when", "") == "teardown":
        path = report.nodeid.partition("::")[0]
        took[path] += dict(report.user_properties)["cpu"]
  terminalreporter.section(f"{sum(took.values()):.0f} s of the cores")
  for path, seconds in took.most_common():
    terminalreporter.write_line(f"{seconds:7.1f} {path}")
