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
from flowjax.parallel import mesh as meshes
from flowjax.parallel import rules
from flowjax.train import experiment, optim
from flowjax.train import state as states


@dataclasses.dataclass(frozen=True)
class Parts:
  """The network, its mesh, its optimizer, and the state in the abstract.

  `abstract` is the state as shapes, dtypes and shardings: what a checkpoint is
  restored into, and what a step is compiled for. Nothing is allocated.
  """

  experiment: experiment.Experiment
  mesh: Mesh
  network: models.Network
  optimizer: optax.GradientTransformation
  rules: rules.Rules
  abstract: states.TrainState

  @property
  def parameters(self) -> int:
    """The number of parameters."""
    return sum(leaf.size for leaf in jax.tree.leaves(self.abstract.params))

  def lower_initial(self) -> jax.stages.Lowered:
    """Lowers what makes the first state, each device its own part of it."""
    make = functools.partial(
      states.initial, self.network.init, self.optimizer, self.experiment.seed
    )
    return jax.jit(make, out_shardings=shardings_of(self.abstract)).lower()

  def initial_state(self) -> states.TrainState:
    """Returns the first state; it is never whole on one device."""
    return self.lower_initial().compile()()


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
  network = models.build(config.model)
  if config.flow.uncertainty:
    network = models.with_uncertainty(network)
  with errors.naming("config.model"):
    abstract_params = jax.eval_shape(network.init, jax.random.key(0))
    with meshes.use(mesh):
      _trace(network, abstract_params, part)
  with errors.naming("config.optim.weight_decay_rules"):
    optimizer = optim.build(config.optim, config.steps, abstract_params)
  shapes = jax.eval_shape(
    lambda: states.initial(network.init, optimizer, config.seed)
  )
  table = rules.for_model(config.model)
  abstract = jax.tree.map(
    lambda leaf, sharding: jax.ShapeDtypeStruct(
      leaf.shape, leaf.dtype, sharding=sharding
    ),
    shapes,
    states.shardings(shapes, table, mesh),
  )
  return Parts(config, mesh, network, optimizer, table, abstract)


def _trace(network: models.Network, params: Any, batch: int) -> None:
  """Finds what the network cannot do on this mesh; nothing is computed."""
  config = network.config
  size = (batch, *config.image_size, config.channels)
  cond = {"label": jax.ShapeDtypeStruct((batch,), jnp.int32)}
  x = jax.ShapeDtypeStruct(size, jnp.float32)
  if network.forward is not None:
    jax.eval_shape(network.forward, params, x, cond)
    return
  t = jax.ShapeDtypeStruct((batch,), jnp.float32)
  jax.eval_shape(network.apply, params, x, t, cond)


def shardings_of(abstract: Any) -> Any:
  """Returns the shardings of a tree of ShapeDtypeStruct."""
  return jax.tree.map(lambda leaf: leaf.sharding, abstract)
