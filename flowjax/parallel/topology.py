"""Clusters that are not here: their names, chips, and devices to compile for.

`v5p:8x8x8` is a slice of a TPU pod by its torus, `h100:16x8` sixteen nodes of
eight GPUs. The devices are descriptions, on which nothing runs.
"""

import collections.abc
import dataclasses
import functools
import importlib.util
import math
import os
import pathlib
import re
from typing import Any

import jax

from flowjax import errors, schema
from flowjax.parallel import chips

EXAMPLES = "v5p:8x8x8, v5e:16x16, v6e:16x16, v4:4x4x4, tpu7x:4x4x4, h100:16x8"
# The largest slice along each axis of the torus.
_LARGEST = {
  "v4": (16, 16, 16),
  "v5e": (16, 16),
  "v5p": (16, 16, 24),
  "v6e": (16, 16),
  "tpu7x": (16, 16, 36),
}
_PER_CHIP = {"tpu7x": 2}
_GPU_NODE = 8
_H100 = pathlib.Path(__file__).with_name("h100.txtpb")


@dataclasses.dataclass(frozen=True)
class Topology:
  """A cluster: `slices` times a torus of TPUs, or nodes of GPUs.

  Within a `domain` devices talk over ICI or NVLink; beyond it, over a network.
  """

  generation: str
  shape: tuple[int, ...]
  slices: int = 1

  @property
  def name(self) -> str:
    """The name it is asked for by."""
    return f"{self.generation}:{'x'.join(map(str, self.shape))}"

  @property
  def chip(self) -> chips.Chip:
    """What one device of it can do."""
    return chips.CHIPS[self.generation]

  @property
  def is_gpu(self) -> bool:
    """Whether it is made of GPUs."""
    return not self.chip.axes

  @property
  def torus(self) -> tuple[int, ...]:
    """The sides of a slice; none for GPUs, which a switch joins."""
    return () if self.is_gpu else self.shape

  @property
  def domain(self) -> int:
    """The number of devices that fast wires join."""
    if self.is_gpu:
      return self.shape[1]
    return math.prod(self.shape) * _PER_CHIP.get(self.generation, 1)

  @property
  def domains(self) -> int:
    """How many such domains there are: slices of TPUs, nodes of GPUs."""
    return self.shape[0] if self.is_gpu else self.slices

  @property
  def size(self) -> int:
    """The number of devices in all."""
    return self.domain * self.domains

  @property
  def extra(self) -> str:
    """The extra of the package that is needed to compile for it."""
    return "gpu-aot" if self.is_gpu else "tpu-aot"

  def __str__(self):
    times = f"{self.slices} x " if self.slices > 1 else ""
    return f"{times}{self.name} ({self.size} devices, {self.chip.kind})"


def parse(name: str, slices: int = 1) -> Topology:
  """Returns the topology of a name; raises UserError for one that is none."""
  generation, _, sides = name.partition(":")
  if generation not in chips.CHIPS:
    raise errors.UserError(
      f"--topology={name}: there is no {generation!r}. "
      f"{schema.closest(generation, chips.CHIPS)} Examples: {EXAMPLES}."
    )
  count = chips.CHIPS[generation].axes or 2
  if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", sides):
    sides = ""
  shape = tuple(map(int, sides.split("x"))) if sides else ()
  if len(shape) != count:
    raise errors.UserError(
      f"--topology={name}: {generation} takes {count} numbers, "
      f"such as {_example(generation)}."
    )
  topology = Topology(generation, shape, slices)
  reason = _obstacle(topology)
  if reason:
    raise errors.UserError(
      f"--topology={name}{f' --slices={slices}' * (slices > 1)}: {reason}"
    )
  return topology


def _example(generation: str) -> str:
  return next(e for e in EXAMPLES.split(", ") if e.startswith(generation))


