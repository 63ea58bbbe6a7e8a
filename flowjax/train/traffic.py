"""What a step moves, by formulas: through memory, and over wires."""

import collections.abc
import math

from flowjax.parallel import collectives, roofline
from flowjax.train import experiment, memory

# The axes that split tokens: keys travel, if they do, round all but the last.
_TOKENS = ("context", "ulysses")
_SHORT = {"float32": "f32", "bfloat16": "bf16"}
_ITEMSIZE = {"f32": 4, "bf16": 2}


def through_memory(
  config: experiment.Experiment,
  found: memory.Outline,
  shape: collections.abc.Mapping[str, int],
) -> float:
  """Returns the bytes that a device moves in a step, beside its products'."""
  model, devices = found.model, math.prod(shape.values())
  remade = getattr(model, "remat", "none") != "none"
  trained = memory.of_gradients(found, shape) / 4
  moved = roofline.OPTIMIZER * trained
  if hasattr(model, "grid"):
    # Of a block's values `tensor` divides about half: not the residual stream.
    whole = 0.5 + 0.5 / shape["tensor"]
    each = memory.depth(model) * memory.tokens(model) * model.width
    each *= roofline.ELEMENTWISE * found.itemsize / 2
    each *= roofline.REMADE if remade else 1.0
    each = each * whole * shape["tensor"]
    each += roofline.SCORE * found.arithmetic.scores
    moved += each * config.data.batch_size / devices
  return moved


def over_wires(
  config: experiment.Experiment, found: memory.Outline, shape: dict[str, int]
) -> list[collectives.Collective]:
  """Returns what a step has to send: the least that its shardings allow."""
  parts = config.optim.accumulate
  outer = (parts,) * (parts > 1)
  moved: list[collectives.Collective] = []

  def add(kind, dtype, count, axes, trips, source):
    axes = tuple(axis for axis in axes if shape[axis] > 1)
    if axes and count:
      group = math.prod(shape[axis] for axis in axes)
      moved.append(
        collectives.Collective(
          kind, dtype, int(_ITEMSIZE[dtype] * count), (), axes, group, trips,
          source,
        )
      )  # fmt: skip

  _of_parameters(config, found, shape, outer, add)
  if hasattr(found.model, "grid"):
    _of_activations(config, found, shape, outer, add)
  return moved


def _of_parameters(config, found, shape, outer, add) -> None:
  """Adds what parameters and their gradients send.

  Each divided kernel is gathered for the forward pass and for the gradient, and
  its gradient summed: scattered over `fsdp`, and then, of each part, over the
  others that have examples or tokens of their own. Of an accumulated batch the
  sum over `data` is taken once, after the last part.
  """
  others = ("data", *_TOKENS)
  each, last = (_TOKENS, ("data",)) if outer else (others, ())
  # Stacks of layers, and what stands alone: values of one layer, by whether
  # `fsdp` divides them, and the dtype of their sums.
  stacks: dict[tuple, float] = {}
  for name, place in memory.places(found, shape).items():
    layers = place.shape[:1] if memory.is_stacked(name) else ()
    rest = place.shape[len(layers) :]
    count = float(math.prod(rest))
    count /= shape["tensor"] if "tensor" in place.spec else 1
    # Biases and scales are summed in float32 whatever is chosen.
    dtype = config.optim.reduce_dtype if len(rest) > 1 else "float32"
    stack = name.split("/")[0] if layers else ""
    key = (stack, layers, "fsdp" in place.spec, _SHORT[dtype])
    stacks[key] = stacks.get(key, 0) + count
  for (name, layers, is_divided, dtype), count in stacks.items():
    trips, source = (*outer, *layers), f"gradients {name}"
    if is_divided:
      short = {2: "bf16", 4: "f32"}[found.itemsize]
      for _ in range(2):
        add("all-gather", short, count, ("fsdp",), trips, f"parameters {name}")
      add("reduce-scatter", dtype, count, ("fsdp",), trips, source)
      count /= shape["fsdp"]
      add("all-reduce", dtype, count, each, trips, source)
    else:
      add("all-reduce", dtype, count, ("fsdp", *each), trips, source)
    count *= math.prod(layers)
    add("all-reduce", dtype, count, last, (), source)


def _of_activations(config, found, shape, outer, add) -> None:
  """Adds what activations send.

  They are summed over `tensor` twice per block in either direction, and again
  where they are remade; FLUX's single blocks need but one sum forward. Where
  tokens are split, queries, keys, values and what attention returns are
  exchanged, or keys and values travel, or are gathered.
  """
  model, dtype = found.model, {2: "bf16", 4: "f32"}[found.itemsize]
  remat = getattr(model, "remat", "none")
  stream = memory.examples(config, shape) * memory.tokens(model) * model.width
  stream /= math.prod(shape[axis] for axis in _TOKENS)
  again = remat in ("save_attention", "full")
  single = getattr(model, "single_depth", 0)
  for blocks, sums in ((memory.depth(model) - single, 2), (single, 1)):
    for _ in range((2 + sums + again) if blocks else 0):
      add("all-reduce", dtype, stream, ("tensor",), (*outer, blocks), "sums")
  trips, here = (*outer, memory.depth(model)), stream / shape["tensor"]
  ring, exchange, gathered = _bodies(model, shape)
  for _ in range(8 + 3 * (remat != "none")):
    add("all-to-all", dtype, here, exchange, trips, "heads for tokens")
  turns = math.prod(shape[axis] for axis in ring)
  if turns > 1:
    # Keys and values there and, for the gradient, there again; and these.
    add("collective-permute", dtype, 2 * here, ring, (*trips, 2 * turns - 2),
        "keys, values")  # fmt: skip
    add("collective-permute", "f32", 2 * here, ring, (*trips, turns), "sums")
  ways = math.prod(shape[axis] for axis in gathered)
  for kind in ("all-gather", "all-gather", "reduce-scatter"):
    add(kind, dtype, 2 * here * ways, gathered, trips, "keys, values")


def _bodies(model, shape) -> tuple[tuple[str, ...], ...]:
  """Returns along which axes keys travel, heads are exchanged, keys gathered.

  As `ops/attention` chooses.
  """
  tokens = tuple(axis for axis in _TOKENS if shape[axis] > 1)
  if not tokens:
    return (), (), ()
  body = model.attention
  if body == "auto":
    body = "ring_ulysses" if len(tokens) > 1 else "ulysses"
    if (
      model.heads
      // shape["tensor"]
      % math.prod(shape[axis] for axis in tokens[-1:])
    ):
      body = "ring"
  if body == "ring":
    return tokens, (), ()
  if body == "ulysses":
    return (), tokens, ()
  if body == "ring_ulysses":
    ring = tuple(axis for axis in tokens if axis != _TOKENS[-1])
    return ring, tuple(axis for axis in tokens if axis not in ring), ()
  return (), (), tokens
