"""A discriminator of patches, against which a decoder is trained.

Convolutions say of each patch whether it is real (arXiv:1611.07004, section
3.2); its width doubles with each of `layers`, at most to eight times. Norms are
over the batch as it comes, real or reconstructed (arXiv:1502.03167).
"""

# Shape suffixes: B batch, H height, W width, C channels.

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from flowjax.models import convolutions, layers

GROUP = "discriminator"
EPSILON = 1e-5
SLOPE = 0.2  # of a rectifier below zero


class BatchNorm(nn.Module):
  """Normalises channels over all examples and positions of a batch."""

  @nn.compact
  def __call__(self, x_BHWC: jax.Array) -> jax.Array:
    channels = x_BHWC.shape[-1:]
    spread = lambda key, shape: 1.0 + layers.normal(key, shape)  # noqa: E731
    scale_C = self.param("scale", spread, channels)
    bias_C = self.param("bias", layers.zeros, channels)
    mean = jnp.mean(x_BHWC, axis=(0, 1, 2), keepdims=True)
    variance = jnp.mean(
      jnp.square(x_BHWC - mean), axis=(0, 1, 2), keepdims=True
    )
    y_BHWC = (x_BHWC - mean) * jax.lax.rsqrt(variance + EPSILON)
    return y_BHWC * scale_C[None, None, None] + bias_C[None, None, None]


class Patches(nn.Module):
  """Maps images to one number for each of their patches, in float32."""

  width: int
  layers: int

  @nn.compact
  def __call__(self, x_BHWC: jax.Array) -> jax.Array:
    conv = functools.partial(
      convolutions.Conv, size=4, init_kernel=layers.normal
    )
    rectified = functools.partial(nn.leaky_relu, negative_slope=SLOPE)
    x_BHWC = rectified(conv(self.width, stride=2, name="in")(x_BHWC))
    for i in range(1, self.layers + 1):
      wide = self.width * min(2**i, 8)
      stride = 2 if i < self.layers else 1
      halved = functools.partial(conv, stride=stride, bias=False)
      x_BHWC = halved(wide, name=f"conv_{i}")(x_BHWC)
      x_BHWC = rectified(BatchNorm(name=f"norm_{i}")(x_BHWC))
    return conv(1, name="out")(x_BHWC)


def sides(side: int, layers: int) -> int:
  """Returns how many patches a side of an image has; below 1 it is too small.

  A convolution of 4 with one zero around takes one of each two pixels, and the
  last two of each all but one.
  """
  return side // 2**layers - 2


def init(
  rng: jax.Array, *, width: int, layers: int, channels: int, image_size: Any
) -> dict[str, Any]:
  """Draws the parameters, float32."""
  x_BHWC = jnp.zeros((1, *image_size, channels))
  return Patches(width, layers).init(rng, x_BHWC)["params"]


def apply(
  params: dict[str, Any], x_BHWC: jax.Array, *, width: int, layers: int
) -> jax.Array:
  """Returns how real each patch of images is said to be, [B, H, W, 1]."""
  return convolutions.applied(Patches(width, layers), params, x_BHWC)
