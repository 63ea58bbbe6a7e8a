"""Sums of trees with scalar weights: all that a step is, given the weights."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from flowjax.flow import paths

# A number known when the program is traced, or one computed from the times.
Weight = float | jax.Array


def dtype(x: Any) -> Any:
  """Returns the dtype in which weights for x are computed."""
  return jnp.result_type(*(paths.wide(leaf) for leaf in jax.tree.leaves(x)))


def like(x: Any, value: Any) -> Any:
  """Casts what a network returned, perhaps in half precision, to that of x."""
  return jax.tree.map(lambda leaf, v: v.astype(leaf.dtype), x, value)


def combine(weights: Sequence[Weight], trees: Sequence[Any]) -> Any:
  """Returns sum_i weights_i trees_i, in the dtype of the trees."""

  def leaf(*leaves):
    terms = zip(weights, leaves, strict=True)
    return sum(jnp.asarray(w, leaf.dtype) * leaf for w, leaf in terms)

  return jax.tree.map(leaf, *trees)


def select(
  condition: jax.Array, weights: Sequence[Weight], others: Sequence[Weight]
) -> list[Weight]:
  """Returns `weights` where the condition holds, else `others`.

  The shorter list is filled up with zeros. Selecting among weights, not among
  states, keeps what is not selected (it may be infinite) out of the gradient.
  """
  length = max(len(weights), len(others))
  first, second = ([*w, *[0.0] * (length - len(w))] for w in (weights, others))
  pairs = zip(first, second, strict=True)
  return [jnp.where(condition, a, b) for a, b in pairs]
