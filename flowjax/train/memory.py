"""What a step holds on one device, by kind, without compiling it.

The state is counted leaf by leaf, exactly. Activations are those that the
gradient waits for, found by tracing the network; what a block works with
beside them is modelled.
"""

import collections.abc
import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from flowjax import errors, models
from flowjax.models import blocks, conditions
from flowjax.parallel import flops, rules
from flowjax.parallel import mesh as meshes
from flowjax.train import experiment, parts

# The sizes of a mesh's axes.
Shape = collections.abc.Mapping[str, int]
# Of what is kept for the gradient, per example: shapes, and bytes.
Kept = tuple[tuple[tuple[int, ...], int], ...]


@dataclasses.dataclass(frozen=True)
class Outline:
  """An experiment on one device, and what one example costs it."""

  built: parts.Parts
  arithmetic: flops.Count
  kept: Kept
  kept_by_all: Kept  # Without rematerialisation.

  @property
  def model(self) -> Any:
    """The model's config."""
    return self.built.experiment.model

  @property
  def itemsize(self) -> int:
    """The bytes of a value in which the model computes."""
    return jnp.dtype(blocks.DTYPES[self.model.dtype]).itemsize


class _Ways:
  """The sizes of a mesh's axes, as rules of sharding ask for them."""

  def __init__(self, shape: Shape):
    self.shape = dict(shape)


def outline(config: experiment.Experiment, device: Any = None) -> Outline:
  """Traces an experiment; its mesh and the size of its batch do not matter.

  For a `device` that is described, or this machine's CPU: what "auto" chooses
  depends on it.
  """
  if config.is_autoencoder:
    raise errors.UserError(
      f"A plan is modelled for transformers, and config.model is "
      f"{config.model.name!r}: `flowjax describe --compile --devices=8` shows "
      "the memory of an autoencoder."
    )
  data = dataclasses.replace(config.data, batch_size=config.optim.accumulate)
  alone = meshes.MeshConfig(1, 1, 1, 1)
  device = device or jax.devices("cpu")[0]
  return _outline(dataclasses.replace(config, data=data, mesh=alone), device)


@functools.lru_cache(maxsize=32)
def _outline(config: experiment.Experiment, device: Any) -> Outline:
  built = parts.build(config, [device])
  with meshes.use(built.mesh):
    kept = free = _kept(built.network)
    if getattr(config.model, "remat", "none") != "none":
      free = _kept_whole(
        dataclasses.replace(config.model, remat="none"), device
      )
    return Outline(built, _arithmetic(built), kept, free)


@functools.lru_cache(maxsize=32)
def _kept_whole(model: Any, device: Any) -> Kept:
  """Returns what is kept where nothing is made again: one for every remat."""
  del device  # Of the mesh that is in use.
  return _kept(models.build(model))


def _arithmetic(built: parts.Parts) -> flops.Count:
  """Counts what the gradient of the loss of one example computes."""
  config, network = built.experiment, built.network
  loss = config.loss(network)
  x, _, cond = _inputs(network, 1)
  batch = {"image": x, **cond}
  if config.data.pair_source is not None:
    batch["source"] = x
  params = jax.eval_shape(lambda: network.init(jax.random.key(0)))
  rng = jax.eval_shape(lambda: jax.random.key(0))
  return flops.of(
    jax.grad(lambda *inputs: loss(*inputs)[0]), params, batch, rng
  )


def _inputs(network: models.Network, count: int) -> tuple[Any, Any, Any]:
  model = network.config
  size = (count, *model.image_size, model.channels)
  return (
    jax.ShapeDtypeStruct(size, jnp.float32),
    jax.ShapeDtypeStruct((count,), jnp.float32),
    jax.eval_shape(lambda: network.example(count)),
  )


def _kept(network: models.Network) -> Kept:
  """Returns what waits for the gradient: what grows from one example to two."""
  params = jax.eval_shape(lambda: network.init(jax.random.key(0)))

  def pull(params, x, t, cond):
    if network.forward is not None:
      return jax.vjp(lambda p: network.forward(p, x, cond), params)[1]
    return jax.vjp(lambda p: network.apply(p, x, t, cond), params)[1]

  one, two = (
    jax.tree.leaves(jax.eval_shape(pull, params, *_inputs(network, count)))
    for count in (1, 2)
  )
  return tuple(
    (b.shape, (b.size - a.size) * b.dtype.itemsize)
    for a, b in zip(one, two, strict=True)
    if b.size > a.size
  )


