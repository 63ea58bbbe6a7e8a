"""The convolutional encoder and decoder that the autoencoders here share.

Levels of residual blocks, each level half as wide and high as the one before
(arXiv:2112.10752, appendix G; arXiv:2012.09841). Statistics of norms and the
softmax are in float32, whatever dtype the rest is in.
"""

# Shape suffixes: B batch, H height, W width, C channels; T positions of an
# image in a row, G groups of channels, K channels of a group.

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from flowjax.models import blocks, checks, layers
from flowjax.ops import attention, axes

REMAT = ("none", "full")
# From so many positions on attention holds no matrix of scores. No fused kernel
# takes a head as wide as the level; at 64x64 the matrix is 64 MiB an image.
MANY_POSITIONS = 4096
EPSILON = 1e-6


@dataclasses.dataclass(frozen=True)
class ConvolutionalConfig:
  """What encoder and decoder are made of.

  `widths` has the channels of each level; the image is halved between them.
  The encoder has `depth` residual blocks a level and the decoder one more. In
  `attention_levels`, 0 being that of the image, each is followed by attention.
  `image_size` is that of training, and of a tile of a larger image.
  `force_upcast` tells diffusers not to compute in float16.
  """

  image_size: tuple[int, int] = (256, 256)
  channels: int = 3
  latent_channels: int = 4
  widths: tuple[int, ...] = (128, 256, 512, 512)
  depth: int = 2
  attention_levels: tuple[int, ...] = ()
  middle_attention: bool = True
  groups: int = 32
  scaling_factor: float = 0.18215
  force_upcast: bool = True
  remat: str = "none"
  attention: str = "auto"
  dtype: str = "float32"

  def __post_init__(self):
    checks.choices(self, remat=REMAT)
    if not self.widths:
      raise ValueError("widths=() has no level; (128, 256, 512) makes f = 4.")
    for width in self.widths:
      if width <= 0 or self.groups <= 0 or width % self.groups:
        raise ValueError(
          f"groups={self.groups} does not divide widths={self.widths}: each "
          "level's channels are normalised in so many groups."
        )
    checks.positive(self, "channels latent_channels depth scaling_factor")
    if any(side % self.factor for side in self.image_size):
      raise ValueError(
        f"image_size={self.image_size} is not divisible by {self.factor}, by "
        f"which {len(self.widths)} levels of widths={self.widths} shrink it."
      )
    for level in self.attention_levels:
      if not 0 <= level < len(self.widths):
        raise ValueError(
          f"attention_levels={self.attention_levels}: there are the levels 0 "
          f"to {len(self.widths) - 1}."
        )

  @property
  def factor(self) -> int:
    """How many pixels of a side are one of the latents: f."""
    return 2 ** (len(self.widths) - 1)

  @property
  def latent_size(self) -> tuple[int, int]:
    """Height and width of the latents of an image of `image_size`."""
    height, width = self.image_size
    return height // self.factor, width // self.factor


def uniform(key: jax.Array, shape: tuple[int, ...], fan_in: int) -> jax.Array:
  """Draws U(-a, a), a^2 = 1 / fan_in: He's law for a gain of sqrt(1 / 3)."""
  limit = 1.0 / math.sqrt(fan_in)
  return jax.random.uniform(key, shape, jnp.float32, -limit, limit)


