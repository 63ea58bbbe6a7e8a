"""What a command needs of an experiment, put together in one place."""

import collections.abc
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from flowjax import errors, models
from flowjax.models import adversary, lora, perceptual
from flowjax.parallel import host, room, rules
from flowjax.parallel import mesh as meshes
from flowjax.train import (
  aspects,
  experiment,
  freezing,
  manifest,
  optim,
  running,
)
from flowjax.train import perceptual as weights_of_lpips
from flowjax.train import state as states

# Parameters whose arithmetic is no part of a network's own.
_UNCOUNTED = (
  "uncertainty",
  adversary.GROUP,
  perceptual.GROUP,
  *running.GROUPS,
)


@dataclasses.dataclass(frozen=True)
class Parts:
  """The network, its mesh, its optimizer, and the state in the abstract.

  `abstract` is the state as shapes, dtypes and shardings: what a checkpoint is
  restored into, and what a step is compiled for. Nothing is allocated.
  `frozen` are the names of the parameters that are not trained.
  """

  experiment: experiment.Experiment
  mesh: Mesh
  network: models.Network
  optimizer: optax.GradientTransformation
  rules: rules.Rules
  abstract: states.TrainState
  frozen: freezing.Names

  @property
  def parameters(self) -> int:
    """The number of parameters."""
    return sum(leaf.size for leaf in jax.tree.leaves(self.abstract.params))

  @property
  def flops(self) -> int:
    """The arithmetic of a training step per image.

    The gradient with respect to activations costs as much as the pass forward,
    and that with respect to kernels again as much; of a frozen kernel there is
    none. What an adapter multiplies is its own. So it is 3 x forward, or
    forward x (2 + (trained + 3 x adapters) / kernels), in numbers of weights:
    a little less than it is, as attention has two gradients always.
    """
    sizes = {
      name: leaf.size
      for name, leaf in manifest.named_leaves(self.abstract.params).items()
      if leaf.ndim > 1 and name.partition("/")[0] not in _UNCOUNTED
    }
    adapters = {name for name in sizes if name.startswith(f"{lora.GROUP}/")}
    base = sizes.keys() - adapters
    kernels, trained, beside = (
      sum(sizes[name] for name in names)
      for names in (base, base - self.frozen, adapters)
    )
    weights = 2 * kernels + trained + 3 * beside
    return self.network.flops * weights // kernels

  def lower_initial(self) -> jax.stages.Lowered:
    """Lowers what makes the first state, each device its own part of it."""
    make = functools.partial(
      states.initial,
      self.network.init,
      self.optimizer,
      self.experiment.seed,
      self.frozen,
    )
    return jax.jit(make, out_shardings=shardings_of(self.abstract)).lower()

  def initial_state(self) -> states.TrainState:
    """Returns the first state; it is never whole on one device.

    What is published and stays as it is comes from its file.
    """
    published = self.published()
    program = self.lower_initial().compile()
    room.require(program)
    state = program()
    if not published:
      return state
    return state._replace(params={**state.params, **published})

  def published(self) -> dict[str, Any]:
    """Returns parameters that are not drawn, but read from their file."""
    wanted = self.experiment.reconstruction.perceptual
    if not wanted.weight:
      return {}
    placed = jax.tree.map(
      lambda leaf, like: jax.make_array_from_callback(
        leaf.shape, like.sharding, leaf.__getitem__
      ),
      weights_of_lpips.read(wanted.file),
      self.abstract.params[perceptual.GROUP],
    )
    return {perceptual.GROUP: placed}


