"""Starting from images: a part of the way to noise, and pixels that are kept.

SDEdit (arXiv:2108.01073, algorithm 1) carries an image x a part of the way to
noise, to x_t = alpha(t) x + sigma(t) eps at a time t of the grid, and draws
from there: what is coarse in x stays, and what is fine is drawn anew.

Where a mask M is 0, an image is kept (same, algorithm 2): at every time the
field sees, in place of the state y that the solver carries,

  M y + (1 - M) (alpha(t) x + sigma(t) eps)

with one eps from the beginning to the end, which ends in x. All that a solver
does with a state it does pixel by pixel, but for what the field says; so this
is putting the known pixels back after every step, and before every stage of
it too, and it leaves the field as smooth as it was: a solver of any kind can
follow it, also one that chooses its own steps. M is 0 or 1, and grey counts
as what it is nearer to: a velocity at a blend is not one of the state that the
solver carries, so that what a grey pixel became would hang on the solver.
"""

# States have any shape that starts with the examples; a mask broadcasts.

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flowjax.flow import guidance, paths


class Edit(NamedTuple):
  """Images, the noise that each has on the way, and what is drawn anew.

  `mask` is above 0.5 where an image is drawn anew, and elsewhere it is kept;
  without one all of it is drawn anew.
  """

  image: jax.Array
  noise: jax.Array
  mask: jax.Array | None = None

  def at(self, path: paths.Path, t: jax.Array) -> jax.Array:
    """Returns the images at t, alpha x + sigma eps."""
    return path.interpolate(self.image, self.noise, t)

  def keep(self, x: jax.Array, known: jax.Array) -> jax.Array:
    """Returns x, with `known` where the images are kept."""
    if self.mask is None:
      return x
    return jnp.where(self.mask > 0.5, x, known.astype(x.dtype))


@dataclasses.dataclass(frozen=True, eq=False)
class Kept:
  """A field that sees the images of an edit where they are kept."""

  field: guidance.Guided
  edit: Edit
  path: paths.Path

  def __call__(self, x: jax.Array, t: jax.Array) -> guidance.Said:
    return self.field(self._seen(x, t), t)

  def remember(
    self, x: jax.Array, t: jax.Array, total: jax.Array | None
  ) -> tuple[guidance.Said, jax.Array | None]:
    """Returns what the field inside says, and what it remembers."""
    return self.field.remember(self._seen(x, t), t, total)

  def _seen(self, x, t):
    return self.edit.keep(x, self.edit.at(self.path, t))


def skipped(steps: int, strength: float) -> int:
  """Returns how many steps of a grid come before an edit of this strength.

  Of n steps the last strength * n are taken, rounded up: as the pipelines of
  diffusers for SD3 and FLUX count them, to the same float. Raises ValueError
  for a strength outside of (0, 1], or so small that no step is left.
  """
  if not 0.0 < strength <= 1.0:
    raise ValueError(
      f"strength = {strength} is the part of the way to noise that images are "
      "carried, above 0 and at most 1: 0.3 changes details, 0.6 is usual, and "
      "of 1, noise alone, nothing of an image is left."
    )
  count = int(max(steps - min(steps * strength, steps), 0))
  if count == steps:
    raise ValueError(
      f"strength = {strength} of {steps} steps leaves none: take at least "
      f"{1 / steps:.2g}."
    )
  return count


def begun(grid: np.ndarray, strength: float) -> np.ndarray:
  """Returns the part of a falling grid that an edit of a strength follows."""
  return grid[skipped(len(grid) - 1, strength) :]
