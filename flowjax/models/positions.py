"""Where a token stands in the image: rotary and sinusoidal positions."""

# Shape suffixes: B batch, T tokens (row-major over the grid of patches),
# N heads, H head size, F frequencies, D width.

import jax
import jax.numpy as jnp
import numpy as np


def sincos2d(rows: int, columns: int, width: int) -> np.ndarray:
  """Returns the fixed table [T, D] of DiT, first the column, then the row.

  Each has half the width: [sin(p w), cos(p w)] with w_i = 10000^(-i / (D/4))
  (arXiv:1706.03762, section 3.5, once per direction).
  """
  frequency_F = 10000.0 ** -(np.arange(width // 4) / (width // 4))

  def half(position_T):
    angle_TF = np.outer(position_T, frequency_F)
    return np.concatenate([np.sin(angle_TF), np.cos(angle_TF)], axis=1)

  row_T, column_T = _grid(rows, columns)
  table_TD = np.concatenate([half(column_T), half(row_T)], axis=1)
  return table_TD.astype(np.float32)


def rope2d(
  rows: int, columns: int, head_size: int, theta: float
) -> tuple[np.ndarray, np.ndarray]:
  """Returns the cosines and sines [T, H] by which `rotate` turns a head.

  The first half of the head turns with the row, the second with the column:
  in a half of size h, the pair (2i, 2i+1) by position * theta^(-2i / h)
  (arXiv:2104.09864, eq. 15, once per direction).
  """
  half = head_size // 2
  frequency_F = theta ** -(np.arange(0, half, 2) / half)
  angles = [
    np.outer(position, frequency_F) for position in _grid(rows, columns)
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
