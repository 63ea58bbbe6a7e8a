"""Images in buckets of several aspects: what a network must do with each."""

import dataclasses
import math
from typing import Any

from flowjax import errors
from flowjax.data import config as data_config

Size = tuple[int, int]


def sizes(data: data_config.DataConfig) -> tuple[Size, ...]:
  """Returns height and width of each bucket, or those of all images."""
  return data.buckets or (data.image_size,)


def check(model: Any, data: data_config.DataConfig) -> None:
  """Raises UserError for a bucket whose images a model cannot take."""
  if not data.buckets:
    return
  if model.name == "coupling":
    raise errors.UserError(
      f"config.data.buckets = {data.buckets}: a model of coupling layers has "
      "parameters for each pixel, and takes images of one size. Use a "
      "transformer, or no buckets."
    )
  if getattr(model, "position", None) == "learned":
    raise errors.UserError(
      f"config.data.buckets = {data.buckets}: position='learned' knows one "
      "grid of patches. Set config.model.position to 'rope2d' or 'sincos2d', "
      "which have places for every aspect."
    )
  for bucket in data.buckets:
    with errors.naming(f"config.data.buckets: {bucket[0]}x{bucket[1]}"):
      sized(model, bucket)


def sized(model: Any, size: Size) -> Any:
  """Returns the model for images of another size; raises ValueError if none."""
  return dataclasses.replace(model, image_size=size)


def largest(config: Any) -> Any:
  """Returns the experiment with images of the largest bucket alone in mind.

  Of several programs the one for these needs the most memory.
  """
  if not config.data.buckets:
    return config
  size = max(sizes(config.data), key=math.prod)
  return dataclasses.replace(
    config,
    model=sized(config.model, size),
    data=dataclasses.replace(config.data, image_size=size),
  )


def said(data: data_config.DataConfig) -> str:
  """Returns how many programs there are, and of which the figures are."""
  height, width = max(sizes(data), key=math.prod)
  return (
    f"{len(data.buckets)} programs, one for each bucket; these figures are of "
    f"the largest, {height}x{width}"
  )
