"""LPIPS: how far images are from each other in the features of a VGG-16.

  d(x, y) = sum_l mean_hw sum_c w_lc (x'_lhwc - y'_lhwc)^2,

x'_l being the features of layer l, of unit length at each position
(arXiv:1801.03924, eq. 1). VGG-16 (arXiv:1409.1556) and w are as published: they
are frozen, and come from a file (train/perceptual.py).
"""

# Shape suffixes: B batch, H height, W width, C channels.

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flowjax.ops import axes

GROUP = "perceptual"
# Widths of the convolutions, between poolings; the features are the last each.
STAGES = ((64,) * 2, (128,) * 2, (256,) * 3, (512,) * 3, (512,) * 3)
EPSILON = 1e-10
# Images in [-1, 1] as the network was trained on them.
SHIFT = np.array([-0.030, -0.088, -0.188], np.float32)
SCALE = np.array([0.458, 0.448, 0.450], np.float32)


def shapes() -> dict[str, tuple[int, ...]]:
  """Returns the shape of each parameter by name, kernels [3, 3, in, out]."""
  found: dict[str, tuple[int, ...]] = {}
  into = 3
  for i, stage in enumerate(STAGES):
    for j, width in enumerate(stage):
      found[f"stage_{i}/conv_{j}/kernel"] = (3, 3, into, width)
      found[f"stage_{i}/conv_{j}/bias"] = (width,)
      into = width
    found[f"stage_{i}/head/scale"] = (into,)
  return found


def init() -> dict[str, Any]:
  """Returns zeros in the place of what a file holds."""
  params: dict[str, Any] = {}
  for name, shape in shapes().items():
    stage, layer, leaf = name.split("/")
    node = params.setdefault(stage, {}).setdefault(layer, {})
    node[leaf] = jnp.zeros(shape, jnp.float32)
  return params


def distance(
  params: dict[str, Any], x_BHWC: jax.Array, y_BHWC: jax.Array
) -> jax.Array:
  """Returns d(x, y) of images in [-1, 1], [B]; grey ones are made of three."""
  both = jnp.concatenate([x_BHWC, y_BHWC]).astype(jnp.float32)
  if both.shape[-1] == 1:
    both = jnp.broadcast_to(both, (*both.shape[:-1], 3))
  h = (both - SHIFT[None, None, None]) / SCALE[None, None, None]
  total_B = jnp.zeros(len(x_BHWC), jnp.float32)
  for i, stage in enumerate(STAGES):
    layer = params[f"stage_{i}"]
    h = _pooled(h) if i else h
    for j in range(len(stage)):
      h = jax.nn.relu(_conv(layer[f"conv_{j}"], h))
    length = jnp.sqrt(jnp.sum(jnp.square(h), axis=-1, keepdims=True) + 1e-20)
    unit_x, unit_y = jnp.split(h / (length + EPSILON), 2)
    square_BHWC = jnp.square(unit_x - unit_y)
    weighted_BHWC = square_BHWC * layer["head"]["scale"][None, None, None]
    total_B += jnp.mean(jnp.sum(weighted_BHWC, axis=-1), axis=(1, 2))
  return total_B


def _conv(layer: dict[str, jax.Array], x_BHWC: jax.Array) -> jax.Array:
  y_BHWC = jax.lax.conv_general_dilated(
    x_BHWC,
    axes.name(layer["kernel"], None, None, None, None),
    (1, 1),
    ((1, 1), (1, 1)),
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
  )
  y_BHWC = axes.name(y_BHWC, "batch", None, None, None)
  return y_BHWC + layer["bias"][None, None, None]


def _pooled(x_BHWC: jax.Array) -> jax.Array:
  """Returns the largest of each two by two pixels."""
  window = (1, 2, 2, 1)
  return jax.lax.reduce_window(
    x_BHWC, -jnp.inf, jax.lax.max, window, window, "VALID"
  )
