"""The arithmetic of the encoder and decoder of convolutions, by formula.

A multiply-add is two; the elementwise rest is left out.
"""

import math

from flowjax.models import convolutions


def of(config: convolutions.ConvolutionalConfig, features: int) -> int:
  """Counts the arithmetic of encoder and decoder per example.

  A multiply-add is two; the elementwise rest is left out.
  """
  area = math.prod(config.image_size)
  top, bottom = config.widths[0], config.widths[-1]
  ends = area * config.channels * top * 2  # Out of pixels, and to pixels.
  low = area // config.factor**2
  ends += low * bottom * (features + config.latent_channels)
  total = 2 * 9 * ends + 2 * _middle(config, low)
  for ways, depth in (
    (convolutions.down(config), config.depth),
    (convolutions.up(config), None),
  ):
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


def _middle(config: convolutions.ConvolutionalConfig, area: int) -> int:
  width = config.widths[-1]
  attends = _attention(area, width) if config.middle_attention else 0
  return 2 * _residual(area, width, width) + attends


def _residual(area: int, into: int, width: int) -> int:
  shortcut = into * width if into != width else 0
  return 2 * area * (9 * into * width + 9 * width**2 + shortcut)


def _attention(area: int, width: int) -> int:
  return 2 * area * (4 * width**2 + 2 * area * width)
