"""Draws samples from a workdir: a PNG, or the arrays in a .npy file.

Image i of a seed is the same however many are drawn, on whatever devices (with
dopri5 and tsit5 to their tolerance alone: a batch shares its steps). Any key of
config.sample can be changed: --config.sample.guidance.name=apg. With
--guidance=1,1.5,3 the images have these scales in turn. A network that reads
captions gets those that are held out, or those of --prompt, given as often as
you like, and of --prompts, a file with one a line, and is guided away from
--negative-prompt, or from the empty one. One that reads embedded texts gets
those that are held out, or --embeddings, a .npz file of "text" [N, L, E] and
"pooled" [N, P], and if you like "text_mask" [N, L], and all of these with
"negative_" before them. With --invert, held-out images are carried
to noise, without guidance, and drawn again from it, each row below its
originals: without guidance as well, unless you give --guidance, or change what
is drawn by --labels or --embeddings. A run with config.pipeline reads --prompt
by the text encoders there, and its autoencoder makes the pictures. One that
is told layouts draws those that are held out, or of --boxes; one that is told
images varies those that are held out, or each --image, in a row beside it. One
that fills in, or makes larger, is told of held-out images, and on the left of
each picture are that image and what was told of it.

With --init-image samples start from images: --strength is how far these go to
noise, and so how much becomes another; with --mask what is black stays as it
is. To a flow between images --init-image is what it starts from.

example:
  flowjax sample --workdir=runs/digits --out=grid.png --num=40 --guidance=2
"""

import argparse
import dataclasses
import math
import pathlib
from typing import Any

import jax
import numpy as np

from flowjax import errors, models
from flowjax.commands import (
  drawing,
  edits,
  flags,
  given,
  pipeline,
  restored,
  shown,
)
from flowjax.evaluate import pictures
from flowjax.parallel import distributed
from flowjax.train import methods, progress, workdir


def add_flags(parser) -> None:
  """Adds the flags of `sample`; what is not given is as in the config."""
  restored.add_run(parser)
  parser.add_argument(
    "--out",
    type=flags.path,
    default="grid.png",
    help="the PNG, or .npy for float32 [N, H, W, C]; of the pictures that are "
    "there, only one of FlowJAX's making is replaced",
  )
  parser.add_argument(
    "--num",
    type=flags.count,
    help="how many images; default: 100, or one per label, text, layout or "
    "start, or five per image to be varied, and "
    "as many more as make every scale of --guidance come equally often",
  )
  parser.add_argument(
    "--labels", help="classes in turn, such as 3,1,4; default: all"
  )
  given.add_flags(parser)
  shown.add_flags(parser)
  parser.add_argument(
    "--size",
    type=flags.pixels,
    help="height and width of the images, as 1024x768; default: those of "
    "training",
  )
  parser.add_argument(
    "--latents",
    action="store_true",
    help="leave what is drawn as it is: of a run with config.pipeline, latents",
  )
  parser.add_argument(
    "--tiles",
    action="store_true",
    help="make pictures larger than those of the autoencoder's training in "
    "tiles of that size, which needs less memory",
  )
  restored.add_method(parser, scales=True)
  parser.add_argument(
    "--worse",
    type=flags.path,
    help="a workdir to be guided away from, instead of from no label",
  )
  parser.add_argument("--seed", type=flags.seed, default=0, help="of the noise")
  edits.add_flags(parser)
  parser.add_argument(
    "--invert",
    action="store_true",
    help="start from what held-out images are when carried, unguided, to "
    "noise; guidance is then 1 unless --guidance, --labels or --embeddings say "
    "otherwise",
  )


