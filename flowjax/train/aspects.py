"""Images in buckets of several aspects: what a network must do with each.

And what it is told of their sizes, where it is (arXiv:2307.01952, section 2.2).
"""

# Shape suffixes: B batch, H height, S numbers of a size.

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flowjax import errors
from flowjax.data import arrayrecord, canvas, sources
from flowjax.data import config as data_config
from flowjax.flow import losses
from flowjax.train import flows, tasks

Size = tuple[int, int]
# Networks that read canvases, couplings of each pixel by itself, and tasks that
# look at no image.
CANVASES = ("dit", "mmdit", "flux")
PIXELWISE = ("independent", "pairs")
BLIND = ("none", "layout")


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


def check_canvas(
  model: Any,
  data: data_config.DataConfig,
  flow: flows.FlowConfig,
  task: tasks.TaskConfig,
) -> None:
  """Raises UserError where canvases would not be what their images are."""
  if not data.padded_patch:
    return
  where = f"config.data.padded_patch = {data.padded_patch}"
  if not data.buckets:
    raise errors.UserError(
      f"{where} lays images of several aspects out alike, and there are no "
      "config.data.buckets: set 0."
    )
  patch = getattr(model, "patch_size", None)
  if model.name not in CANVASES or patch != data.padded_patch:
    raise errors.UserError(
      f"{where} must be the patch size of a transformer, and that of a model "
      f"{model.name!r} is {patch}: set it to that, or to 0 for a program of "
      "each bucket."
    )
  if task.name not in BLIND:
    raise errors.UserError(
      f"{where}: the task {task.name!r} makes its condition of an image as it "
      "is, and a canvas is none. Set 0, for a program of each bucket."
    )
  learned = flow.objective == "maximum_likelihood" or flow.learned_variance
  if learned or flow.coupling.name not in PIXELWISE:
    raise errors.UserError(
      f"{where}: the objective {flow.objective!r} with learned_variance = "
      f"{flow.learned_variance} and the coupling {flow.coupling.name!r} asks "
      "for whole images, and a canvas is filled up with what is none. Set 0, "
      "for a program of each bucket."
    )


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
  programs = f"{len(data.buckets)} programs, one for each bucket"
  if data.padded_patch:
    programs = f"one program for {len(data.buckets)} buckets, on canvases"
  return f"{programs}; these figures are of the largest, {height}x{width}"


def is_told_sizes(model: Any) -> bool:
  """Whether a network is told size and crop of the images it learns from."""
  return getattr(model, "size_conditioning", False)


def check_sizes(model: Any, source: sources.Source) -> None:
  """Raises UserError for a source that cannot tell sizes to who is told."""
  if is_told_sizes(model) and "size" not in sources.blank(source):
    raise errors.UserError(
      f"config.model.size_conditioning=True: the records of {source.name} do "
      "not say the size of their originals. Of image files they do with "
      "config.data.originals=True, and in a folder of `flowjax encode` where "
      "its source did."
    )


def prepared(
  model: Any, data: data_config.DataConfig, loss: losses.Loss
) -> losses.Loss:
  """Returns a loss of batches as they are read, from one of conditions.

  A network that is told sizes is told those that the batch brings; and what of
  a canvas is no image is left out. Where there is neither, it is as it was.
  """
  if not (is_told_sizes(model) or data.padded_patch):
    return loss
  scale = pixels(data)

  def informed(params, batch, rng):
    batch = dict(batch)
    height, width = batch["image"].shape[1:3]
    size_B2 = jnp.array([[height, width]])
    if data.padded_patch:
      size_B2 = batch["grid"] * data.padded_patch
      batch["region"] = region(size_B2, height, width)
    if is_told_sizes(model) and "size" in batch:
      original_B2, crop_B2 = batch.pop("size"), batch.pop("crop")
      target_B2 = jnp.broadcast_to(scale * size_B2, crop_B2.shape)
      told_BS = jnp.concatenate([original_B2, crop_B2, target_B2], axis=1)
      batch["size_crop"] = told_BS.astype(jnp.float32)
    return loss(params, batch, rng)

  return informed


def on_canvas(
  batch: dict[str, Any], data: data_config.DataConfig
) -> dict[str, Any]:
  """Returns a batch in the abstract as `data/canvas.py` lays it out."""
  if not data.padded_patch:
    return batch
  patch, tokens = data.padded_patch, canvas.most_tokens(data)
  placed = dict(batch)
  for key in canvas.IMAGES:
    if key in batch:
      count, *_, channels = batch[key].shape
      shape = (count, tokens * patch, patch, channels)
      placed[key] = jax.ShapeDtypeStruct(shape, batch[key].dtype)
      placed["grid"] = jax.ShapeDtypeStruct((count, 2), np.int32)
  return placed


def region(size_B2: jax.Array, height: int, width: int) -> jax.Array:
  """Returns 1 where a canvas of that size has pixels of its image, else 0."""
  pixels_B = jnp.prod(size_B2, axis=1)[:, None]
  found_BH = jnp.arange(height)[None] * width < pixels_B
  return found_BH[:, :, None, None].astype(jnp.float32)


def pixels(data: data_config.DataConfig) -> int:
  """Returns how many pixels of an image, in a row, one latent stands for."""
  encoded = arrayrecord.of(data)
  if encoded is None or not encoded.latents:
    return 1
  return encoded.about["data"]["image_size"][0] // encoded.about["shape"][0]


def whole(
  size: Size, count: int, original: Size | None = None, crop: Size = (0, 0)
) -> np.ndarray:
  """Returns so many times that an image of `size` pixels is wanted [N, S].

  As if nothing had been cut off an original of that size, unless given.
  """
  row_S = np.array([*(original or size), *crop, *size], np.float32)
  return np.repeat(row_S[None], count, axis=0)
