"""Images of any aspect on canvases of one shape: one program serves them all.

A canvas of T tokens is T p pixels high and p wide: the patches of an image, row
by row, one under the other, and below them zeros.
"""

# Shape suffixes: B batch, H height, W width, C channels.

import math
from typing import Any

import numpy as np

from flowjax.data import config as config_lib

# What of a batch is as large as the image.
IMAGES = ("image", "source", "mean", "log_variance")


def of(batch: dict[str, Any], config: config_lib.DataConfig) -> dict[str, Any]:
  """Returns a batch on canvases, if the config has any.

  "grid" [B, 2] says how many rows and columns of patches each image has.
  """
  if not config.padded_patch:
    return batch
  patch, tokens = config.padded_patch, most_tokens(config)
  sizes = {batch[key].shape[:3] for key in IMAGES if key in batch}
  ((count, height, width),) = sizes
  grid = np.array([height // patch, width // patch], np.int32)
  placed = {
    key: to_canvas(leaf, patch, tokens) if key in IMAGES else leaf
    for key, leaf in batch.items()
  }
  return {**placed, "grid": np.repeat(grid[None], count, axis=0)}


def most_tokens(config: config_lib.DataConfig) -> int:
  """Returns the most patches that an image of any bucket has."""
  return max(map(math.prod, config.buckets)) // config.padded_patch**2


def to_canvas(image_BHWC: np.ndarray, patch: int, tokens: int) -> np.ndarray:
  """Returns images as canvases [B, T P, P, C]."""
  batch, height, width, channels = image_BHWC.shape
  rows, columns = height // patch, width // patch
  image = image_BHWC.reshape(batch, rows, patch, columns, patch, channels)
  canvas = image.transpose(0, 1, 3, 2, 4, 5).reshape(batch, -1, patch, channels)
  missing = (tokens - rows * columns) * patch
  return np.pad(canvas, ((0, 0), (0, missing), (0, 0), (0, 0)))