def run(args) -> None:
  """Draws, writes the images, and says where they are."""
  if args.out.suffix.lower() not in (".png", ".npy"):
    raise errors.UserError(f"--out={args.out} must end in .png or .npy.")
  if args.invert and args.start:
    raise errors.UserError("--invert finds the start; leave out --start.")
  edits.check(args)
  _check_out(args)
  captions = given.captions(args)
  _check_texts(args, captions)
  # Before the network needs the memory, the encoders have it.
  parts = pipeline.open(args.workdir)
  if args.tiles and (args.latents or not parts):
    raise errors.UserError(
      "--tiles is how the autoencoder of config.pipeline makes pictures, and "
      + ("--latents leaves it out." if args.latents else "this run has none.")
    )
  texts = None
  if parts and captions:
    texts = pipeline.texts(parts, captions, args.negative_prompt)
  size = pipeline.latent_size(parts, args.size)
  found = restored.open(args.workdir, ema=args.ema, image_size=size)
  restored.require_field(found, "sample")
  shows = shown.read(args, found, parts)
  texts = texts or (shows.cond if shows else _texts(args, captions, found))
  start = given.start(args.start, found) if args.start else None
  edit = edits.read(args, found, parts)
  starts = start if edit is None else edit.images
  each = shows.each if shows else 1
  count = args.num or each * _count(args, texts, starts)
  if args.guidance:
    args.guidance = args.guidance[:count]
  method = _method(args, found)
  worse = restored.worse(args.worse, found, ema=args.ema)
  if worse and method.guidance.scale == 1.0:
    raise errors.UserError(
      "--worse has no effect at guidance scale 1; set --guidance above it."
    )
  originals: np.ndarray | None = None
  own: dict[str, Any] = {}
  if args.invert:
    originals, own = drawing.held_out(found.run, count)
  as_held = args.invert and not (args.labels or texts)
  cond = own if as_held else _cond(args, found, texts, count, edit)
  cond = {**cond, **given.sizes(args, found, count)}
  if originals is not None:
    start = _inverted(found, method, own, originals)
  with progress.counter("samples", count) as done:
    images = found.draw(
      cond,
      seed=args.seed,
      done=done,
      method=method,
      scales=_scales(args.guidance, count),
      worse=worse,
      count=count,
      **_begun(start, edit, count),
    )
  if originals is not None:
    _print_difference(
      images - originals, args.guidance or (method.guidance.scale,)
    )
  beside = []  # What is shown has a sheet of its own.
  if edit is not None:
    beside = edit.beside(found.config.task, count)
  elif shows is None and originals is None:
    beside = drawing.beside(found.run, cond)
  if parts and not args.latents:
    images = pipeline.pictures(parts, images, tiled=args.tiles)
    beside = [pipeline.pictures(parts, each) for each in beside]
    if originals is not None:
      originals = pipeline.pictures(parts, originals, tiled=args.tiles)
  if distributed.is_first():
    if texts is None:
      captions = drawing.captions(found.run, count)
    named = captions if originals is None else []
    _write(images, originals, args.out, named, shows, beside)
  print(f"{count} samples of step {found.step}: {args.out}")


def _check_out(args) -> None:
  """Refuses an --out that cannot be written, or is what a user gave or made."""
  workdir.require_writable(args.out, "--out")
  for flag in ("init_image", "mask", "start", "embeddings", "boxes", "image"):
    value = getattr(args, flag, None)
    for path in value if isinstance(value, list) else [value]:
      if path and path.resolve() == args.out.resolve():
        raise errors.UserError(
          f"--out={args.out} is what --{flag.replace('_', '-')} is read from, "
          "and would be lost. Name another file."
        )
  if args.out.suffix.lower() == ".png":
    pictures.require_own(args.out, "--out")


def _check_texts(args, captions: list[str]) -> None:
  """Refuses texts that were given in two ways, or without their half."""
  if args.labels and (captions or args.embeddings):
    raise errors.UserError(
      f"--labels={args.labels}: texts were given, too, and no network is told "
      "both. Leave out --labels, or the texts."
    )
  if args.embeddings and (captions or args.negative_prompt is not None):
    raise errors.UserError(
      "--embeddings are texts already, a negative one among them: leave out "
      "--prompt, --prompts and --negative-prompt."
    )
  if args.negative_prompt is not None and not captions:
    raise errors.UserError(
      "--negative-prompt is what to be guided away from: say by --prompt what "
      "is to be drawn."
    )


def _texts(
  args, captions: list[str], found: restored.Restored
) -> dict[str, Any] | None:
  """Returns what was given for a network that reads, if anything was."""
  if captions:
    return given.prompts(captions, args.negative_prompt, found)
  return given.texts(args.embeddings, found) if args.embeddings else None