def build(
  config: experiment.Experiment,
  devices: collections.abc.Sequence | None = None,
) -> Parts:
  """Puts an experiment together on `devices`, by default all of them.

  Raises UserError if the mesh does not fit them, if it does not divide the
  batch or the model, or if a parameter has no rule.
  """
  part = config.data.batch_size // config.optim.accumulate
  name = "data.batch_size" + " / optim.accumulate" * (
    config.optim.accumulate > 1
  )
  with errors.naming("config.mesh"):
    mesh = meshes.build(config.mesh, devices)
    meshes.check_batch(part, mesh, name)
  check_divides(config.model, mesh.shape)
  _check_host(config, mesh)
  network = config.network()
  if config.lora.rank:
    with errors.naming("config.lora"):
      network = models.with_lora(network, config.lora)
  tokenizer = config.data.build_tokenizer()
  if tokenizer and not config.is_autoencoder:
    token_BL, mask_BL = tokenizer([""])
    with errors.naming("config.text"):
      network = models.with_text_encoder(
        network, config.text, (token_BL[0], mask_BL[0])
      )
  if config.layout.classes:
    with errors.naming("config.layout"):
      network = models.with_layout_encoder(network, config.layout)
  if config.embedding.size:
    with errors.naming("config.embedding"):
      network = models.with_image_encoder(network, config.embedding)
  if config.flow.uncertainty:
    network = models.with_uncertainty(network)
  with errors.naming("config.lora" if config.lora.rank else "config.model"):
    abstract_params = jax.eval_shape(network.init, jax.random.key(0))
  with errors.naming("config.model"):
    with meshes.use(mesh):
      for size in aspects.sizes(config.data):
        _trace(network, abstract_params, part, size)
  with errors.naming("config.optim.freeze"):
    frozen = freezing.names(_patterns(config), abstract_params)
  trained, _ = freezing.split(abstract_params, frozen)
  with errors.naming("config.optim.weight_decay_rules"):
    optimizer = optim.build(config.optim, config.steps, trained)
  shapes = jax.eval_shape(
    lambda params: states.begin(params, optimizer, frozen), abstract_params
  )
  table = rules.for_model(config.model)
  if config.text.vocabulary or config.layout.classes or config.embedding.size:
    table = (*rules.ENCODER, *table)
  if config.lora.rank:
    factors = lora.factors(config.lora, abstract_params)
    table = (*rules.of_factors(table, factors), *table)
  abstract = jax.tree.map(
    lambda leaf, sharding: jax.ShapeDtypeStruct(
      leaf.shape, leaf.dtype, sharding=sharding
    ),
    shapes,
    states.shardings(shapes, table, mesh, config.optim.offload),
  )
  return Parts(config, mesh, network, optimizer, table, abstract, frozen)


def check_divides(model: Any, shape: collections.abc.Mapping[str, int]) -> None:
  """Refuses a mesh of that shape that does not divide a model's parts."""
  if model.name in models.AUTOENCODERS:
    for axis in set(shape) - {"data", "fsdp"}:
      if shape[axis] > 1:
        raise errors.UserError(
          f"config.mesh.{axis} = {shape[axis]}: the devices of that axis would "
          "all compute the same of an autoencoder. Leave it at 1, and set "
          "config.mesh.fsdp or config.mesh.data."
        )
  if not hasattr(model, "heads"):
    return
  tensor = shape["tensor"]
  for name, size in (("heads", model.heads), ("mlp_width", model.mlp_width)):
    if size % tensor:
      fits = [n for n in range(1, size + 1) if size % n == 0][:12]
      raise errors.UserError(
        f"config.mesh.tensor = {tensor} does not divide the model's {name} = "
        f"{size}. Sizes that do: {', '.join(map(str, fits))}."
      )


def _check_host(config: experiment.Experiment, mesh: Mesh) -> None:
  """Refuses to keep anything in the host's memory where devices cannot."""
  remat = getattr(config.model, "remat", "none")
  if remat in models.OFFLOADING:
    with errors.naming("config.model"):
      host.require(mesh, f"remat = {remat!r}")
  if config.optim.offload:
    with errors.naming("config.optim"):
      host.require(mesh, "offload = True")


def _patterns(config: experiment.Experiment) -> tuple[str, ...]:
  """Returns what is frozen: with adapters, all but these."""
  if not config.lora.rank:
    return (*config.optim.freeze, *config.reconstruction.frozen)
  return (*config.optim.freeze, rf"(?!{lora.GROUP}/).*")


def _trace(
  network: models.Network, params: Any, batch: int, size: aspects.Size
) -> None:
  """Finds what the network cannot do on this mesh; nothing is computed."""
  cond = jax.eval_shape(lambda: network.example(batch))
  for key in ("context", "original"):  # As large as the image.
    if key in cond:
      shape = (batch, *size, cond[key].shape[-1])
      cond[key] = jax.ShapeDtypeStruct(shape, cond[key].dtype)
  x = jax.ShapeDtypeStruct((batch, *size, network.config.channels), jnp.float32)
  if network.forward is not None:
    jax.eval_shape(network.forward, params, x, cond)
    return
  if network.reconstruct is not None:
    jax.eval_shape(network.reconstruct, params, x, jax.random.key(0))
    return
  t = jax.ShapeDtypeStruct((batch,), jnp.float32)
  jax.eval_shape(network.apply, params, x, t, cond)


def shardings_of(abstract: Any) -> Any:
  """Returns the shardings of a tree of ShapeDtypeStruct."""
  return jax.tree.map(lambda leaf: leaf.sharding, abstract)
