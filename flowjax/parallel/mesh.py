"""The mesh: the one place where devices get a shape.

Axes: `data` copies the parameters, `fsdp` divides parameters and batch,
`tensor` divides heads and the width of the MLP, `context` divides tokens.
`ulysses` divides each of those parts once more, among devices that exchange
tokens for heads where tokens attend.
"""

import collections.abc
import contextlib
import dataclasses
import itertools
import math

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from flowjax.ops import axes as activation_axes

AXES = ("data", "fsdp", "tensor", "context", "ulysses")
BATCH_AXES = ("data", "fsdp")

# What lives on the axes that models give their activations.
ACTIVATIONS = {
  "batch": BATCH_AXES,
  "tokens": ("context", "ulysses"),
  "heads": "tensor",
  "mlp": "tensor",
  "width": None,
}


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """Sizes of the mesh axes; one of them may be -1: all remaining devices."""

  data: int = -1
  fsdp: int = 1
  tensor: int = 1
  context: int = 1
  ulysses: int = 1

  def __post_init__(self):
    sizes = dataclasses.asdict(self)
    for axis, size in sizes.items():
      if size < 1 and size != -1:
        raise ValueError(
          f"{axis} = {size}: the size of a mesh axis is at least 1, or -1 for "
          "all the devices that the other axes leave."
        )
    if list(sizes.values()).count(-1) > 1:
      raise ValueError(f"only one mesh axis can be -1, not {sizes}.")

  def shape(self, device_count: int) -> tuple[int, ...]:
    """Returns the size of each of AXES on `device_count` devices."""
    sizes = dataclasses.astuple(self)
    fixed = math.prod(size for size in sizes if size != -1)
    if -1 in sizes and device_count % fixed == 0:
      return tuple(
        device_count // fixed if size == -1 else size for size in sizes
      )
    if fixed != device_count:
      raise ValueError(_impossible(sizes, device_count))
    return sizes


def build(
  config: MeshConfig, devices: collections.abc.Sequence | None = None
) -> Mesh:
  """Builds the mesh over `devices`, by default all of them.

  Raises ValueError, with the nearest meshes that fit, if the axes do not
  multiply to the number of devices.
  """
  devices = jax.devices() if devices is None else list(devices)
  return jax.make_mesh(
    config.shape(len(devices)),
    AXES,
    axis_types=(jax.sharding.AxisType.Auto,) * len(AXES),
    devices=devices,
  )


@contextlib.contextmanager
def use(mesh: Mesh):
  """Within this context, models compute on `mesh`."""
  device = mesh.devices.flat[0]
  with jax.set_mesh(mesh), activation_axes.rules(ACTIVATIONS, device):
    yield mesh


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of a batch: its first dim over data and fsdp."""
  return NamedSharding(mesh, P(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of what every device holds whole."""
  return NamedSharding(mesh, P())


def batch_ways(mesh: Mesh) -> int:
  """Returns into how many parts a batch is divided."""
  return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def padded(count: int, mesh: Mesh) -> int:
  """Returns the smallest batch of at least `count` that divides evenly."""
  ways = batch_ways(mesh)
  return -(-count // ways) * ways


def check_batch(batch_size: int, mesh: Mesh, name: str) -> None:
  """Refuses a batch that the data axes do not divide."""
  ways = batch_ways(mesh)
  if batch_size % ways:
    below = batch_size // ways * ways
    fitting = [size for size in (below, below + ways) if size]
    raise ValueError(
      f"{name} = {batch_size} is not divisible by data x fsdp = {ways}. Sizes "
      f"that are: {', '.join(map(str, fitting))}."
    )


def _impossible(sizes: tuple[int, ...], count: int) -> str:
  """Says why the sizes do not fit, and names the nearest that do."""
  wanted = " x ".join(
    f"{axis}={size}" for axis, size in zip(AXES, sizes, strict=True)
  )
  divisors = [n for n in range(1, count + 1) if count % n == 0]
  shapes = [
    shape
    for shape in itertools.product(divisors, repeat=len(AXES))
    if math.prod(shape) == count
  ]

  def distance(shape):
    pairs = zip(sizes, shape, strict=True)
    return sum(
      abs(math.log2(a / b)) for a, b in pairs if a != -1
    ), shape != tuple(sizes)

  near = sorted(shapes, key=distance)[:3]
  rows = [
    " ".join(f"--config.mesh.{a}={n}" for a, n in zip(AXES, shape, strict=True))
    for shape in near
  ]
  return (
    f"mesh {wanted} does not fit {count} device{'s' * (count > 1)}. "
    f"Nearest that do: {'; '.join(rows)}."
  )
