"""What `flowjax encode` is to write: fields of a record, and their origin."""

# Shape suffixes: B batch, H height, W width, C channels.

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from flowjax import errors, schema
from flowjax.data import archive, embeddings, reading, records, sources
from flowjax.data import config as data_config

# What of config.data changes neither the records nor their order; nor does its
# batch_size without buckets, the smallest of which are merged by it.
_FREE = (
  "shuffle_seed", "workers", "flip", "prefetch", "data_dir",
  "on_corrupt", "index_dir", "tokenizer", "tokens", "words", "padded_patch",
)  # fmt: skip
# What a source may tell of an original, [2] each: its height and width, and
# where, from the top and from the left, it was cut.
ORIGINALS = ("size", "crop")


class Encoder(Protocol):
  """Frozen networks that turn images and captions into what is stored.

  One whose `embeds` is not 0 has `embed(image_BHWC)`, which returns so many
  numbers of each image.
  `encode(image_BHWC)` returns the mean and the log-variance of the latents;
  `texts(captions)` the condition {"text", "pooled"} and, where tokens can be
  padding, "text_mask". `fingerprint()` is JSON that tells these networks, and
  the scale and shift of the latents, from all others. One that has several
  text encoders says in `parts` where the words of each are.
  """

  def encode(self, image_BHWC: np.ndarray) -> tuple[Any, Any]: ...

  def texts(self, captions: list[str]) -> dict[str, Any]: ...

  def fingerprint(self) -> dict[str, Any]: ...


def plan(
  splits: Mapping[str, sources.Source],
  encoder: Encoder | None,
  config: data_config.DataConfig,
  *,
  dtype: str | None,
  shard_size: int,
  batch_size: int,
) -> archive.Plan:
  """Plans the shards of about `shard_size` bytes for the splits of a source.

  `dtype` is that of latents and embeddings, or of images; None is float16, and
  bytes for images of 1 or 3 channels.
  """
  source = next(iter(splits.values()))
  blank = sources.blank(source)
  if "image" not in blank or config.pair_source is not None:
    raise errors.UserError(
      f"{source.name} cannot be encoded: "
      + (
        "set config.data.pair_source=None, and encode each of the two."
        if config.pair_source is not None
        else "it holds latents already."
      )
    )
  fields = [records.Field(archive.NUMBER, "int64")]
  if encoder is None:
    found, shape, texts = _as_they_are(blank, dtype)
  else:
    found, shape, texts = _encoded(blank, encoder, dtype, batch_size)
  fields += found
  if "label" in blank:
    fields.append(records.Field("label", "int32"))
  for name, dtype_of in (("boxes", "float32"), ("box_mask", "uint8")):
    if name in blank:
      fields.append(records.Field(name, dtype_of, blank[name].shape))
  if config.originals:
    known = _first_sound(source)
    fields += [
      records.Field(name, "int32", (2,)) for name in ORIGINALS if name in known
    ]
  if texts:
    fields += texts.fields(_floats(dtype))
  layout = records.Layout(tuple(fields), "caption" in blank)
  chosen = schema.to_dict(config)
  free = _FREE if config.buckets else (*_FREE, "batch_size")
  data = {key: chosen[key] for key in chosen if key not in free}
  return archive.Plan(
    layout,
    {split: len(opened) for split, opened in splits.items()},
    max(1, shard_size // layout.dtype.itemsize),
    {
      "source": source.name,
      "fingerprints": {
        split: opened.fingerprint() for split, opened in splits.items()
      },
      "class_names": list(source.class_names),
      "shape": list(shape),
      "texts": texts.to_json() if texts else None,
      "frozen": encoder.fingerprint() if encoder else None,
      "data": data,
      "config_hash": _hash(data),
    },
  )


def empty(
  made: archive.Plan, encoder: Encoder | None, batch_size: int
) -> bytes | None:
  """Returns the record of the empty caption, its latents zero, if it has one.

  Dropping a text in training, and guidance, put it in the place of another.
  """
  if encoder is None or not made.about["texts"]:
    return None
  texts = embeddings.Texts.from_json(made.about["texts"])
  apart = texts.apart(encoder.texts([""] * batch_size))
  values = {
    field.name: np.zeros((1, *field.shape), np.float32)
    for field in made.layout.fields
  }
  values |= {name: np.asarray(value)[:1] for name, value in apart.items()}
  return made.layout.pack(values, [""])[0]


Found = tuple[list[records.Field], tuple[int, ...], embeddings.Texts | None]


def _as_they_are(blank: Mapping[str, Any], dtype: str | None) -> Found:
  """Returns fields for images, and for texts that are embedded already."""
  shape = tuple(np.shape(blank["image"]))
  texts = None
  if "text" in blank:
    texts = embeddings.whole(
      {key: np.asarray(value)[None] for key, value in blank.items()}
    )
  pixels = shape[-1] in (1, 3) and texts is None
  kind = dtype or ("uint8" if pixels else _floats(dtype))
  return [records.Field("image", kind, shape)], shape, texts


def _encoded(
  blank: Mapping[str, Any],
  encoder: Encoder,
  dtype: str | None,
  batch_size: int,
) -> Found:
  """Returns fields for what an encoder gives, which is asked once."""
  if dtype == "uint8":
    raise errors.UserError(
      "--dtype=uint8 is for images; latents are floats: --dtype=float16."
    )
  image_HWC = np.asarray(blank["image"])
  mean_BHWC, _ = encoder.encode(np.repeat(image_HWC[None], batch_size, axis=0))
  shape = tuple(np.shape(mean_BHWC)[1:])
  texts = None
  if "caption" in blank:
    texts = embeddings.whole(encoder.texts([""] * batch_size))
    if parts := getattr(encoder, "parts", ()):
      texts = dataclasses.replace(texts, parts=tuple(parts))
  fields = [
    records.Field(name, _floats(dtype), shape)
    for name in ("mean", "log_variance")
  ]
  if width := getattr(encoder, "embeds", 0):
    fields.append(records.Field("embedding", _floats(dtype), (width,)))
  return fields, shape, texts


def _first_sound(source: sources.Source) -> sources.Record:
  """Returns one record: what its source says of originals, all of it do."""
  for i in range(min(len(source), reading.IN_A_ROW)):
    try:
      return source[i]
    except sources.Corrupt:
      continue
  return {}


def _floats(dtype: str | None) -> str:
  return "float16" if dtype in (None, "uint8") else dtype


def _hash(values: Any) -> str:
  text = json.dumps(values, sort_keys=True, default=str)
  return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
