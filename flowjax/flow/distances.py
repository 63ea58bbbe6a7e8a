"""Distances: how far a network's output is from its target, per example.

A distance is `distance(value, target, region=None) -> loss_B`. The target is
float32, and so is all that follows, whatever dtype the network ran in. A region
is 1 where an example has values and 0 where it has none: it has their shape,
but that its channels are 1, and dims may be 1 that are alike along it. The
distance is then that of the values which are there.
"""

# Shape suffixes: B batch. Values have any shape that starts with B and ends
# with the channels.

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from flowjax.flow import names, paths

Distance = Callable[..., jax.Array]


def l2() -> Distance:
  """Builds the mean of the squared residual."""

  def distance(value, target, region=None):
    return _mean(jnp.square(value - target), region)

  return distance


def pseudo_huber(c: float = 1e-3, *, of: str = "elements") -> Distance:
  """Builds sqrt(r^2 + c^2) - c: quadratic below c, the absolute value above.

  `of="elements"` takes it of each number and averages (arXiv:2410.07303).
  `of="examples"` takes it of each example's root mean square r, which is
  arXiv:2310.14189, eq. 8, divided by sqrt(D), for c = 0.00054 sqrt(D) there and
  c = 0.00054 here, D being the numbers of an example.
  """
  if not 0.0 < c < math.inf:
    raise ValueError(
      f"The constant c of pseudo_huber must be above 0, not {c}: at 0 the "
      "slope jumps where the residual vanishes. 1e-3 is usual."
    )
  if of not in ("elements", "examples"):
    raise ValueError(
      f"pseudo_huber is taken of 'elements' or of 'examples', not of {of!r}."
    )

  def huber(squared):
    # Without the difference of nearly equal numbers: (a - c)(a + c) = r^2.
    return squared / (jnp.sqrt(squared + c**2) + c)

  def distance(value, target, region=None):
    squared = jnp.square(value - target)
    if of == "elements":
      return _mean(huber(squared), region)
    return huber(_mean(squared, region))

  return distance


def l2_cosine(scale: float = 1.0, *, floor: float = 1e-3) -> Distance:
  """Builds l2 + scale (1 - cos), the angle being that between the channels.

  The velocity's direction counts for itself (arXiv:2501.01423, section 4).
  Below the norm `floor` the cosine is taken as linear, so that a network that
  starts at exactly 0 has a gradient, of size 1 / floor at most.
  """
  if not (0.0 <= scale < math.inf and 0.0 < floor < math.inf):
    raise ValueError(
      f"l2_cosine needs scale >= 0 and floor > 0, not {scale} and {floor}; "
      "1.0 and 1e-3 are the defaults."
    )

  def direction(a):
    squared = jnp.sum(jnp.square(a), axis=-1, keepdims=True)
    return a * jax.lax.rsqrt(jnp.maximum(squared, floor**2))

  def distance(value, target, region=None):
    value = paths.wide(value)
    cosine = jnp.sum(
      direction(value) * direction(target), axis=-1, keepdims=True
    )
    far = l2()(value, target, region)
    return far + scale * (1.0 - _mean(cosine, region))

  return distance


# Factories of distances, by the name that a config gives them.
DISTANCES: dict[str, Callable[..., Distance]] = {
  "l2": l2,
  "pseudo_huber": pseudo_huber,
  "l2_cosine": l2_cosine,
}


def build(name: str, **options: Any) -> Distance:
  """Builds the distance `name` of `DISTANCES` with the options that it takes.

  Raises ValueError for an unknown name or option, or a value out of range.
  """
  return names.choose("distance", DISTANCES, name, options)(**options)


def _mean(a: jax.Array, region: jax.Array | None) -> jax.Array:
  axes = tuple(range(1, a.ndim))
  if region is None:
    return jnp.mean(a, axis=axes)
  # Chosen, not multiplied: where there is nothing, anything may be.
  kept = jnp.mean(jnp.where(region > 0, a, 0.0), axis=axes)
  return kept / jnp.mean(region, axis=axes)
