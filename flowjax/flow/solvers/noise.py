"""The noise that a stochastic method draws."""

from collections.abc import Callable
from typing import Any

import jax

# draw(rng, number, x) -> a tree like x of independent normal numbers.
Draw = Callable[[jax.Array, jax.Array, Any], Any]


def normal(rng: jax.Array, number: jax.Array, x: Any) -> Any:
  """Returns the normal noise of step `number`: a function of it and of `rng`.

  So the noise of any step can be had again without running those before it.
  `rng` is one key, or one for each example: what an example then receives does
  not depend on the others.
  """
  if rng.ndim:
    return jax.vmap(normal, in_axes=(0, None, 0))(rng, number, x)
  leaves, structure = jax.tree.flatten(x)
  keys = jax.random.split(jax.random.fold_in(rng, number), len(leaves))
  return jax.tree.unflatten(
    structure,
    [
      jax.random.normal(key, leaf.shape, leaf.dtype)
      for key, leaf in zip(keys, leaves, strict=True)
    ],
  )


def required(rng: jax.Array | None, name: str) -> jax.Array:
  """Returns `rng`; raises ValueError where there is none."""
  if rng is None:
    raise ValueError(
      f"The solver {name!r} draws noise and needs a random key: pass rng="
      "jax.random.key(seed)."
    )
  return rng
