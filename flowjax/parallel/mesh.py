"""The mesh: the one place where devices get a shape.

Axes: `data` copies the parameters, `fsdp` divides parameters and batch,
`tensor` divides heads and the width of the MLP, `context` divides tokens.
`ulysses` divides each of those parts once more, among devices that exchange
tokens for heads where tokens attend.

Devices come in slices, with faster wires inside than between: slices of TPUs
(ICI inside, DCN between), machines of GPUs (NVLink, and the network). `data`
lies across the slices, so that only sums of gradients go between them.
"""

import collections.abc
import contextlib
import dataclasses
import itertools
import math

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from flowjax.ops import axes as activation_axes

AXES = ("data", "fsdp", "tensor", "context", "ulysses")
BATCH_AXES = ("data", "fsdp")

# Which axes may lie across slices where any may: the least talkative first.
_OUTERMOST = ("data", "fsdp", "context", "tensor", "ulysses")

# What lives on the axes that models give their activations.
ACTIVATIONS = {
  "batch": BATCH_AXES,
  "tokens": ("context", "ulysses"),
  "heads": "tensor",
  "mlp": "tensor",
  "width": None,
  # And on that of parameters that is divided besides.
  "kernel": "fsdp",
}


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """Sizes of the mesh axes; one of them may be -1: all remaining devices.

  `slices` is into how many slices the devices fall, in their order; -1: as they
  say themselves. Every slice has its whole share of `data`; with 1 any axis may
  lie across slices.
  """

  data: int = -1
  fsdp: int = 1
  tensor: int = 1
  context: int = 1
  ulysses: int = 1
  slices: int = -1

  def __post_init__(self):
    for field in dataclasses.fields(self):
      size = getattr(self, field.name)
      if size < 1 and size != -1:
        raise ValueError(
          f"{field.name} = {size}: the size of a mesh axis is at least 1, or "
          "-1 for all the devices that the other axes leave; so are slices, "
          "where -1 is as many as there are."
        )
    if self.sizes.count(-1) > 1:
      raise ValueError(f"only one mesh axis can be -1, not {self.sizes}.")

  @property
  def sizes(self) -> tuple[int, ...]:
    """The size of each of AXES, as configured."""
    return tuple(getattr(self, axis) for axis in AXES)

  def shape(self, device_count: int, slices: int = 1) -> tuple[int, ...]:
    """Returns the size of each of AXES on `device_count` devices."""
    sizes = self.sizes
    fixed = math.prod(size for size in sizes if size != -1)
    if -1 in sizes and device_count % fixed == 0:
      sizes = tuple(
        device_count // fixed if size == -1 else size for size in sizes
      )
    if math.prod(sizes) != device_count:
      reason = f"does not fit {device_count} device{'s' * (device_count > 1)}"
      raise ValueError(_impossible(self.sizes, reason, device_count, slices))
    if sizes[0] % slices:
      reason = (
        f"on {slices} slices of {device_count // slices} devices: each must "
        f"have its share of data, and {sizes[0]} does not divide by {slices}"
      )
      raise ValueError(
        _impossible(self.sizes, reason, device_count, slices)
        + " Or let any axis lie across them: --config.mesh.slices=1."
      )
    return sizes


def build(
  config: MeshConfig, devices: collections.abc.Sequence | None = None
) -> Mesh:
  """Builds the mesh over `devices`, by default all of them.

  Raises ValueError, with the nearest meshes that fit, if the axes do not
  multiply to the number of devices or do not lie inside the slices.
  """
  devices = jax.devices() if devices is None else list(devices)
  slices = _slices(devices) if config.slices == -1 else [devices]
  if config.slices > 1:
    slices = _cut(_in_order(devices), config.slices)
  shape = config.shape(len(devices), len(slices))
  return Mesh(
    _layout(slices, shape),
    AXES,
    axis_types=(jax.sharding.AxisType.Auto,) * len(AXES),
  )


def slice_count(devices: collections.abc.Sequence) -> int:
  """Returns into how many slices the devices say that they fall."""
  return len({_slice_of(device) for device in devices})


def _slice_of(device: jax.Device) -> int:
  # Not every platform tells; what does not has fast wires throughout.
  return getattr(device, "slice_index", 0) or 0


def _in_order(devices: collections.abc.Sequence) -> list:
  return sorted(devices, key=_slice_of)


def _slices(devices: collections.abc.Sequence) -> list[list]:
  return _cut(_in_order(devices), slice_count(devices))


def _cut(devices: list, count: int) -> list[list]:
  """Returns `count` runs of devices, equally long."""
  size, rest = divmod(len(devices), count)
  runs = [devices[i * size : (i + 1) * size] for i in range(count)]
  torn = slice_count(devices) == count and any(
    slice_count(run) > 1 for run in runs
  )
  if rest or torn:
    raise ValueError(
      f"slices = {count}: {len(devices)} devices do not fall into so many of "
      "one size. Use as many devices of each, or --config.mesh.slices=1."
    )
  return runs


def _layout(slices: list[list], shape: tuple[int, ...]) -> np.ndarray:
  """Arranges devices so that axes lie inside slices as far as they can."""
  if len(slices) == 1:
    (devices,) = slices
    if slice_count(devices) == 1:
      # Knows how the chips of a TPU slice are wired.
      return mesh_utils.create_device_mesh(
        shape, devices, allow_split_physical_axes=True
      )
    slices = _slices(devices)
  across, left = dict.fromkeys(AXES, 1), len(slices)
  for axis in _OUTERMOST:
    across[axis] = math.gcd(shape[AXES.index(axis)], left)
    left //= across[axis]
  if left > 1:
    return np.array(_in_order(sum(slices, []))).reshape(shape)
  outer = tuple(across.values())
  inner = tuple(n // m for n, m in zip(shape, outer, strict=True))
  grid = np.stack([_layout([devices], inner) for devices in slices])
  grid = grid.reshape(outer + inner)
  pairs = ((i, i + len(AXES)) for i in range(len(AXES)))
  return grid.transpose(*itertools.chain.from_iterable(pairs)).reshape(shape)


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


def _shapes(count: int, dims: int) -> collections.abc.Iterator[tuple[int, ...]]:
  """Yields all the ways to multiply so many sizes to `count`."""
  if dims == 1:
    yield (count,)
    return
  for size in (n for n in range(1, count + 1) if count % n == 0):
    for rest in _shapes(count // size, dims - 1):
      yield (size, *rest)


def _impossible(
  sizes: tuple[int, ...], reason: str, count: int, slices: int
) -> str:
  """Says why the sizes do not fit, and names the nearest that do."""
  wanted = " x ".join(
    f"{axis}={size}" for axis, size in zip(AXES, sizes, strict=True)
  )
  shapes = [s for s in _shapes(count, len(AXES)) if s[0] % slices == 0]

  def distance(shape):
    pairs = zip(sizes, shape, strict=True)
    away = sum(abs(math.log2(a / b)) for a, b in pairs if a != -1)
    # Of those as near, first what more of the plainest axis makes of it.
    return away, [-size for size in shape]

  near = sorted(shapes, key=distance)[:3]
  rows = [
    " ".join(f"--config.mesh.{a}={n}" for a, n in zip(AXES, shape, strict=True))
    for shape in near
  ]
  return f"mesh {wanted} {reason}. Nearest that do: {'; '.join(rows)}."
