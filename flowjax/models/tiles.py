"""Large images in tiles that overlap.

Memory is then that of a tile. A tile sees no more than itself, so that the
result differs from that of the whole; where two overlap, one fades into the
other. Tiles begin every (1 - overlap) of their size, and the last are what is
left, as in diffusers.
"""

# Shape suffixes: B batch, H height, W width, C channels.

import collections.abc
from typing import Any

import jax
import jax.numpy as jnp

Map = collections.abc.Callable[[jax.Array], jax.Array]

OVERLAP = 0.25


def tiled(
  function: Map,
  x_BHWC: jax.Array,
  *,
  tile: int,
  tile_out: int,
  overlap: float = OVERLAP,
) -> jax.Array:
  """Returns `function(x)` of tiles of a side, which become `tile_out` wide.

  The function is called once for each tile; jit it, not this: there are four
  shapes at most.
  """
  if not 0.0 <= overlap < 1.0:
    raise ValueError(f"overlap={overlap} is the part of a tile: 0 to below 1.")
  height, width = x_BHWC.shape[1:3]
  if max(height, width) <= tile:
    return function(x_BHWC)
  step = int(tile * (1.0 - overlap))
  if step < 1:
    raise ValueError(
      f"overlap={overlap} of a tile of {tile} leaves nothing between the "
      "beginnings of two: take a larger tile, or less."
    )
  found = [
    [
      function(x_BHWC[:, i : i + tile, j : j + tile])
      for j in range(0, width, step)
    ]
    for i in range(0, height, step)
  ]
  fade = int(tile_out * overlap)
  return _joined(found, fade, tile_out - fade)


def decode(
  network: Any, function: Map, z_BHWC: jax.Array, **options
) -> jax.Array:
  """Decodes latents in tiles of the size that a config was trained at."""
  return tiled(
    function,
    z_BHWC,
    tile=network.latent_size[0],
    tile_out=network.image_size[0],
    **options,
  )


def _joined(rows: list[list[jax.Array]], fade: int, kept: int) -> jax.Array:
  """Returns one array of tiles, each faded into from above and the left."""
  above: list[jax.Array] = []
  strips = []
  for row in rows:
    done: list[jax.Array] = []
    for j, part in enumerate(row):
      if above:
        part = _faded(above[j], part, fade, 1)
      if done:
        part = _faded(done[-1], part, fade, 2)
      done.append(part)
    above = done
    cut = [part[:, :kept, :kept] for part in done]
    strips.append(jnp.concatenate(cut, axis=2))
  return jnp.concatenate(strips, axis=1)


def _faded(
  before: jax.Array, part: jax.Array, fade: int, axis: int
) -> jax.Array:
  """Returns a tile that begins as the one before it ends."""
  fade = min(before.shape[axis], part.shape[axis], fade)
  if not fade:
    return part
  shape = [1] * part.ndim
  shape[axis] = fade
  share = (jnp.arange(fade) / fade).astype(part.dtype).reshape(shape)
  end = jax.lax.slice_in_dim(
    before, before.shape[axis] - fade, before.shape[axis], axis=axis
  )
  start, rest = jnp.split(part, [fade], axis=axis)
  mixed = end * (1.0 - share) + start * share
  return jnp.concatenate([mixed, rest], axis=axis)