def places(found: Outline, shape: Shape) -> dict[str, rules.Placement]:
  """Returns where each parameter lives on a mesh of this shape."""
  built = found.built
  return rules.places(built.rules, built.abstract.params, _Ways(shape))  # type: ignore[arg-type]


def of_state(found: Outline, shape: Shape) -> dict[str, int]:
  """Returns the bytes on one device of each part of the state."""
  state, placed = found.built.abstract, places(found, shape)

  def here(path, leaf):
    place = placed[rules.name_of(path)]
    return leaf.size * leaf.dtype.itemsize // _ways(place, shape)

  params = jax.tree_util.tree_map_with_path(here, state.params)
  average = jax.tree_util.tree_map_with_path(here, state.ema)
  # A moment has the place of its parameter; what is none is whole.
  moments = rules.like(state.opt_state, state.params, params, None)
  sizes = jax.tree.leaves(moments, is_leaf=lambda size: size is None)
  optimizer = sum(
    leaf.size * leaf.dtype.itemsize if size is None else size
    for leaf, size in zip(jax.tree.leaves(state.opt_state), sizes, strict=True)
  )
  return {
    "parameters": sum(jax.tree.leaves(params)),
    "average": sum(jax.tree.leaves(average)),
    "optimizer": optimizer,
  }


def _ways(place: rules.Placement, shape: Shape) -> int:
  return math.prod(shape[axis] for axis in place.spec if axis is not None)


def of_gradients(found: Outline, shape: Shape) -> int:
  """Returns the bytes of the gradients on one device, in float32."""
  return sum(
    4 * math.prod(place.shape) // _ways(place, shape)
    for name, place in places(found, shape).items()
    if name not in found.built.frozen
  )


def of_layers(found: Outline, shape: Shape) -> int:
  """Returns the bytes of layers that are whole for a moment.

  Two that are gathered, one at work and one arriving, and the gradient of one,
  before each device has its part of the sum.
  """
  if shape["fsdp"] == 1:
    return 0
  stacks: dict[str, int] = {}
  dtype = found.built.experiment.optim.reduce_dtype
  summed = jnp.dtype(dtype).itemsize
  for name, place in places(found, shape).items():
    if is_stacked(name):
      layer = (2 * found.itemsize + summed) * math.prod(place.shape[1:])
      layer //= shape["tensor"] if "tensor" in place.spec else 1
      stack = name.split("/")[0]
      stacks[stack] = stacks.get(stack, 0) + layer
  return max(stacks.values(), default=0)


def is_stacked(name: str) -> bool:
  """Tells whether a parameter has a leading dim of layers, by its name."""
  return name.split("/")[0].endswith("blocks")


def of_activations(kept: Kept, model: Any, shape: Shape) -> int:
  """Returns the bytes per example of what one device keeps.

  Heads and the hidden width of the MLP are divided over `tensor`, tokens of the
  image over `context` and `ulysses`: they are known by their sizes.
  """
  total = 0
  for dims, size in kept:
    heads = (getattr(model, "heads", 0), getattr(model, "head_size", 0))
    if dims[-2:] == heads or dims[-1] == getattr(model, "mlp_width", 0):
      size //= shape["tensor"]
    if not _along_tokens(model).isdisjoint(dims):
      size //= shape["context"] * shape["ulysses"]
    total += size
  return total


def _along_tokens(model: Any) -> set[int]:
  """Returns the sizes of dims of tokens, of one example and of two as one."""
  if not hasattr(model, "grid"):
    return set()
  sizes = {math.prod(model.grid), tokens(model)}
  return sizes | {2 * size for size in sizes}


def of_scores(found: Outline, shape: Shape) -> int:
  """Returns the bytes per example of the attention matrix of one block.

  In float32 and in the dtype of the compute, and their gradients; none where
  attention is one kernel.
  """
  if not found.arithmetic.scores:
    return 0
  model = found.model
  entries = model.heads * tokens(model) ** 2
  entries //= shape["tensor"] * shape["context"] * shape["ulysses"]
  return 2 * (4 + found.itemsize) * entries


def examples(
  config: experiment.Experiment, shape: collections.abc.Mapping[str, int]
) -> int:
  """Returns how many examples one device sees at a time."""
  ways = shape["data"] * shape["fsdp"] * config.optim.accumulate
  return config.data.batch_size // ways


def depth(model: Any) -> int:
  """Returns the number of blocks of a model."""
  if hasattr(model, "double_depth"):
    return model.double_depth + model.single_depth
  return model.depth


def tokens(model: Any) -> int:
  """Returns how many tokens of text and image attend to each other."""
  text = conditions.text_length(model) if hasattr(model, "text_width") else 0
  return math.prod(model.grid) + text
