"""What the networks here refuse alike, in a config and of their inputs."""

# Shape suffixes: B batch, H height, W width, C channels.

import collections.abc
from typing import Any

import jax

from flowjax import schema
from flowjax.models import blocks
from flowjax.ops import attention

_CHOICES = {
  "remat": tuple(blocks.REMAT),
  "attention": attention.BODIES,
  "dtype": tuple(blocks.DTYPES),
}


def choices(config: Any, **words: collections.abc.Collection[str]) -> None:
  """Raises ValueError for a word that is not among those of its field."""
  schema.require_among(config, **{**_CHOICES, **words})


def positive(config: Any, fields: str) -> None:
  """Raises ValueError unless all of the named fields are above 0."""
  for field in fields.split():
    if getattr(config, field) <= 0:
      raise ValueError(
        f"{field.replace('channels_out', 'out_channels')}="
        f"{getattr(config, field)} must be positive."
      )
  if min(config.image_size) <= 0:
    raise ValueError(f"image_size={config.image_size} must be positive.")


def context(config: Any) -> None:
  """Raises ValueError for a number of channels that no context has."""
  if config.context_channels < 0:
    raise ValueError(
      f"context_channels={config.context_channels} must not be negative: 0 is "
      "a network that sees the image alone."
    )


def heads(config: Any) -> None:
  """Raises ValueError for heads that do not divide the width, or a position."""
  width, count = config.width, config.heads
  # RoPE turns pairs, in each half of a head.
  unit = 4 if config.position == "rope2d" else 1
  fits = [n for n in range(1, width + 1) if width % (unit * n) == 0]
  near = sorted(sorted(fits, key=lambda n: abs(n - count))[:5])
  remedy = f"Numbers of heads that do for this width: {near}"
  if width % count:
    raise ValueError(f"heads={count} does not divide width={width}. {remedy}.")
  if config.head_size % unit:
    raise ValueError(
      f"position='rope2d' splits a head into rows and columns and each into "
      f"pairs, so that its size must be divisible by 4, not "
      f"{config.head_size} (width={width} / heads={count}). {remedy}; widths "
      f"for {count} heads: multiples of {4 * count}. Or use "
      f"position='sincos2d'."
    )
  if config.position == "sincos2d" and width % 4:
    raise ValueError(
      f"position='sincos2d' splits the width into four, and width={width} is "
      "not divisible by 4."
    )


def patches(image_size: collections.abc.Sequence[int], patch: int) -> None:
  """Raises ValueError unless images are cut into whole patches."""
  if not any(size % patch for size in image_size):
    return
  fits = [
    p
    for p in range(1, min(image_size) + 1)
    if not any(size % p for size in image_size)
  ]
  raise ValueError(
    f"patch_size={patch} does not divide an image of {image_size[0]}x"
    f"{image_size[1]}. Patch sizes that do: {', '.join(map(str, fits))}."
  )


def image(config: Any, x_BHWC: jax.Array) -> tuple[int, tuple[int, ...]]:
  """Returns batch and size of images that the network takes.

  Raises ValueError for an array that holds none.
  """
  if x_BHWC.ndim != 4 or x_BHWC.shape[-1] != config.channels:
    raise ValueError(
      f"The network takes images [B, H, W, {config.channels}], not "
      f"{x_BHWC.shape}. channels={config.channels} is in its config."
    )
  batch, *image_size, _ = x_BHWC.shape
  patches(image_size, config.patch_size)
  return batch, tuple(image_size)


def canvas(
  config: Any, x_BHWC: jax.Array, cond: collections.abc.Mapping[str, Any]
) -> bool:
  """Returns whether images are patches one under the other, by cond["grid"].

  Raises ValueError for a grid without them.
  """
  if "grid" not in cond:
    return False
  batch, _, width, _ = x_BHWC.shape
  if width != config.patch_size or cond["grid"].shape != (batch, 2):
    raise ValueError(
      f"grid has shape {cond['grid'].shape} beside x of {x_BHWC.shape}: "
      f"cond['grid'] is [{batch}, 2], rows and columns of each image, where x "
      f"holds their patches one under the other, {config.patch_size} wide."
    )
  return True


def per_example(batch: int, **values: jax.Array) -> None:
  """Raises ValueError unless each value is one number per image."""
  for name, value in values.items():
    if value.shape != (batch,):
      raise ValueError(
        f"{name} has shape {value.shape}; for {batch} images it is ({batch},)."
      )
