"""Between an image and its row of patches.

By reshape and transpose; a convolution with stride p would be the same map,
and several times slower on a CPU.
"""

# Shape suffixes: B batch, H height, W width, C channels, T tokens (row-major
# over the grid of patches), P one flattened patch, D width of a token.

import jax
import numpy as np


def patchify(x_BHWC: jax.Array, patch: int) -> jax.Array:
  """Cuts images into patches, each flattened in the order (p_h, p_w, C)."""
  batch, height, width, channels = x_BHWC.shape
  rows, columns = height // patch, width // patch
  x = x_BHWC.reshape(batch, rows, patch, columns, patch, channels)
  x = x.transpose(0, 1, 3, 2, 4, 5)
  return x.reshape(batch, rows * columns, patch * patch * channels)


def unpatchify(
  x_BTP: jax.Array, rows: int, columns: int, patch: int
) -> jax.Array:
  """Puts images together from patches: the inverse of `patchify`."""
  batch = x_BTP.shape[0]
  x = x_BTP.reshape(batch, rows, columns, patch, patch, -1)
  x = x.transpose(0, 1, 3, 2, 4, 5)
  return x.reshape(batch, rows * patch, columns * patch, -1)


def with_context(kernel_PD: np.ndarray, patch: int, more: int) -> np.ndarray:
  """Returns the kernel of a patch that has `more` channels, which do nothing.

  A network that begins with it says what it said before, whatever its context.
  """
  width = kernel_PD.shape[-1]
  kernel = kernel_PD.reshape(patch, patch, -1, width)
  wider = np.pad(kernel, ((0, 0), (0, 0), (0, more), (0, 0)))
  return wider.reshape(-1, width)
