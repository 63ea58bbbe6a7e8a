"""Where a token stands in the image: rotary and sinusoidal positions.

Each kind is a table for all images of one size; or, of images that have a grid
of patches of their own, `_within` it, the same numbers picked out of a table of
single places.
"""

# Shape suffixes: B batch, T tokens (row-major over the grid of patches),
# N heads, H head size, F frequencies, D width, A axes, P places on one axis.

import jax
import jax.numpy as jnp
import numpy as np


def sincos2d(rows: int, columns: int, width: int) -> np.ndarray:
  """Returns the fixed table [T, D] of DiT, first the column, then the row.

  Each has half the width: [sin(p w), cos(p w)] with w_i = 10000^(-i / (D/4))
  (arXiv:1706.03762, section 3.5, once per direction).
  """
  return _sincos(np.arange(rows), np.arange(columns), width)


def sincos2d_centre(
  rows: int,
  columns: int,
  width: int,
  side: int,
  scale: float = 1.0,
  offset: float = 0.0,
) -> np.ndarray:
  """Returns the centre [T, D] of the `sincos2d` table of side x side places.

  SD3's way with images of any size: the middle of the image is the middle of
  the table, rounded up and left. The row or column p of the table stands at
  scale * (p - offset); for images of S pixels, of side s in patches, the paper
  has scale 256 / S and offset (side - s) / 2 (arXiv:2403.03206, section 5.3.2).
  """

  def places(count):
    return scale * ((side - count) // 2 + np.arange(count) - offset)

  return _sincos(places(rows), places(columns), width)


def sincos2d_within(grid_B2: jax.Array, tokens: int, width: int) -> jax.Array:
  """Returns `sincos2d` of each grid [B, T, D]; beyond it, nothing of use."""
  row_BT, column_BT = _places(grid_B2, tokens)
  half_PD = jnp.asarray(_half(np.arange(tokens), width))
  return jnp.concatenate([half_PD[column_BT], half_PD[row_BT]], axis=-1)


def sincos2d_centre_within(
  grid_B2: jax.Array,
  tokens: int,
  width: int,
  side: int,
  scale: float = 1.0,
  offset: float = 0.0,
) -> jax.Array:
  """Returns `sincos2d_centre` of each grid [B, T, D]."""
  half_PD = jnp.asarray(_half(scale * (np.arange(side) - offset), width))
  first_B2 = (side - grid_B2) // 2
  row_BT, column_BT = (
    jnp.clip(place_BT + first_B[:, None], 0, side - 1)
    for place_BT, first_B in zip(
      _places(grid_B2, tokens), jnp.unstack(first_B2, axis=1), strict=True
    )
  )
  return jnp.concatenate([half_PD[column_BT], half_PD[row_BT]], axis=-1)


def inside(grid_B2: jax.Array | None, tokens: int) -> jax.Array | None:
  """Returns which tokens [B, T] lie in the grid of their image; None: all."""
  if grid_B2 is None:
    return None
  return jnp.arange(tokens)[None] < jnp.prod(grid_B2, axis=1)[:, None]


def added(x_BTD: jax.Array, table_TD: jax.typing.ArrayLike) -> jax.Array:
  """Returns the tokens with their positions added to them, in float32.

  The table is that of all images, or has a dim of the batch before.
  """
  placed_BTD = x_BTD.astype(jnp.float32) + _of_batch(jnp.asarray(table_TD))
  return placed_BTD.astype(x_BTD.dtype)


def _sincos(row_R: np.ndarray, column_X: np.ndarray, width: int) -> np.ndarray:
  table_RXD = np.empty((len(row_R), len(column_X), width), np.float32)
  table_RXD[..., : width // 2] = _half(column_X, width)
  table_RXD[..., width // 2 :] = _half(row_R, width)[:, None]
  return table_RXD.reshape(-1, width)


def _half(place_P: np.ndarray, width: int) -> np.ndarray:
  """Returns the waves of places in one direction, half as wide."""
  frequency_F = 10000.0 ** -(np.arange(width // 4) / (width // 4))
  angle_PF = np.outer(place_P, frequency_F)
  waves = np.concatenate([np.sin(angle_PF), np.cos(angle_PF)], axis=1)
  return waves.astype(np.float32)


def _places(grid_B2: jax.Array, tokens: int) -> tuple[jax.Array, jax.Array]:
  """Returns row and column [B, T] of each token in the grid of its image."""
  columns_B1 = grid_B2[:, 1:]
  place_T = jnp.arange(tokens)[None]
  return place_T // columns_B1, place_T % columns_B1


def rope2d(
  rows: int,
  columns: int,
  head_size: int,
  theta: float,
  grid_B2: jax.Array | None = None,
) -> tuple[jax.typing.ArrayLike, jax.typing.ArrayLike]:
  """Returns the cosines and sines [T, H] by which `rotate` turns a head.

  The first half of the head turns with the row, the second with the column:
  in a half of size h, the pair (2i, 2i+1) by position * theta^(-2i / h)
  (arXiv:2104.09864, eq. 15, once per direction).
  """
  half = head_size // 2
  return rope_of_image(rows, columns, grid_B2, (half, half), theta)


def rope_axes(
  place_TA: np.ndarray, sizes: tuple[int, ...], theta: float
) -> tuple[np.ndarray, np.ndarray]:
  """Returns the cosines and sines [T, H] for tokens placed on several axes.

  A head is cut into one part for each axis, of the given sizes. In a part of
  size h the pair (2i, 2i+1) turns by place * theta^(-2i / h), so that a token
  at the origin is not turned at all (arXiv:2104.09864, eq. 15, per axis). In
  float64 until the end: at place 100 an angle needs more digits than float32
  has.
  """
  angles = [
    np.outer(place_T, theta ** -(np.arange(0, size, 2) / size))
    for place_T, size in zip(place_TA.T, sizes, strict=True)
  ]
  angle_TH = np.repeat(np.concatenate(angles, axis=1), 2, axis=1)
  return (
    np.cos(angle_TH).astype(np.float32),
    np.sin(angle_TH).astype(np.float32),
  )


def rope_of_image(
  rows: int,
  columns: int,
  grid_B2: jax.Array | None,
  sizes: tuple[int, ...],
  theta: float,
) -> tuple[jax.typing.ArrayLike, jax.typing.ArrayLike]:
  """Returns `rope_axes` of an image's tokens, at (..., row, column).

  They are a grid of so many rows and columns, or, where there is a grid for
  each image, in that. On axes before these two a token is at the origin.
  """
  if grid_B2 is not None:
    return _rope_within(grid_B2, rows * columns, sizes, theta)
  row_T, column_T = _grid(rows, columns)
  origin_T = np.zeros_like(row_T)
  place = [*[origin_T] * (len(sizes) - 2), row_T, column_T]
  return rope_axes(np.stack(place, axis=1), sizes, theta)


def _rope_within(
  grid_B2: jax.Array, tokens: int, sizes: tuple[int, ...], theta: float
) -> tuple[jax.Array, jax.Array]:
  """Returns the same [B, T, H] in a grid of each image."""
  row_BT, column_BT = _places(grid_B2, tokens)
  origin_BT = jnp.zeros_like(row_BT)
  place = [*[origin_BT] * (len(sizes) - 2), row_BT, column_BT]
  found = []
  for place_BT, size in zip(place, sizes, strict=True):
    tables = rope_axes(np.arange(tokens)[:, None], (size,), theta)
    found.append([jnp.asarray(table_PH)[place_BT] for table_PH in tables])
  cos, sin = (
    jnp.concatenate(each, axis=-1) for each in zip(*found, strict=True)
  )
  return cos, sin


def rotate(
  x_BTNH: jax.Array, cos_TH: jax.Array, sin_TH: jax.Array
) -> jax.Array:
  """Turns each pair (2i, 2i+1) of every head, in float32.

  (a, b) -> (a cos - b sin, b cos + a sin). Cosines and sines are those of all
  images, or have a dim of the batch before.
  """
  x = x_BTNH.astype(jnp.float32)
  pairs = x.reshape(*x.shape[:-1], -1, 2)
  quarter_turn = jnp.stack([-pairs[..., 1], pairs[..., 0]], axis=-1)
  y = (
    x * _of_batch(cos_TH)[:, :, None]
    + quarter_turn.reshape(x.shape) * _of_batch(sin_TH)[:, :, None]
  )
  return y.astype(x_BTNH.dtype)


def _of_batch(table: jax.Array) -> jax.Array:
  """Returns a table with a dim of the batch, if it has none."""
  return table[None] if table.ndim == 2 else table


def _grid(rows: int, columns: int) -> tuple[np.ndarray, np.ndarray]:
  """Returns row and column of each token."""
  row_T, column_T = np.divmod(np.arange(rows * columns), columns)
  return row_T, column_T
