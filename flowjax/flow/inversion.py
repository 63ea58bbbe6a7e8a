"""Inverses of rising functions that have none in closed form."""

# Shape suffixes: N nodes of a table; what has none has any shape.

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np


def bisect(
  rising: Callable[[jax.Array], jax.Array],
  value: jax.Array,
  low: float,
  high: float,
) -> jax.Array:
  """Solves rising(x) = value between low and high, to the last bits."""

  def halve(_, ends):
    low, high = ends
    middle = 0.5 * (low + high)
    below = rising(middle) < value
    return jnp.where(below, middle, low), jnp.where(below, high, middle)

  ends = jnp.full_like(value, low), jnp.full_like(value, high)
  halvings = jnp.finfo(value.dtype).nmant + 12
  below, above = jax.lax.fori_loop(0, halvings, halve, ends)
  return 0.5 * (below + above)


def interpolate(
  x: jax.Array,
  low: float,
  high: float,
  values_N: np.ndarray,
  slopes_N: np.ndarray,
) -> jax.Array:
  """Interpolates by cubics between even nodes of known value and slope.

  Its error falls with the fourth power of their distance, that of its
  derivative with the third. Beyond the nodes the end values hold.
  """
  width = (high - low) / (len(values_N) - 1)
  position = jnp.clip((x - low) / width, 0.0, len(values_N) - 1.0)
  i = jnp.minimum(position.astype(jnp.int32), len(values_N) - 2)
  s = position - i
  value_N = jnp.asarray(values_N, x.dtype)
  slope_N = jnp.asarray(slopes_N * width, x.dtype)
  rise = value_N[i + 1] - value_N[i]
  bend = (1.0 - s) * (slope_N[i] - rise) - s * (slope_N[i + 1] - rise)
  return value_N[i] + s * (rise + (1.0 - s) * bend)
