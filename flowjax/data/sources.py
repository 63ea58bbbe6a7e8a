"""Sources: sequences of images with labels or captions, opened by name."""

# Shape suffixes: B batch, H height, W width, C channels.

import dataclasses
import importlib
import logging
from typing import Any, Protocol

import numpy as np

from flowjax import errors, schema
from flowjax.data import config as config_lib
from flowjax.data import order, pairs

Record = dict[str, Any]

SPLITS = ("train", "held_out")
KINDS = {
  "digits": "digits or digits:<classes>",
  "scenes": "scenes",
  "tfds": "tfds:<name>",
  "folder": "folder:<dir>",
  "webdataset": "webdataset:<pattern>",
  "hf": "hf:<dir or files>",
  "embedded": "embedded:<dir>",
  "arrayrecord": "arrayrecord:<dir>",
  "mixture": "mixture",
}


class Source(Protocol):
  """A split of a data set, read by position and in any order.

  `source[i]` is {"image": float32 [H, W, C] in [-1, 1]} and
  - "label": int32, below `num_classes`, or
  - "caption": str, where `num_classes` is 0, or
  - an embedded text, as data/embedded.py says; then there is a `blank` one too;
  - or nothing more, where `config.images_alone` leaves it out.
  Of latents it has "mean" and "log_variance" in place of "image".

  It is the same at every call, and i + k * len(source) is record i or another
  variant of it. It raises `Corrupt` for a record that cannot be decoded.
  A source may also offer `gather(records_B)`, which returns the stacked
  examples at once, or raises `Corrupt` where one of them is; if one can be, it
  returns "skipped" too, zeros, as data/reading.py does. One whose order is not
  that of data/order.py offers `draw(seed, position_B)`, and one that can be
  divided among aspect buckets `sizes()` and `cut(image_size)`, as
  data/buckets.py says.
  """

  @property
  def name(self) -> str: ...

  @property
  def class_names(self) -> tuple[str, ...]: ...

  @property
  def shape(self) -> tuple[int, int, int]: ...

  @property
  def num_classes(self) -> int: ...

  def __len__(self) -> int: ...

  def __getitem__(self, i: int) -> Record: ...

  def fingerprint(self) -> dict[str, Any]:
    """Returns what the order of the records hangs on, as JSON can hold it."""


class Corrupt(errors.DataError):
  """One record that cannot be decoded. The text names its file."""


def open(config: config_lib.DataConfig, split: str) -> Source:
  """Opens `split`, "train" or "held_out", of the source that `config` names.

  With `pair_source`, of both sources, paired; with `buckets`, divided among
  them.
  """
  if split not in SPLITS:
    raise ValueError(f"split={split!r} must be one of {SPLITS}.")
  if config.pair_source is not None:
    alone = dataclasses.replace(config, pair_source=None)
    other = dataclasses.replace(
      alone, source=config.pair_source, mixture=(), tokenizer=None, words=()
    )
    both = open(alone, split), open(other, split)
    for source in both:
      if "image" not in blank(source):
        raise errors.UserError(
          f"{source.name} holds latents with their variance, which are not "
          "paired: encode images, or leave out config.data.pair_source."
        )
    return (_buckets().paired if config.buckets else pairs.paired)(*both)
  kind, _, place = config.source.partition(":")
  wants = kind in KINDS and "<" in KINDS[kind] and kind != "digits"
  if wants and not place:
    raise errors.UserError(
      f"The source {config.source!r} names nothing: it must be {KINDS[kind]}."
    )
  if kind not in KINDS or (place and "<" not in KINDS[kind]):
    known = ", ".join(KINDS.values())
    raise errors.UserError(
      f"Unknown source {config.source!r}: it must be one of {known}. "
      f"{schema.closest(kind, KINDS)}"
    )
  module = importlib.import_module(f"flowjax.data.{kind}")
  read = config
  if config.boxes:  # Which move with what is cut out of an original.
    read = dataclasses.replace(config, originals=True)
  source = module.open(read, split)
  if not config.buckets:
    return _told(source, config)
  divided = _buckets().divide(source, read, split)
  return divided.each(lambda part: _told(part, config))


def _told(source: Any, config: config_lib.DataConfig) -> Source:
  """Returns a source with the captions, tokens or boxes that are asked for."""
  if config.boxes:
    layouts = importlib.import_module("flowjax.data.layouts")
    return layouts.boxed(source, config)
  if config.images_alone:
    alone = importlib.import_module("flowjax.data.alone")
    return alone.alone(source)
  if config.templates and source.num_classes:
    texts = importlib.import_module("flowjax.data.texts")
    source = texts.Templated(source, config.templates)
  if (tokenizer := config.build_tokenizer()) is not None:
    captions = importlib.import_module("flowjax.data.captions")
    source = captions.captioned(source, tokenizer)
  return source