class Conv(nn.Module):
  """A convolution, with zeros before and after each side: `padding`."""

  features: int
  size: int = 3
  stride: int = 1
  padding: tuple[int, int] = (1, 1)
  dtype: jnp.dtype = jnp.float32
  init_kernel: layers.Init = uniform
  bias: bool = True

  @nn.compact
  def __call__(self, x_BHWC: jax.Array) -> jax.Array:
    shape = (self.size, self.size, x_BHWC.shape[-1], self.features)
    kernel = self.param("kernel", self.init_kernel, shape, math.prod(shape[:3]))
    # Devices have images of their own, and all need the kernel whole.
    kernel = axes.name(kernel, None, None, None, None)
    y_BHWC = jax.lax.conv_general_dilated(
      x_BHWC.astype(self.dtype),
      kernel.astype(self.dtype),
      (self.stride,) * 2,
      (self.padding,) * 2,
      dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    y_BHWC = axes.name(y_BHWC, "batch", None, None, None)
    if not self.bias:
      return y_BHWC
    bias_C = self.param("bias", layers.zeros, shape[-1:])
    return y_BHWC + bias_C[None, None, None].astype(self.dtype)


class GroupNorm(nn.Module):
  """Normalises groups of channels over all positions (arXiv:1803.08494).

  With `silu`, that follows.
  """

  groups: int
  silu: bool = True

  @nn.compact
  def __call__(self, x_BHWC: jax.Array) -> jax.Array:
    channels = x_BHWC.shape[-1:]
    scale_C = self.param("scale", nn.initializers.ones, channels)
    bias_C = self.param("bias", layers.zeros, channels)

    @layers.recomputed
    def normed(x_BHWC, scale_C, bias_C):
      shape = (len(x_BHWC), -1, self.groups, channels[0] // self.groups)
      x_BTGK = x_BHWC.astype(jnp.float32).reshape(shape)
      centred = x_BTGK - jnp.mean(x_BTGK, axis=(1, 3), keepdims=True)
      variance = jnp.mean(jnp.square(centred), axis=(1, 3), keepdims=True)
      y = (centred * jax.lax.rsqrt(variance + EPSILON)).reshape(x_BHWC.shape)
      y = y * scale_C[None, None, None] + bias_C[None, None, None]
      return (nn.silu(y) if self.silu else y).astype(x_BHWC.dtype)

    return normed(x_BHWC, scale_C, bias_C)


class Residual(nn.Module):
  """x + conv(silu(norm(conv(silu(norm(x)))))), x mapped to `width`."""

  config: Any
  width: int

  @nn.compact
  def __call__(self, x_BHWC: jax.Array) -> jax.Array:
    conv, groups = _conv(self.config), self.config.groups
    y_BHWC = GroupNorm(groups, name="norm_1")(x_BHWC)
    y_BHWC = conv(self.width, name="conv_1")(y_BHWC)
    y_BHWC = GroupNorm(groups, name="norm_2")(y_BHWC)
    y_BHWC = conv(self.width, name="conv_2")(y_BHWC)
    if x_BHWC.shape[-1] != self.width:
      point = functools.partial(conv, size=1, padding=(0, 0))
      x_BHWC = point(self.width, name="shortcut")(x_BHWC)
    return x_BHWC + y_BHWC


class Attention(nn.Module):
  """x + attention of all positions to all, with one head."""

  config: Any

  @nn.compact
  def __call__(self, x_BHWC: jax.Array) -> jax.Array:
    width, body = x_BHWC.shape[-1], self.config.attention
    dense = functools.partial(
      layers.Dense,
      dtype=blocks.DTYPES[self.config.dtype],
      init_kernel=uniform,
    )
    y_BHWC = GroupNorm(self.config.groups, silu=False, name="norm")(x_BHWC)
    y_BTC = y_BHWC.reshape(len(x_BHWC), -1, width)
    q, k, v = jnp.split(dense((3, width), name="qkv")(y_BTC), 3, axis=2)
    if body == "auto" and y_BTC.shape[1] > MANY_POSITIONS:
      body = "blockwise"
    y_BTC = attention.attention(q, k, v, body=body)[:, :, 0]
    y_BTC = dense((width,), name="out")(y_BTC)
    return x_BHWC + y_BTC.reshape(x_BHWC.shape)


class Level(nn.Module):
  """Residual blocks of one width, then half or twice the size, or as it is."""

  config: Any
  width: int
  depth: int
  attends: bool
  then: str | None

  @nn.compact
  def __call__(self, x_BHWC: jax.Array) -> jax.Array:
    residual = Residual
    if self.config.remat == "full":
      residual = nn.remat(Residual)  # type: ignore[assignment]
    for i in range(self.depth):
      x_BHWC = residual(self.config, self.width, name=f"block_{i}")(x_BHWC)
      if self.attends:
        x_BHWC = Attention(self.config, name=f"attention_{i}")(x_BHWC)
    conv = _conv(self.config)
    if self.then == "down":
      # Zeros below and to the right alone.
      halved = functools.partial(conv, stride=2, padding=(0, 1))
      x_BHWC = halved(self.width, name="down")(x_BHWC)
    if self.then == "up":
      x_BHWC = conv(self.width, name="up")(doubled(x_BHWC))
    return x_BHWC


class Middle(nn.Module):
  """Two residual blocks, and attention between them."""

  config: Any

  @nn.compact
  def __call__(self, x_BHWC: jax.Array) -> jax.Array:
    width = self.config.widths[-1]
    x_BHWC = Residual(self.config, width, name="block_0")(x_BHWC)
    if self.config.middle_attention:
      x_BHWC = Attention(self.config, name="attention_0")(x_BHWC)
    return Residual(self.config, width, name="block_1")(x_BHWC)


class Encoder(nn.Module):
  """Maps images to `features` channels on a grid `factor` times coarser."""

  config: Any
  features: int

  @nn.compact
  def __call__(self, x_BHWC: jax.Array) -> jax.Array:
    config, conv = self.config, _conv(self.config)
    x_BHWC = conv(config.widths[0], name="in")(x_BHWC)
    for level, _, then in down(config):
      x_BHWC = Level(
        config,
        config.widths[level],
        config.depth,
        level in config.attention_levels,
        then,
        name=f"level_{level}",
      )(x_BHWC)
    x_BHWC = Middle(config, name="middle")(x_BHWC)
    x_BHWC = GroupNorm(config.groups, name="norm")(x_BHWC)
    return conv(self.features, name="out")(x_BHWC)


class Decoder(nn.Module):
  """Maps latents to images, by the levels of the encoder in reverse.

  `before` stops short of the last convolution.
  """

  config: Any

  def setup(self):
    config, conv = self.config, _conv(self.config)
    self.first = conv(config.widths[-1], name="in")
    self.middle = Middle(config)
    self.levels = [
      Level(
        config,
        config.widths[level],
        config.depth + 1,
        level in config.attention_levels,
        then,
        name=f"level_{level}",
      )
      for level, _, then in up(config)
    ]
    self.norm = GroupNorm(config.groups)
    self.out = conv(config.channels)

  def before(self, z_BHWC: jax.Array) -> jax.Array:
    x_BHWC = self.middle(self.first(z_BHWC))
    for level in self.levels:
      x_BHWC = level(x_BHWC)
    return self.norm(x_BHWC)

  def __call__(self, z_BHWC: jax.Array) -> jax.Array:
    return self.out(self.before(z_BHWC)).astype(jnp.float32)


class Reconstruction(NamedTuple):
  """What an autoencoder makes of images while it is trained.

  Features are what the last convolution of the decoder makes an image of.
  Penalties are numbers by example, and statistics those of the whole batch.
  """

  features_BHWC: jax.Array
  penalties: dict[str, jax.Array]
  statistics: dict[str, jax.Array]


def features(
  config: ConvolutionalConfig, params: dict[str, Any], h_BHWC: jax.Array
) -> jax.Array:
  """Returns what the decoder knows before its last convolution."""
  return applied(Decoder(config), params["decoder"], h_BHWC, method="before")


def last(
  config: ConvolutionalConfig, params: dict[str, Any], h_BHWC: jax.Array
) -> jax.Array:
  """Returns the images of features; `params` are those of this layer."""
  conv = _conv(config)(config.channels)
  return applied(conv, params, h_BHWC).astype(jnp.float32)


def applied(
  module: nn.Module, params: Any, *inputs: Any, **options: Any
) -> Any:
  """Returns what a module makes of inputs, by its own parameters."""
  return module.apply({"params": params}, *inputs, **options)


def down(config: ConvolutionalConfig) -> list[tuple[int, int, str | None]]:
  """Returns level, width coming in, and what follows, as the encoder goes."""
  into = (config.widths[0], *config.widths)
  last = len(config.widths) - 1
  return [(i, into[i], "down" if i < last else None) for i in range(last + 1)]


def up(config: ConvolutionalConfig) -> list[tuple[int, int, str | None]]:
  """Returns level, width coming in, and what follows, as the decoder goes."""
  into = (*config.widths, config.widths[-1])
  levels = reversed(range(len(config.widths)))
  return [(i, into[i + 1], "up" if i else None) for i in levels]


def doubled(x_BHWC: jax.Array) -> jax.Array:
  """Returns each pixel as two by two."""
  batch, height, width, channels = x_BHWC.shape
  shape = (batch, height, 2, width, 2, channels)
  tall = jnp.broadcast_to(x_BHWC[:, :, None, :, None], shape)
  return tall.reshape(batch, 2 * height, 2 * width, channels)


def flops(config: ConvolutionalConfig, features: int) -> int:
  """Counts the arithmetic of encoder and decoder per example.

  A multiply-add is two; the elementwise rest is left out.
  """
  area = math.prod(config.image_size)
  top, bottom = config.widths[0], config.widths[-1]
  ends = area * config.channels * top * 2  # Out of pixels, and to pixels.
  low = area // config.factor**2
  ends += low * bottom * (features + config.latent_channels)
  total = 2 * 9 * ends + 2 * _middle(config, low)
  for ways, depth in ((down(config), config.depth), (up(config), None)):
    for level, into, then in ways:
      count = config.depth + 1 if depth is None else depth
      here = area // 4**level
      width = config.widths[level]
      total += _residual(here, into, width)
      total += (count - 1) * _residual(here, width, width)
      if level in config.attention_levels:
        total += count * _attention(here, width)
      after = {"down": here // 4, "up": here * 4, None: 0}[then]
      total += 2 * 9 * after * width**2
  return total


def check_image(config: ConvolutionalConfig, x_BHWC: jax.Array) -> None:
  """Raises ValueError for what is no image that the encoder takes."""
  fits = x_BHWC.ndim == 4 and x_BHWC.shape[-1] == config.channels
  if not fits or any(side % config.factor for side in x_BHWC.shape[1:3]):
    raise ValueError(
      f"The encoder takes images [B, H, W, {config.channels}], with H and W "
      f"divisible by {config.factor}, not {x_BHWC.shape}."
    )


def check_latents(channels: int, z_BHWC: jax.Array) -> None:
  """Raises ValueError for what are no latents that the decoder takes."""
  if z_BHWC.ndim != 4 or z_BHWC.shape[-1] != channels:
    raise ValueError(
      f"The decoder takes latents [B, H, W, {channels}], not {z_BHWC.shape}."
    )


def _middle(config: ConvolutionalConfig, area: int) -> int:
  width = config.widths[-1]
  attends = _attention(area, width) if config.middle_attention else 0
  return 2 * _residual(area, width, width) + attends


def _residual(area: int, into: int, width: int) -> int:
  shortcut = into * width if into != width else 0
  return 2 * area * (9 * into * width + 9 * width**2 + shortcut)


def _attention(area: int, width: int) -> int:
  return 2 * area * (4 * width**2 + 2 * area * width)


def _conv(config: ConvolutionalConfig) -> Any:
  return functools.partial(Conv, dtype=blocks.DTYPES[config.dtype])
