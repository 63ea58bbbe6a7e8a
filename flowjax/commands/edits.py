"""What a user gives to `sample` to be changed: images, and masks of them."""

# Shape suffixes: N images, M masks, H height, W width, C channels; 1 is one.

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from flowjax import errors
from flowjax.commands import flags, given, restored
from flowjax.data import images
from flowjax.interop import frozen, pipelines
from flowjax.train import tasks

# Without --strength: what is coarse stays, but where a mask says what does.
STRENGTH = 0.6


@dataclasses.dataclass(frozen=True)
class Edits:
  """Images as the network draws them, and where they are drawn anew.

  `masks` are 1 there and 0 where an image is kept, one for each image. Below a
  `strength` of 1 sampling starts from the images. Of a flow between images they
  are `sources`, where t = 1. The `context` is what a network for inpainting or
  super-resolution is told of them.
  """

  images: np.ndarray
  masks: np.ndarray | None = None
  strength: float = 1.0
  sources: bool = False
  context: np.ndarray | None = None

  def told(self, count: int) -> dict[str, np.ndarray]:
    """Returns what a network with a context is told, of images in turn."""
    if self.context is None:
      return {}
    return {"context": self.context[np.arange(count) % len(self.images)]}

  def beside(self, task: tasks.TaskConfig, count: int) -> list[np.ndarray]:
    """Returns what stands beside pictures: each image, and what is told of it.

    A small image that is made larger is shown as it is told alone.
    """
    if self.context is None:
      return []
    turn = np.arange(count) % len(self.images)
    told = task.shown(self.context[turn], self.images.shape[-1])
    whole = self.images.shape[1:] == told.shape[1:]
    return [self.images[turn], told] if whole else [told]

  def turns(self, count: int) -> dict[str, Any]:
    """Returns the options of `Restored.draw` for so many images, in turn."""
    turn = np.arange(count) % len(self.images)
    if self.sources:
      return {"starts": self.images[turn]}
    masks = None if self.masks is None else self.masks[turn]
    if masks is None and self.strength == 1.0:
      return {}
    return {
      "images": self.images[turn],
      "masks": masks,
      "strength": self.strength,
    }


def add_flags(parser) -> None:
  """Adds the flags that name images, and say what becomes of them."""
  parser.add_argument(
    "--init-image",
    dest="init_image",
    action="append",
    type=flags.path,
    help="an image to start from, cut to the size that is drawn; once more for "
    "one more, which come in turn",
  )
  parser.add_argument(
    "--strength",
    type=flags.strength,
    help="how far --init-image goes to noise, above 0 and at most 1, of which "
    f"nothing of it is left (default: {STRENGTH}, and with --mask 1)",
  )
  parser.add_argument(
    "--mask",
    action="append",
    type=flags.path,
    help="an image as large as --init-image: what is white is drawn anew, what "
    "is black stays; one for all, or one for each",
  )


def check(args) -> None:
  """Refuses flags that do not go together; nothing is read."""
  if not args.init_image:
    for name in ("strength", "mask"):
      if getattr(args, name) is not None:
        raise errors.UserError(
          f"--{name} says what becomes of an image: name it by --init-image."
        )
    return
  for name in ("start", "invert"):
    if getattr(args, name):
      raise errors.UserError(
        f"--init-image and --{name} both say where to start: leave out one."
      )
  if args.mask and len(args.mask) not in (1, len(args.init_image)):
    raise errors.UserError(
      f"--mask was given {len(args.mask)} times, for {len(args.init_image)} of "
      "--init-image: give one for all, or one for each."
    )


def read(
  args, found: restored.Restored, parts: frozen.Frozen | None
) -> Edits | None:
  """Reads --init-image and --mask for a network; None where none is given."""
  if not args.init_image:
    return None
  _check_network(args, found)
  task = found.config.task
  small = task.name == "super_resolution"
  factor = pipelines.factor(parts.folder) if parts else 1
  # Of latents it is these that are made small, as in training.
  shrunk = task.factor if small and not parts else 1
  reader = given.reader(found, parts, shrunk)
  records = [given.image(p, reader, "--init-image") for p in args.init_image]
  images_NHWC = np.stack([record["image"] for record in records])
  if parts:
    # Singly, as they are made: a large one needs much memory.
    mean = [parts.encode(image_HWC[None])[0] for image_HWC in images_NHWC]
    images_NHWC = np.concatenate(mean)
  if found.config.data.pair_source is not None:
    return Edits(images_NHWC, sources=True)
  if small:
    low = jnp.asarray(images_NHWC)
    low = tasks.lowered(low, task.factor) if parts else low
    level_N = jnp.zeros(len(low)) if task.noise else None
    size = found.config.model.image_size
    made = tasks.super_resolution_context(low, size, level_N)
    return Edits(images_NHWC, context=np.asarray(made))
  masks, strength = None, args.strength or STRENGTH
  if args.mask:
    masks = _masks(args, reader, [_size(each) for each in records], factor)
    strength = args.strength or 1.0
  context = None
  if task.name == "inpainting":
    anew = np.ones((*images_NHWC.shape[:3], 1)) if masks is None else masks
    made = tasks.inpainting_context(*map(jnp.asarray, (images_NHWC, anew)))
    context = np.asarray(made)
  return Edits(images_NHWC, masks, strength, context=context)


def _check_network(args, found: restored.Restored) -> None:
  """Refuses flags that this network has no use for."""
  if found.run.network.inverse is not None:
    raise errors.UserError(
      f"--init-image={args.init_image[0]}: a normalizing flow maps noise to "
      "images at once, and there is no way on which to start from an image. "
      "Leave it out, or take --start."
    )
  if found.config.data.pair_source is not None:
    what = "of this flow between images --init-image is where it starts"
  elif found.config.task.name == "super_resolution":
    what = "this network makes --init-image larger, and is told all of it"
  else:
    return
  for name in ("strength", "mask"):
    if getattr(args, name) is not None:
      raise errors.UserError(f"--{name}: {what}. Leave out --{name}.")


def _size(record: dict[str, np.ndarray]) -> tuple[int, int]:
  """Returns height and width of what was read, before it was cut."""
  # Latents are not cut.
  height, width = record.get("size", record["image"].shape[:2])
  return int(height), int(width)


def _masks(
  args, reader: images.Reader, sizes: list[tuple[int, int]], factor: int
) -> np.ndarray:
  """Returns the masks [N, H, W, 1] of zeros and ones.

  A pixel, or the area of a latent, is drawn anew if its mean is above 0.5.
  """
  grey = dataclasses.replace(reader, shape=(*reader.shape[:2], 1))
  found = [given.image(path, grey, "--mask") for path in args.mask]
  turns = [found[i % len(found)] for i in range(len(sizes))]
  for i, (record, wanted) in enumerate(zip(turns, sizes, strict=True)):
    if (size := _size(record)) != wanted:
      raise errors.UserError(
        f"--mask={args.mask[i % len(found)]} is of {size[0]}x{size[1]}, and "
        f"--init-image={args.init_image[i]} of {wanted[0]}x{wanted[1]}: a mask "
        "is as large as its image."
      )
  mask_NHW1 = np.stack([(record["image"] + 1.0) / 2.0 for record in turns])
  count, height, width, _ = mask_NHW1.shape
  rows, columns = height // factor, width // factor
  tiles = mask_NHW1.reshape(count, rows, factor, columns, factor, 1)
  return (tiles.mean(axis=(2, 4)) > 0.5).astype(np.float32)
