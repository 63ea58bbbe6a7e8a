"""What `sample` shows a network in place of a text: layouts, and images."""

# Shape suffixes: N images, H height, W width, C channels.

import dataclasses
import json
import math
import pathlib
from collections.abc import Callable

import numpy as np

from flowjax import errors
from flowjax.commands import (
  drawing,
  flags,
  given,
  pipeline,
  placement,
  restored,
  variations,
)
from flowjax.data import layouts
from flowjax.interop import frozen, pipelines

ORIGINALS = 10  # Held-out images that are varied, where none is named.
SAID = ("prompt", "prompts", "negative_prompt", "embeddings", "labels")
LARGEST = 10_000_000  # bytes of a file of boxes


@dataclasses.dataclass(frozen=True)
class Shown:
  """Conditions, a row each, of which each is drawn so many times.

  `sheet(images)` is a picture of what was drawn of them in turn.
  """

  cond: dict[str, np.ndarray]
  sheet: Callable[[np.ndarray], np.ndarray]
  each: int = 1


def add_flags(parser) -> None:
  """Adds the flags that name layouts and images."""
  parser.add_argument(
    "--boxes",
    type=flags.path,
    help="layouts, in turn: a JSON file with a list for each image, of "
    '{"class": "red 3", "box": [top, left, bottom, right]}, from 0 to 1',
  )
  parser.add_argument(
    "--image",
    action="append",
    type=flags.path,
    help="an image to be varied; once more for one more, which come in turn",
  )


def read(
  args, found: restored.Restored, parts: frozen.Frozen | None
) -> Shown | None:
  """Returns what a network that reads layouts or images is shown.

  Without a flag that is what is held out. Raises UserError for a flag that the
  network of the run does not heed.
  """
  config = found.config
  for flag, reads, what in (
    ("boxes", config.layout.classes, "layouts"),
    ("image", config.embedding.size, "images"),
  ):
    if getattr(args, flag) and not reads:
      raise errors.UserError(
        f"--{flag}: the network of {found.directory} reads no {what}. Leave it "
        "out."
      )
    for other in SAID if reads else ():
      if getattr(args, other) is not None:
        raise errors.UserError(
          f"--{other.replace('_', '-')}: the network of {found.directory} is "
          f"told {what}, and nothing in words: give --{flag}, or nothing for "
          "what is held out."
        )
  if args.invert and not (args.boxes or args.image):
    return None  # What is held out is shown as it is.
  if config.layout.classes:
    return _layouts(args, found)
  if config.embedding.size:
    return _originals(args, found, parts)
  return None


def _layouts(args, found: restored.Restored) -> Shown:
  layout = layouts.of(found.config.data)
  assert layout is not None
  if args.boxes:
    asked = boxes(args.boxes, layout)
    cond = placement.cond(layout, asked)
  else:
    cond = drawing.conditions(found.run, args.num or 100)
    asked = [
      layout.boxes(*each)
      for each in zip(cond["boxes"], cond["box_mask"], strict=True)
    ]

  def sheet(images_NHWC):
    turns = [asked[i % len(asked)] for i in range(len(images_NHWC))]
    return placement.pictured(images_NHWC, turns)

  return Shown(cond, sheet)


def boxes(
  path: pathlib.Path, layout: layouts.Layout
) -> list[list[layouts.Box]]:
  """Reads --boxes; raises UserError for what is no layout of this run."""
  flag = f"--boxes={path}"
  try:
    if path.stat().st_size > LARGEST:
      raise ValueError(f"it is longer than {LARGEST:,} bytes")
    content = json.loads(path.read_text(encoding="utf-8"))
  except (OSError, ValueError, RecursionError) as error:
    raise errors.UserError(f"{flag} cannot be read: {error}.") from error
  if not isinstance(content, list) or not content:
    raise errors.UserError(
      f"{flag} must hold a list, with a list of boxes for each image."
    )
  found = []
  for number, each in enumerate(content):
    try:
      found.append(layouts.parse(each))
      layout.arrays(found[-1])  # Refuses what it cannot be told.
    except ValueError as error:
      raise errors.UserError(f"{flag}, layout {number}: {error}") from error
  return found


def _originals(
  args, found: restored.Restored, parts: frozen.Frozen | None
) -> Shown:
  if args.image:
    reader = given.reader(found, parts)
    records = [given.image(path, reader, "--image") for path in args.image]
    pixels = np.stack([record["image"] for record in records])
    cond = _told(found, parts, pixels)
  else:
    count = math.ceil(args.num / variations.EACH) if args.num else ORIGINALS
    pixels, cond = drawing.held_out(found.run, count)
    if parts and not args.latents:
      pixels = pipeline.pictures(parts, pixels)

  def sheet(images_NHWC):
    return variations.beside(pixels, images_NHWC)

  return Shown(cond, sheet, variations.EACH)


def _told(
  found: restored.Restored, parts: frozen.Frozen | None, pixels: np.ndarray
) -> dict[str, np.ndarray]:
  """Returns images as the network is told them."""
  if not found.config.embedding.depth:
    if parts is None or not parts.embeds:
      raise errors.UserError(
        "--image: this network is told embeddings that came with its data, and "
        "there is no encoder that makes them: name a pipeline that has an "
        f"{pipelines.IMAGE_ENCODER}/ by config.pipeline."
      )
    return drawing.told_of(
      found.run, {"image": pixels, "embedding": parts.embed(pixels)}
    )
  if parts:
    pixels = np.concatenate([parts.encode(each[None])[0] for each in pixels])
  return drawing.told_of(found.run, {"image": pixels})