def _method(
  args: argparse.Namespace, found: restored.Restored
) -> methods.SampleConfig:
  """Returns how images are drawn: what is inverted, as it was, unguided."""
  method = restored.method(found.config, args)
  restored.refuse_unheeded(found, method, args)
  guidance = "--config.sample.guidance."
  said = args.guidance or any(w.startswith(guidance) for w in args.overrides)
  texts = args.embeddings or args.prompt or args.prompts
  if args.invert and not (said or args.labels or texts):
    return dataclasses.replace(method, guidance=methods.GuidanceConfig())
  return method


def _count(args, texts: dict | None, start: np.ndarray | None) -> int:
  """Returns a number of images that uses all conditions, starts and scales."""
  scales = len(args.guidance or (1.0,))
  given = [len(args.labels.split(","))] if args.labels else []
  given += [] if texts is None else [len(jax.tree.leaves(texts)[0])]
  given += [] if start is None else [len(start)]
  return math.lcm(*given, scales) if given else math.ceil(100 / scales) * scales


def _scales(given: tuple[float, ...] | None, count: int) -> np.ndarray | None:
  """Returns a scale for each image, in turn, unless all are the same."""
  if given is None or len(set(given)) == 1:
    return None
  return np.resize(np.asarray(given, np.float32), count)


def _begun(
  start: np.ndarray | None, edit: edits.Edits | None, count: int
) -> dict[str, Any]:
  """Returns the options of `draw` that say from what."""
  if edit is not None:
    return edit.turns(count)
  return {"starts": None if start is None else _in_turn(start, count)}


def _in_turn(rows: np.ndarray, count: int) -> np.ndarray:
  return rows[np.arange(count) % len(rows)]


def _cond(
  args, found, texts: dict | None, count: int, edit: edits.Edits | None
) -> dict[str, Any]:
  of_edit = edit.told(count) if edit else {}
  if texts is not None:
    return {
      **jax.tree.map(lambda leaf: _in_turn(leaf, count), texts),
      **(of_edit or drawing.context(found.run, count)),
    }
  if models.told(found.config.model) == "nothing":
    if args.labels:
      raise errors.UserError(
        f"--labels={args.labels}: this network is told nothing, and draws what "
        "all its images have in common. Leave it out."
      )
    return of_edit or drawing.context(found.run, count)
  if drawing.reads_text(found.run.network):
    if args.labels:
      raise errors.UserError(
        "--labels are for a network of labels; this one reads texts: give "
        "--prompt or --embeddings, or nothing for those that are held out."
      )
    try:
      return {**drawing.conditions(found.run, count), **of_edit}
    except errors.UserError as error:
      raise type(error)(
        f"{error} Or say what is to be drawn, by --prompt or --embeddings."
      ) from error
  classes, labels = found.config.model.num_classes, None
  if args.labels or of_edit:  # Else those of what is held out.
    labels = restored.parse_labels(args.labels, count, classes)
    labels = labels.astype(np.int32)
  if of_edit:
    return {**of_edit, "label": labels}
  return drawing.conditions(found.run, count, labels)


def _inverted(
  found: restored.Restored,
  method: methods.SampleConfig,
  cond: dict[str, Any],
  images: np.ndarray,
) -> np.ndarray:
  starts = found.draw(
    cond,
    seed=0,
    method=method,
    inverse=True,
    starts=images,
    count=len(images),
  )
  print(
    f"{len(images)} held-out images as noise: mean {starts.mean():.3f}, "
    f"standard deviation {starts.std():.3f}"
  )
  return starts


def _print_difference(away: np.ndarray, scales: tuple[float, ...]) -> None:
  shown = ", ".join(f"{scale:g}" for scale in scales)
  print(
    f"drawn again at guidance scale {shown}, they differ by "
    f"{np.sqrt(np.mean(np.square(away))):.4f} (root mean square)"
  )


def _write(
  images,
  originals: np.ndarray | None,
  out: pathlib.Path,
  captions: list[str],
  shows: shown.Shown | None,
  beside: list[np.ndarray],
) -> None:
  if out.suffix.lower() == ".npy":
    np.save(out, images)
    return
  if shows is not None:
    pictures.save_png(shows.sheet(images), out)
    return
  if originals is not None:
    pictures.save_png(pictures.pairs(originals, images), out)
    return
  if captions:
    captions = [captions[i % len(captions)] for i in range(len(images))]
  pictures.save_png(pictures.sheet(images, captions, beside=beside), out)
