"""Statistics that run along with training, beside what is learned.

They are leaves of the parameters in `GROUPS`, so that they are saved, placed
and restored with these. What a loss gives such a leaf as its gradient is
what the step takes from it: old - new. So a loss stays pure, and the mean over
the parts of a batch is the statistic of the whole.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

CODEBOOK, STEPS = "running_codebook", "running_steps"
GROUPS = (CODEBOOK, STEPS)


def taking(leaf: jax.Array, change: jax.Array) -> jax.Array:
  """Returns zero, whose derivative with respect to `leaf` is `change`."""
  product = leaf * jax.lax.stop_gradient(change)
  total = jnp.sum(product)
  return total - jax.lax.stop_gradient(total)


def averaged(leaf: jax.Array, value: jax.Array, decay: float) -> jax.Array:
  """Returns zero; the step makes the leaf decay leaf + (1 - decay) value."""
  return taking(leaf, (1.0 - decay) * (leaf - value))


def counted(leaf: jax.Array) -> jax.Array:
  """Returns zero; the step adds one to the leaf."""
  return taking(leaf, -jnp.ones_like(leaf))


def learned(tree: Any) -> Any:
  """Returns the tree without what runs along."""
  if not (isinstance(tree, dict) and any(key in tree for key in GROUPS)):
    return tree
  return {key: tree[key] for key in tree if key not in GROUPS}


def beside(
  optimizer: optax.GradientTransformation, params: Any
) -> optax.GradientTransformation:
  """Returns the optimizer of what is learned, which takes the rest as it is."""
  if learned(params) is params:
    return optimizer

  def init(params):
    return optimizer.init(learned(params))

  def update(updates, state, params=None):
    found, state = optimizer.update(learned(updates), state, learned(params))
    moved = {key: updates[key] for key in GROUPS if key in updates}
    return {**found, **jax.tree.map(jnp.negative, moved)}, state

  return optax.GradientTransformation(init, update)
