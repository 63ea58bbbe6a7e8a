"""What a step moves, by formulas: through memory, and over wires."""

import collections.abc
import math

from flowjax.parallel import collectives, roofline
from flowjax.train import experiment, memory


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
  """Returns what a step has to send: the least that its shardings allow.

  Each divided kernel is gathered for the forward pass and for the gradient, and
  its gradient summed: scattered over `fsdp`, and over `data`. Activations are
  summed over `tensor` twice per block in either direction, and again where they
  are remade; keys and values are gathered over `context`, in either direction,
  and their gradients scattered.
  """
  model, size = found.model, found.itemsize
  dtype = {2: "bf16", 4: "f32"}[size]
  outer = (config.optim.accumulate,) * (config.optim.accumulate > 1)
  moved: list[collectives.Collective] = []

  def add(kind, count, axes, trips, source):
    axes = tuple(axis for axis in axes if shape[axis] > 1)
    if axes and count:
      group = math.prod(shape[axis] for axis in axes)
      moved.append(
        collectives.Collective(
          kind, dtype, int(size * count), (), axes, group, trips, source
        )
      )

  # Stacks of layers, and what stands alone: values of one layer, by whether
  # `fsdp` divides them.
  stacks: dict[tuple, float] = {}
  for name, place in memory.places(found, shape).items():
    layers = place.shape[:1] if memory.is_stacked(name) else ()
    count = float(math.prod(place.shape[len(layers) :]))
    count /= shape["tensor"] if "tensor" in place.spec else 1
    key = (name.split("/")[0] if layers else "", layers, "fsdp" in place.spec)
    stacks[key] = stacks.get(key, 0) + count
  for (name, layers, is_divided), count in stacks.items():
    trips = (*outer, *layers)
    if is_divided:
      for _ in range(2):
        add("all-gather", count, ("fsdp",), trips, f"parameters {name}")
      add("reduce-scatter", count, ("fsdp",), trips, f"gradients {name}")
      add(
        "all-reduce",
        count / shape["fsdp"],
        ("data",),
        trips,
        f"gradients {name}",
      )
    else:
      add("all-reduce", count, ("data", "fsdp"), trips, f"gradients {name}")
  if not hasattr(model, "grid"):
    return moved
  trips = (*outer, memory.depth(model))
  stream = memory.examples(config, shape) * memory.tokens(model) * model.width
  again = getattr(model, "remat", "none") in ("save_attention", "full")
  for _ in range(4 + again):
    add("all-reduce", stream / shape["context"], ("tensor",), trips, "sums")
  for kind in ("all-gather", "all-gather", "reduce-scatter"):
    add(kind, 2 * stream / shape["tensor"], ("context",), trips, "keys, values")
  return moved