def _obstacle(topology: Topology) -> str | None:
  """Says why there is no such cluster, and which is near."""
  shape = topology.shape
  if topology.is_gpu:
    if topology.slices > 1:
      return (
        "nodes of GPUs have no slices; the first number is how many nodes: "
        f"h100:{shape[0] * topology.slices}x{shape[1]}."
      )
    if shape[1] > _GPU_NODE:
      nodes = math.ceil(shape[0] * shape[1] / _GPU_NODE)
      return (
        f"a node has up to {_GPU_NODE} GPUs; {nodes} nodes of {_GPU_NODE} are "
        f"h100:{nodes}x{_GPU_NODE}."
      )
    return None
  near = _nearest(topology)
  if shape == near:
    return None
  return (
    "a slice is made of hosts of 2x2 chips, its sides are 2, 4, 8, ... (from 8 "
    "on also other multiples of 4), and the largest is "
    f"{'x'.join(map(str, _LARGEST[topology.generation]))}. Nearest: "
    f"{topology.generation}:{'x'.join(map(str, near))}."
  )


def _nearest(topology: Topology) -> tuple[int, ...]:
  largest = _LARGEST[topology.generation]
  sides = []
  for i, (side, most) in enumerate(zip(topology.shape, largest, strict=True)):
    fits = [n for n in (2, 4, *range(8, most + 1, 4)) if n <= most]
    # A host is 2x2x1: the third side may be 1.
    fits += [1] if i == 2 else []
    if len(largest) == 2:
      fits = [n for n in fits if n in (2, 4, 8, 16)]
    sides.append(min(fits, key=lambda n: (abs(n - side), n)))
  return tuple(sides)


def is_installed(topology: Topology) -> bool:
  """Returns whether what compiles for it is installed."""
  if topology.is_gpu:
    return importlib.util.find_spec("jax_cuda13_plugin") is not None
  return importlib.util.find_spec("libtpu") is not None


def prepare() -> None:
  """Sets the environment in which JAX compiles for what is not here.

  Before JAX touches a device. The machine's own accelerators stay untouched;
  several processes may compile at once; nobody is asked for metadata of a TPU
  that is not there; and XLA chooses GPU kernels without trying them.
  """
  os.environ.update(
    JAX_PLATFORMS="cpu",
    ALLOW_MULTIPLE_LIBTPU_LOAD="1",
    TPU_SKIP_MDS_QUERY="1",
    TPU_WORKER_HOSTNAMES="localhost",
    TPU_ACCELERATOR_TYPE="v5litepod-4",
  )
  flags = os.environ.get("XLA_FLAGS", "")
  for flag in (
    "--xla_gpu_autotune_level=0",
    # Its tilings are searched on the GPU itself.
    "--xla_gpu_enable_triton_gemm=false",
  ):
    if flag.split("=")[0] not in flags:
      flags = f"{flags} {flag}".strip()
  os.environ["XLA_FLAGS"] = flags
  # JAX read the environment when it was imported.
  jax.config.update("jax_platforms", "cpu")


@functools.cache
def devices(topology: Topology) -> collections.abc.Sequence[Any]:
  """Returns the devices of a topology that `is_installed`, to compile for."""
  prepare()
  from jax.experimental import topologies

  if topology.is_gpu:
    nodes, gpus = topology.shape
    described = topologies.get_topology_desc(
      platform="cuda",
      topology_name="",
      target_config=_H100.read_text(),
      topology=f"{nodes}x1x{gpus}",
    )
    return described.devices
  options: dict[str, Any] = {}
  if topology.generation == "v4":
    options["chip_config_name"] = "megacore"  # Else a chip is two devices.
  if topology.slices > 1:
    options["num_slices"] = topology.slices
  described = topologies.get_topology_desc(
    platform="tpu", topology_name=topology.name, **options
  )
  return described.devices


def device_like(topology: Topology) -> Any:
  """Returns one device of its kind, the same for every size of a cluster."""
  smallest = (2, 2, 1)[: topology.chip.axes] or (1, 1)
  return devices(Topology(topology.generation, smallest))[0]
