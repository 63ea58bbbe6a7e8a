"""What a compiled program sends over the wires, read from its text.

XLA prints the program of one device. A collective in the body of a loop runs
once for each trip; groups of device numbers are turned back into axes of the
mesh. How long the wires need is roofline.py's business.
"""

import collections
import collections.abc
import dataclasses
import math
import re

import numpy as np
from jax.sharding import Mesh

KINDS = (
  "all-gather",
  "all-reduce",
  "reduce-scatter",
  "all-to-all",
  "collective-permute",
)
_BITS = {"pred": 8, "bf16": 16, "f8e4m3fn": 8, "f8e5m2": 8, "s4": 4, "u4": 4}

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_OPERATION = re.compile(
  rf"^\s*(?:ROOT )?%[\w.\-]+ = (.*?) ({'|'.join(KINDS)})(-start)?"
  r"\(([^)]*)\)(.*)"
)
# How TPUs of several slices talk: through the network of their hosts.
_ACROSS = re.compile(
  r"^\s*(?:ROOT )?%[\w.\-]+ = \((.*?), u32\[\]\S*, token\[\]\) send\("
  r".*_xla_megascale_transfer_type=\"(\w+)\"(.*)"
)
_SHAPE = re.compile(r"\b([a-z]+\d*(?:e\d+m\d+\w*)?)\[([\d,]*)\]")
_CALLED = re.compile(
  r"\b(?:calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)"
)
_BRANCHES = re.compile(
  r"\b(?:branch_computations|called_computations)=\{(.*?)\}"
)
_WHILE = re.compile(r" while\(.*?condition=%?([\w.\-]+), body=%?([\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_BOUND = re.compile(r"%([\w.\-]+) = [su](?:32|64)\[\]\S* constant\((\d+)\)")
_COMPARED = re.compile(r"ROOT .* compare\((.*?)\), direction=(LT|GT)")


@dataclasses.dataclass(frozen=True)
class Collective:
  """One collective operation: what moves among whom, and how often.

  `bytes` is what all of a group hold together of what is gathered, or each of
  it of what is summed; `shapes` are those of what a device receives. `axes` are
  the mesh axes along which members of a group differ; a group that is only a
  part of an axis has it with a "?". `trips` are those of the loops around it,
  outermost first. `across` slices each device sends its own over the network.
  """

  kind: str
  dtype: str
  bytes: int
  shapes: tuple[tuple[int, ...], ...]
  axes: tuple[str, ...]
  group: int
  trips: tuple[int, ...]
  source: str
  across: bool = False

  @property
  def count(self) -> int:
    """How often it runs in a step."""
    return math.prod(self.trips)


def read(text: str, mesh: Mesh) -> list[Collective]:
  """Returns the collectives of a compiled program, in order."""
  bodies = _computations(text)
  found: dict[tuple, Collective] = {}
  _walk(bodies, bodies[""][0], (), mesh, found)
  return list(found.values())


def _computations(text: str) -> dict[str, list[str]]:
  """Returns the lines of each computation; under "" the name of the first."""
  bodies: dict[str, list[str]] = {}
  lines: list[str] = []
  for line in text.splitlines():
    begins = _COMPUTATION.match(line)
    if begins:
      lines = bodies.setdefault(begins.group(2), [])
      if begins.group(1):
        bodies[""] = [begins.group(2)]
    elif line.startswith(" "):
      lines.append(line)
  return bodies


def _walk(bodies, name, trips, mesh, found) -> None:
  for line in bodies.get(name, ()):
    loop = _WHILE.search(line)
    if loop:
      count = _trip_count(line, bodies[loop.group(1)])
      _walk(bodies, loop.group(2), (*trips, count), mesh, found)
      continue
    operation = _OPERATION.match(line)
    if operation:
      one = _collective(operation, name, trips, mesh)
      if one is not None:
        found.setdefault((one.kind, _identity(line, name), trips), one)
      continue
    sent = _ACROSS.match(line)
    if sent:
      found[_identity(line, name), trips] = _between(sent, trips, mesh)
      continue
    called = _CALLED.findall(line)
    for branches in _BRANCHES.findall(line):
      called += [word.strip().lstrip("%") for word in branches.split(",")]
    for other in called:
      _walk(bodies, other, trips, mesh, found)


def _identity(line: str, computation: str) -> str:
  """Returns what tells an operation from others, and not from itself.

  What a program overlaps with several others it prints in each: there the
  channel is the same. All that `jax.shard_map` sends has one channel in common.
  """
  channel = re.search(r"channel_id=(\d+)", line)
  if channel is None or (channel.group(1) == "1" and "shard_map" in line):
    return f"{computation}: {line}"
  return channel.group(1)


def _trip_count(line: str, condition: list[str]) -> int:
  """Returns how often a loop runs: as it says, or by what its counter meets."""
  known = _TRIPS.search(line)
  if known:
    return int(known.group(1))
  text = "\n".join(condition)
  bounds = dict(_BOUND.findall(text))
  compared = _COMPARED.search(text)
  if compared:
    for operand in re.findall(r"%([\w.\-]+)", compared.group(1)):
      if operand in bounds:
        return int(bounds[operand])
  if len(bounds) == 1:  # The comparison is inside a fusion.
    return int(*bounds.values())
  raise ValueError(
    "The number of trips of a loop cannot be read from the compiled program: "
    f"{line.strip()[:160]}"
  )


def _collective(operation, computation, trips, mesh) -> Collective | None:
  result, kind, start, operands, rest = operation.groups()
  shapes = [
    (dtype, tuple(map(int, filter(None, dims.split(",")))))
    for dtype, dims in _SHAPE.findall(result)
  ]
  members = _members(rest, mesh)
  if kind == "collective-permute":
    pairs = [pair for pair in members if pair[0] != pair[1]]
    if not pairs:
      return None
    axes, group = _axes_of(pairs, mesh, whole=False), 2
  else:
    members = members or [list(range(mesh.size))]
    group = len(members[0])
    if group == 1:
      return None
    axes = _axes_of(members, mesh, whole=True)
  count = operands.count("%") or 1
  if start and kind in ("all-gather", "reduce-scatter"):
    # A start holds what goes in and what comes out.
    shapes = shapes[:count] if kind == "reduce-scatter" else shapes[count:]
    shapes = shapes[:count]
  elif kind == "collective-permute":
    shapes = shapes[:1]
  sizes = [_bytes(*shape) for shape in shapes]
  if kind == "reduce-scatter" and not start:
    sizes = [size * group for size in sizes]
  if kind == "all-reduce" and "all-reduce-scatter" in computation:
    kind = "reduce-scatter"  # How a TPU is told to do so.
  named = re.search(r'op_name="([^"]*)"', rest)
  return Collective(
    kind,
    shapes[sizes.index(max(sizes))][0],
    sum(sizes),
    tuple(dims for _, dims in shapes),
    axes,
    group,
    trips,
    named.group(1) if named else "",
  )


def _between(sent, trips, mesh) -> Collective:
  """Returns what goes between slices: sums, in all that FlowJAX does."""
  result, kind, rest = sent.groups()
  kind = kind.lower().replace("_", "-")
  shapes = [
    (dtype, tuple(map(int, filter(None, dims.split(",")))))
    for dtype, dims in _SHAPE.findall(result)
  ]
  slices = np.vectorize(lambda device: device.slice_index)(mesh.devices)
  count = len(np.unique(slices))
  names = [
    (name, size)
    for i, (name, size) in enumerate(mesh.shape.items())
    if (slices != slices.take([0], axis=i)).any()
  ]
  part = math.prod(size for _, size in names) != count
  named = re.search(r'op_name="([^"]*)"', rest)
  return Collective(
    kind if kind in KINDS else "collective-permute",
    shapes[0][0],
    sum(_bytes(*shape) for shape in shapes),
    tuple(dims for _, dims in shapes),
    tuple(name + "?" * part for name, _ in names),
    count,
    trips,
    named.group(1) if named else "",
    across=True,
  )


def _bytes(dtype: str, dims: tuple[int, ...]) -> int:
  bits = _BITS.get(dtype) or int(re.sub(r"\D", "", dtype) or 0)
  return math.prod(dims) * bits // 8


def _members(rest: str, mesh: Mesh) -> list[list[int]]:
  """Returns the groups of device numbers, or the pairs, of an operation."""
  pairs = re.search(r"source_target_pairs=\{(\{.*?\})\}", rest)
  if pairs:
    return _listed(pairs.group(1))
  listed = re.search(r"replica_groups=\{(\{.*?\})\}", rest)
  if listed:
    return _listed(listed.group(1))
  iota = re.search(
    r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", rest
  )
  if iota:
    return _iota(*iota.groups()).tolist()
  named = re.search(
    r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\]"
    r"(?:<=\[([\d,]+)\])?(?:T\(([\d,]+)\))?\))? \{([^}]*)\}",
    rest,
  )
  if named:
    return _of_named(mesh.size, *named.groups())
  return []


