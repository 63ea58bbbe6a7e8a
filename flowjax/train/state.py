"""What training carries from step to step, and how it is born."""

import collections.abc
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from flowjax.parallel import mesh as meshes
from flowjax.parallel import rules


class TrainState(NamedTuple):
  """Everything that the next step depends on, besides its batch.

  `step` counts batches seen, `skipped` those whose update was not finite, and
  `skipped_in_row` how many of these came last.
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
) -> TrainState:
  """Returns the state before the first step."""
  params = init(jax.random.key(seed))
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    ema=jax.tree.map(jnp.copy, params),
    opt_state=optimizer.init(params),
    skipped=jnp.zeros((), jnp.int32),
    skipped_in_row=jnp.zeros((), jnp.int32),
  )


def shardings(
  abstract: TrainState, parameter_rules: rules.Rules, mesh: Mesh
) -> TrainState:
  """Returns where each leaf of the state lives: moments as their parameter."""
  whole = meshes.replicated(mesh)
  params = rules.shardings(parameter_rules, abstract.params, mesh)
  return TrainState(
    whole,
    params,
    params,
    rules.like(abstract.opt_state, abstract.params, params, whole),
    whole,
    whole,
  )
