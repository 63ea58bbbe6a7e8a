"""Where a token stands in the image: rotary and sinusoidal positions."""

# Shape suffixes: B batch, T tokens (row-major over the grid of patches),
# N heads, H head size, F frequencies, D width, A axes.

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


def added(x_BTD: jax.Array, table_TD: jax.typing.ArrayLike) -> jax.Array:
  """Returns the tokens with their positions added to them, in float32."""
  placed_BTD = x_BTD.astype(jnp.float32) + jnp.asarray(table_TD)[None]
  return placed_BTD.astype(x_BTD.dtype)


def _sincos(row_R: np.ndarray, column_X: np.ndarray, width: int) -> np.ndarray:
  frequency_F = 10000.0 ** -(np.arange(width // 4) / (width // 4))

  def half(position):
    angle = np.outer(position, frequency_F)
    waves = np.concatenate([np.sin(angle), np.cos(angle)], axis=1)
    return waves.astype(np.float32)

  table_RXD = np.empty((len(row_R), len(column_X), width), np.float32)
  table_RXD[..., : width // 2] = half(column_X)
  table_RXD[..., width // 2 :] = half(row_R)[:, None]
  return table_RXD.reshape(-1, width)


def rope2d(
  rows: int, columns: int, head_size: int, theta: float
) -> tuple[np.ndarray, np.ndarray]:
  """Returns the cosines and sines [T, H] by which `rotate` turns a head.

  The first half of the head turns with the row, the second with the column:
  in a half of size h, the pair (2i, 2i+1) by position * theta^(-2i / h)
  (arXiv:2104.09864, eq. 15, once per direction).
  """
  half = head_size // 2
  place_TA = np.stack(_grid(rows, columns), axis=1)
  return rope_axes(place_TA, (half, half), theta)


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


def rotate(
  x_BTNH: jax.Array, cos_TH: jax.Array, sin_TH: jax.Array
) -> jax.Array:
  """Turns each pair (2i, 2i+1) of every head, in float32.

  (a, b) -> (a cos - b sin, b cos + a sin).
  """
  x = x_BTNH.astype(jnp.float32)
  pairs = x.reshape(*x.shape[:-1], -1, 2)
  quarter_turn = jnp.stack([-pairs[..., 1], pairs[..., 0]], axis=-1)
  y = (
    x * cos_TH[None, :, None]
    + quarter_turn.reshape(x.shape) * sin_TH[None, :, None]
  )
  return y.astype(x_BTNH.dtype)


def _grid(rows: int, columns: int) -> tuple[np.ndarray, np.ndarray]:
  """Returns row and column of each token."""
  row_T, column_T = np.divmod(np.arange(rows * columns), columns)
  return row_T, column_T