def _listed(text: str) -> list[list[int]]:
  groups = re.findall(r"\{([\d,\s]*)\}", text)
  return [[int(n) for n in group.split(",")] for group in groups]


def _numbers(text: str) -> list[int]:
  return [int(n) for n in text.split(",")]


def _iota(shape: str, source: str, order: str | None) -> np.ndarray:
  """Returns 0, 1, ... as `source`, transposed, as `shape`."""
  ids = np.arange(math.prod(_numbers(source))).reshape(_numbers(source))
  if order:
    ids = ids.transpose(_numbers(order))
  return ids.reshape(_numbers(shape))


def _of_named(
  count: int,
  sizes: str,
  reshape: str | None,
  source: str | None,
  order: str | None,
  along: str,
) -> list[list[int]]:
  """Returns groups given by axes of a mesh that the compiler made up.

  An axis may be cut: 'axis_0':(2)4 is its 4 parts after its first 2.
  """
  dims = dict(
    (name, int(size)) for name, size in re.findall(r"'(\w+)'=(\d+)", sizes)
  )
  ids = np.arange(count)
  if reshape:
    ids = ids.reshape(_numbers(source or reshape))
    if order:
      ids = ids.transpose(_numbers(order))
  parts: list[tuple[int, bool]] = []
  wanted = {
    name: (int(before or 1), int(size or dims[name]))
    for name, before, size in re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", along)
  }
  for name, size in dims.items():
    before, taken = wanted.get(name, (size, 1))
    parts += [(before, False), (taken, name in wanted)]
    parts += [(size // before // taken, False)]
  ids = ids.reshape([size for size, _ in parts])
  last = [i for i, (_, inside) in enumerate(parts) if inside]
  first = [i for i in range(len(parts)) if i not in last]
  width = math.prod(parts[i][0] for i in last)
  return ids.transpose(first + last).reshape(-1, width).tolist()


def _axes_of(
  members: list[list[int]], mesh: Mesh, *, whole: bool
) -> tuple[str, ...]:
  """Returns along which mesh axes the members of groups differ."""
  names, sizes = list(mesh.shape), list(mesh.shape.values())
  places = np.array(np.unravel_index(np.array(members), sizes))
  differ = [
    i for i in range(len(names)) if (places[i] != places[i][:, :1]).any()
  ]
  part = whole and len(members[0]) != math.prod(sizes[i] for i in differ)
  return tuple(names[i] + "?" * part for i in differ)


def table(
  collectives: collections.abc.Iterable[Collective], layer_depth: int = 1
) -> list[dict]:
  """Adds up what is alike: a row per kind, axes, dtype and place.

  `layer_depth` is how deep the loop over layers is nested.
  """
  rows: dict[tuple, list[int]] = collections.defaultdict(lambda: [0, 0, 0])
  for one in collectives:
    inside = len(one.trips) >= layer_depth
    row = rows[one.kind, one.axes, one.dtype, inside]
    row[0] += 1
    row[1] += one.count
    row[2] += one.count * one.bytes
  return [
    {
      "kind": kind,
      "axis": " x ".join(axes),
      "dtype": dtype,
      "in_layer_loop": inside,
      "operations": operations,
      "count_per_step": count,
      "bytes_per_step": size,
    }
    for (kind, axes, dtype, inside), (operations, count, size) in sorted(
      rows.items(), key=lambda item: -item[1][2]
    )
  ]