def _buckets() -> Any:
  return importlib.import_module("flowjax.data.buckets")


def draw(source: Any, seed: int, position_B: np.ndarray) -> np.ndarray:
  """Returns the record that a source has at each position of a run."""
  if hasattr(source, "draw"):
    return source.draw(seed, position_B)
  return order.records(seed, len(source), position_B)


def blank(source: Any) -> Record:
  """Returns a record of zeros, of the keys and shapes that all have."""
  if hasattr(source, "blank"):
    return source.blank
  image = np.zeros(source.shape, np.float32)
  if isinstance(source, pairs.Paired):
    return {**blank(source.first), "source": image}
  # What reads files knows what else it tells of them.
  found = source.read.blank() if hasattr(source, "read") else {"image": image}
  if not source.num_classes:
    return {**found, "caption": ""}
  return {**found, "label": np.int32(0)}


def check(
  source: Source,
  *,
  batch_size: int,
  num_classes: int | None,
  channels: int,
  image_size: tuple[int, int],
  text_width: int | None = None,
  pooled_width: int | None = None,
  embedding: int = 0,
) -> None:
  """Refuses a source that a model of these sizes cannot be trained on.

  To one that is told nothing, whose `num_classes` is None, labels and texts
  are nothing. One with an `embedding` is told so many numbers of each image,
  which the source has.
  """
  if "caption" in blank(source):
    reader = "a network that is told nothing passes them over"
    raise errors.UserError(
      f"{source.name} has captions, and nothing makes tokens of them: set "
      "config.data.tokenizer to 'bytes' or 'words', and "
      + ("config.text." if num_classes is not None else f"{reader}.")
      + " config.data.images_alone=True leaves them out."
    )
  if num_classes is None:
    num_classes = source.num_classes
  if (source.num_classes == 0) != (num_classes == 0):
    kind = ("labels", "texts")[source.num_classes == 0]
    raise errors.UserError(
      f"{source.name} has {kind}, and config.model.num_classes={num_classes} "
      "makes a model of the other kind: 0 reads texts, or nothing in a DiT, "
      "and anything above labels, for which an MM-DiT or a FLUX learns a text."
    )
  if source.num_classes < num_classes:
    logging.warning(
      "%s has %d classes, and the model has room for %d: those above are never "
      "trained. config.model.num_classes=%d would do.",
      source.name, source.num_classes, num_classes, source.num_classes,
    )  # fmt: skip
  if batch_size > len(source):
    logging.warning(
      "A batch of %d holds each of the %d images of %s more than once.",
      batch_size, len(source), source.name,
    )  # fmt: skip
  if source.num_classes > num_classes:
    raise errors.DataError(
      f"{source.name} has {source.num_classes} classes, so its labels go up to "
      f"{source.num_classes - 1}, but the model knows {num_classes}: set "
      f"config.model.num_classes={source.num_classes}."
    )
  height, width, depth = source.shape
  if (height, width) != tuple(image_size) or depth != channels:
    raise errors.UserError(
      f"{source.name} gives images of {height}x{width}x{depth}, but the model "
      f"takes {image_size[0]}x{image_size[1]}x{channels}: make image_size and "
      "channels of config.data and config.model the same."
    )
  empty = blank(source)
  found = np.shape(empty["embedding"]) if "embedding" in empty else None
  if embedding and found != (embedding,):
    raise errors.UserError(
      f"{source.name} should have an embedding of {embedding} numbers with "
      f"each image, and has {found or 'none'}: `flowjax encode` writes one by "
      "the image_encoder of a pipeline. Set config.embedding.size to what it "
      "has, or learn one by config.embedding.depth=2."
    )
  for key, wide in (("text", text_width), ("pooled", pooled_width)):
    if wide and key in empty and empty[key].shape[-1] != wide:
      raise errors.UserError(
        f"{source.name}: {key!r} is {empty[key].shape[-1]} wide, and "
        f"config.model.{key}_width={wide}: make them the same."
      )


def labelled(
  config: config_lib.DataConfig, split: str
) -> tuple[np.ndarray, np.ndarray]:
  """Returns every image and label of a source that fits into memory.

  Whatever a network is told of them.
  """
  plain = dataclasses.replace(
    config,
    images_alone=False,
    pair_source=None,
    templates=(),
    tokenizer=None,
    words=(),
  )
  source = open(plain, split)
  records = [source[i] for i in range(len(source))]
  images = np.stack([record["image"] for record in records])
  return images, np.array([record["label"] for record in records])
