"""Where a token stands in the image: rotary and sinusoidal positions."""

# Shape suffixes: B batch, T tokens (row-major over the patch grid), N heads,
# H head size, D width, F frequencies.

import jax
import jax.numpy as jnp
import numpy as np


def grid(rows: int, columns: int) -> tuple[np.ndarray, np.ndarray]:
  """Returns row and column of each token, row-major."""
  row, column = np.divmod(np.arange(rows * columns), columns)
  return row, column


def sincos2d(rows: int, columns: int, width: int) -> np.ndarray:
  """Returns DiT's fixed table [T, D]: one half for the column, one for the row.

  Each half is [sin(p w), cos(p w)] with w_i = 10000^(-i / (D/4))
  (arXiv:2212.09748, following arXiv:1706.03762, section 3.5).
  """
  frequency_F = 10000.0 ** -(np.arange(width // 4) / (width // 4))

  def half(position_T):
    angle_TF = np.outer(position_T, frequency_F)
    return np.concatenate([np.sin(angle_TF), np.cos(angle_TF)], axis=1)

  row_T, column_T = grid(rows, columns)
  table_TD = np.concatenate([half(column_T), half(row_T)], axis=1)
  return table_TD.astype(np.float32)


def rope2d(
  rows: int, columns: int, head_size: int, theta: float
) -> tuple[np.ndarray, np.ndarray]:
  """Returns cos and sin [T, H] by which `rotate` turns each head.

  The first half of a head turns with the row, the second with the column. In
  each half of size h the pair (2i, 2i+1) turns by position * theta^(-2i / h)
  (arXiv:2104.09864, eq. 34, once per direction).
  """
  half = head_size // 2
  frequency_F = theta ** -(np.arange(0, half, 2) / half)
  row_T, column_T = grid(rows, columns)
  angle = np.concatenate(
    [np.outer(row_T, frequency_F), np.outer(column_T, frequency_F)], axis=1
  )
  angle_TH = np.repeat(angle, 2, axis=1)
  return (
    np.cos(angle_TH).astype(np.float32),
    np.sin(angle_TH).astype(np.float32),
  )


def rotate(
  x_BTNH: jax.Array, cos_TH: jax.Array, sin_TH: jax.Array
) -> jax.Array:
  """Turns the pairs (2i, 2i+1) of each head, in float32."""
  x = x_BTNH.astype(jnp.float32)
  pairs = x.reshape(*x.shape[:-1], -1, 2)
  turned = jnp.stack([-pairs[..., 1], pairs[..., 0]], axis=-1).reshape(x.shape)
  y = x * cos_TH[None, :, None] + turned * sin_TH[None, :, None]
  return y.astype(x_BTNH.dtype)
