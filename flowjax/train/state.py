"""What training carries from step to step, and how it is born."""

import collections.abc
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from flowjax.parallel import host, rules
from flowjax.parallel import mesh as meshes
from flowjax.train import freezing


class TrainState(NamedTuple):
  """Everything that the next step depends on, besides its batch.

  `step` counts batches seen, `skipped` those whose update was not finite, and
  `skipped_in_row` how many of these came last. What is frozen is among `params`
  alone.
  """

  # Arrays; or, of the same form, their shapes or their shardings.
  step: Any
  params: Any
  ema: Any
  opt_state: Any
  skipped: Any
  skipped_in_row: Any


def initial(
  init: collections.abc.Callable[[jax.Array], Any],
  optimizer: optax.GradientTransformation,
  seed: int,
  frozen: freezing.Names = freezing.NONE,
) -> TrainState:
  """Returns the state before the first step."""
  return begin(init(jax.random.key(seed)), optimizer, frozen)


def begin(
  params: Any,
  optimizer: optax.GradientTransformation,
  frozen: freezing.Names = freezing.NONE,
) -> TrainState:
  """Returns the state before the first step from these parameters."""
  trained, _ = freezing.split(params, frozen)
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    ema=jax.tree.map(jnp.copy, trained),
    opt_state=optimizer.init(trained),
    skipped=jnp.zeros((), jnp.int32),
    skipped_in_row=jnp.zeros((), jnp.int32),
  )


def averaged(state: TrainState) -> Any:
  """Returns the averaged parameters, with those that are frozen."""
  return freezing.overlaid(state.params, state.ema)


def shardings(
  abstract: TrainState,
  parameter_rules: rules.Rules,
  mesh: Mesh,
  offload: bool = False,
) -> TrainState:
  """Returns where each leaf of the state lives: moments as their parameter.

  With `offload` the moments live in the memory of the host.
  """
  whole = meshes.replicated(mesh)
  params = rules.shardings(parameter_rules, abstract.params, mesh)
  moments = jax.tree.map(host.sharding, params) if offload else params
  return TrainState(
    whole,
    params,
    rules.shardings(parameter_rules, abstract.ema, mesh),
    rules.like(abstract.opt_state, abstract.params, moments, whole),
    whole,
    whole,
  )
