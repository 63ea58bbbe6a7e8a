"""Guidance: a conditional velocity becomes a field that a solver can follow."""

# Shape suffixes: B batch. x has any shape that starts with B.

import numbers
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from flowjax.flow import paths

# field(x, t) -> v, where t is one number or one per example.
Field = Callable[[jax.Array, jax.Array], jax.Array]


def classifier_free(
  velocity: Callable[[jax.Array, jax.Array, Any], jax.Array],
  cond: Any,
  uncond: Any,
  *,
  scale: float | jax.Array,
  interval: tuple[float, float] = (0.0, 1.0),
) -> Field:
  """Returns the field v = v_u + scale (v_c - v_u) of `velocity(x, t_B, cond)`.

  Classifier-free guidance (arXiv:2207.12598, eq. 6, with scale = 1 + w), where
  interval[0] <= t <= interval[1] (arXiv:2404.07724); elsewhere the field is
  v_c. `cond` and `uncond` are trees of the same structure, one row per example.

  Where any example is guided, one call sees [cond; uncond]; where none is, one
  call sees cond alone. The choice is made while running, so a whole sampler
  pays for the interval only. Two choices are known beforehand and leave one
  program to compile: an interval that is all of [0, 1], and a scale of 1, which
  is the conditional field itself.
  """
  low, high = interval
  if low > high:
    raise ValueError(
      f"Guidance acts where {low} <= t <= {high}, which is nowhere; write the "
      "interval as (low, high), t = 0 being data and t = 1 noise."
    )

  def conditional(x, t_B):
    return velocity(x, t_B, cond)

  def both(x, t_B):
    twice = jax.tree.map(_stack, (x, t_B, cond), (x, t_B, uncond))
    v_cond, v_uncond = jnp.split(velocity(*twice), 2)
    return v_cond, v_uncond

  def guided(x, t_B, inside):
    v_cond, v_uncond = map(paths.wide, both(x, t_B))
    v = v_uncond + paths.over(scale, x) * (v_cond - v_uncond)
    return jnp.where(paths.over(inside, x), v, v_cond)

  def plain(x, t_B, inside):
    return paths.wide(conditional(x, t_B))

  def field(x, t):
    t = jnp.asarray(t)
    t_B = jnp.broadcast_to(t, x.shape[:1])
    if _is_one(scale):
      return conditional(x, t_B)
    inside = (low <= t) & (t <= high)
    if low <= 0.0 and 1.0 <= high:
      return guided(x, t_B, inside)
    return jax.lax.cond(jnp.any(inside), guided, plain, x, t_B, inside)

  return field


def _stack(a: jax.Array, b: jax.Array) -> jax.Array:
  return jnp.concatenate([a, b])


def _is_one(scale: float | jax.Array) -> bool:
  # An array may be traced, and then its value is not known yet.
  return isinstance(scale, numbers.Number) and bool(scale == 1)
