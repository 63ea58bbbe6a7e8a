"""How long a step would take: a model of compute, memory and wires.

t = compute + memory + exposed, where

  compute  FLOPs that are done / (peak x the part that large products reach)
  memory   bytes of norms, activations and the optimizer / bandwidth of HBM,
           as XLA runs these between the products and not beside them
  exposed  what the wires need beyond what is hidden behind the other two

Sums and gathers of parameters and gradients inside the loop over layers are
hidden as long as there is compute to hide them behind; activations that are
exchanged over `tensor` and `context`, and all outside the loop, are not.
"""

import collections.abc
import dataclasses
import math

from flowjax.parallel import chips, collectives, topology

# Of the data sheets' bandwidths, the part that is reached.
LINK_EFFICIENCY = 0.8
HBM_EFFICIENCY = 0.8
# Of the time of compute and memory, the part behind which wires are busy.
OVERLAP = 0.9
# Seconds for a hop to the next device, and for one across the network.
HOP, NETWORK_HOP = 1e-6, 20e-6
# Bytes of elementwise work per token, unit of width and layer, forward and
# backward, in bfloat16 with norms in float32; what is made again adds a third.
ELEMENTWISE, REMADE = 112, 4 / 3
# Of each entry of an attention matrix in memory, written and read as a float32
# score and as a bfloat16 weight.
SCORE = 12
# Of each parameter: gradient, two moments, average and the parameter itself.
OPTIMIZER = 44


@dataclasses.dataclass(frozen=True)
class Wires:
  """How the devices along one mesh axis are joined.

  `inner` of them over `rings` axes of the torus or a switch, `closed` into
  rings or not; `outer` such groups over the network.
  """

  inner: int
  outer: int
  rings: int
  closed: bool


@dataclasses.dataclass(frozen=True)
class Step:
  """The parts of a step in seconds."""

  compute: float
  memory: float
  wires: float
  exposed: float

  @property
  def seconds(self) -> float:
    """The whole step."""
    return self.compute + self.memory + self.exposed

  @property
  def bound_by(self) -> str:
    """What takes longest."""
    parts = {
      "compute": self.compute,
      "memory": self.memory,
      "communication": self.exposed,
    }
    return max(parts, key=lambda name: parts[name])


def layout(
  shape: collections.abc.Mapping[str, int], where: topology.Topology
) -> dict[str, Wires]:
  """Returns how each axis of a mesh of this shape is wired.

  The last axes are the closest: they fill a slice or a node first, and what
  does not fit into it is across the network.
  """
  left, sides = where.domain, list(where.torus)
  found = {}
  for axis in reversed(list(shape)):
    inner = math.gcd(shape[axis], left)
    left //= inner
    rings, closed = _rings(inner, sides, where.chip)
    found[axis] = Wires(inner, shape[axis] // inner, rings, closed)
  return found


def _rings(count: int, sides: list[int], chip: chips.Chip) -> tuple[int, bool]:
  """Takes `count` devices off the torus: over how many axes, closed or not."""
  rings, closed = 0, True
  while count > 1 and sides:
    part = math.gcd(count, sides[-1])
    if part > 1:
      rings += 1
      # Only a whole side of the torus comes back to where it began.
      closed = closed and part == sides[-1] and part >= chip.wrap
    count //= part
    sides[-1] //= part
    if sides[-1] == 1 or part == 1:
      sides.pop()
  return max(rings, 1), closed


def wire_seconds(
  one: collectives.Collective,
  wires: collections.abc.Mapping[str, Wires],
  chip: chips.Chip,
) -> float:
  """Returns how long one run of a collective keeps its wires busy.

  Of B bytes that m devices gather, each receives (m - 1) / m B; a sum is
  scattered and gathered, twice that. Over the network each device carries its
  m-th part of what its slice or node exchanges with the others.
  """
  along = [wires[axis.rstrip("?")] for axis in one.axes]
  inner = math.prod(each.inner for each in along)
  outer = math.prod(each.outer for each in along)
  if any(axis.endswith("?") for axis in one.axes):
    inner = min(inner, one.group)
    outer = max(1, one.group // inner)
  if one.across:
    inner, outer = 1, one.group
  rings = sum(each.rings for each in along if each.inner > 1) or 1
  closed = all(each.closed for each in along)
  link = chip.link * (rings if chip.axes else 1) * LINK_EFFICIENCY
  link *= 1.0 if closed or not chip.axes else 0.5
  network = chip.network * LINK_EFFICIENCY
  if one.kind == "collective-permute":
    # To one neighbour: half of the ring's two directions.
    return one.bytes / (network if outer > 1 else link / 2) + HOP
  passes = 2 if one.kind == "all-reduce" else 1
  size = one.bytes
  if one.kind == "all-to-all" and chip.axes:
    # Across a ring everything passes over its middle.
    size = size * max(1, inner // 4)
  near = size * (inner - 1) / inner / link
  far = size / inner * (outer - 1) / outer / network
  hops = HOP * inner ** (1 / rings) * (inner > 1)
  hops += NETWORK_HOP * math.log2(outer)
  return passes * (near + far + hops)


def step(
  found: collections.abc.Iterable[collectives.Collective],
  wires: collections.abc.Mapping[str, Wires],
  chip: chips.Chip,
  *,
  flops: float,
  hbm_bytes: float,
  layer_depth: int = 1,
) -> Step:
  """Returns the step's parts from what one device does in it."""
  compute = flops / (chip.peak * chip.matmul)
  memory = hbm_bytes / (chip.hbm_bandwidth * HBM_EFFICIENCY)
  hidden = exposed = 0.0
  for one in found:
    seconds = one.count * wire_seconds(one, wires, chip)
    if len(one.trips) >= layer_depth and is_of_parameters(one):
      hidden += seconds
    else:
      exposed += seconds
  beyond = max(0.0, hidden - OVERLAP * (compute + memory))
  return Step(compute, memory, hidden + exposed, exposed + beyond)


def is_of_parameters(one: collectives.Collective) -> bool:
  """Tells, by its axes, whether parameters or gradients move.

  No activation goes along `data` or `fsdp`; and over those that split tokens
  only gradients are summed on all.
  """
  axes = {axis.rstrip("?") for axis in one.axes}
  if axes & {"data", "fsdp"}:
    return True
  return one.kind == "all-reduce" and axes <= {"context", "ulysses"}
