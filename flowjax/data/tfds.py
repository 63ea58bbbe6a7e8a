"""Data sets prepared by TensorFlow Datasets, read without tensorflow."""

import dataclasses
import difflib
import hashlib
import os
from typing import Any

import numpy as np

from flowjax import errors
from flowjax.data import config as config_lib
from flowjax.data import images, sources, texts


@dataclasses.dataclass(frozen=True)
class Tfds:
  """One split of a prepared builder, in the order of its files."""

  name: str
  data: Any  # Its records have the image still encoded.
  image_key: str
  told_key: str | None  # Of its label, or of its text; of images alone None.
  class_names: tuple[str, ...]  # None of them: it has no labels.
  read: images.Reader
  shards: tuple[tuple[str, int, int], ...]  # Path, records skipped and taken.

  @property
  def num_classes(self) -> int:
    return len(self.class_names)

  @property
  def shape(self) -> tuple[int, int, int]:
    return self.read.shape

  def __len__(self) -> int:
    return len(self.data)

  def __getitem__(self, i: int) -> sources.Record:
    record = self._record(i)
    content = record[self.image_key] or b""
    image = self.read.record(content, self._place(i))
    if self.told_key is None:
      return image
    if not self.num_classes:
      caption = texts.decode(_bytes(record[self.told_key]), self._place(i))
      return {**image, "caption": caption}
    label = np.asarray(record[self.told_key], np.int32)
    if not 0 <= label < self.num_classes:
      raise errors.DataError(
        f"{self._place(i)} has the label {label}, which is out of range: there "
        f"are {self.num_classes} classes. -1 marks a split without labels: "
        "take another by config.data.train_split or eval_split."
      )
    return {**image, "label": label}

  def _record(self, i: int) -> dict[str, Any]:
    try:
      return self.data[i]
    except RuntimeError as error:
      # What array_record says of a broken checksum; the rest is the disk's.
      corrupt = str(error).startswith("Corrupted")
      kind = sources.Corrupt if corrupt else errors.DataError
      raise kind(f"{self._place(i)} cannot be read: {error}.") from error

  def _place(self, i: int) -> str:
    for path, skip, take in self.shards:
      if i < take:
        return f"Record {skip + i} of {path}"
      i -= take
    raise AssertionError(f"{self.name} has no record {i}.")

  def fingerprint(self) -> dict[str, Any]:
    rows = [(os.path.basename(path), *rest) for path, *rest in self.shards]
    told = {"classes": list(self.class_names)}
    if not self.num_classes:
      told = {"captions": [self.told_key] if self.told_key else []}
    return {
      "records": len(self),
      **told,
      "hash": hashlib.blake2b(repr(rows).encode(), digest_size=8).hexdigest(),
    }


def open(config: config_lib.DataConfig, split: str) -> Tfds:
  """Opens the builder that `config.source` names, from files on this disk."""
  images.check_channels(config.channels)
  read = images.reader(config)
  tfds = _library()
  name = config.source.partition(":")[2]
  builder = _builder(tfds, name, config.data_dir)
  features = builder.info.features
  image_key = _key(builder, tfds.features.Image, "image", config.image_key)
  told_key, class_names = _told(tfds, builder, config)
  field = "train_split" if split == "train" else "eval_split"
  instructions = _instructions(builder, getattr(config, field), field)
  try:
    data = builder.as_data_source(
      getattr(config, field), decoders=_encoded(tfds, features)
    )
  except NotImplementedError as error:
    raise errors.DataError(
      f"{builder.data_dir} holds {builder.info.file_format.value} files, which "
      f"cannot be read in any order. {_how_to_prepare(name, config.data_dir)}"
    ) from error
  return Tfds(
    name=f"tfds:{builder.info.full_name}[{getattr(config, field)}]",
    data=data,
    image_key=image_key,
    told_key=told_key,
    class_names=class_names,
    read=read,
    shards=_shards(tfds, instructions),
  )


def _library():
  try:
    import tensorflow_datasets as tfds
  except ImportError as error:
    raise errors.UserError(
      f"The source 'tfds' cannot be used ({error}): pip install -e '.[tfds]'"
    ) from error
  return tfds


def _builder(tfds, name: str, data_dir: str | None):
  try:
    builder = tfds.builder(name, data_dir=data_dir)
  except (tfds.core.DatasetNotFoundError, AssertionError, ValueError) as error:
    reason = str(error).strip().partition("\n")[0]
    known = tfds.list_builders(with_community_datasets=False)
    near = difflib.get_close_matches(name.split("/")[0], known, n=1)
    hint = f"Did you mean {near[0]!r}? " if near else ""
    raise errors.DataError(
      f"TensorFlow Datasets cannot open {name!r}: {reason} {hint}"
      + _how_to_prepare(near[0] if near else name, data_dir)
    ) from error
  if not (tfds.core.Path(builder.data_dir) / "dataset_info.json").exists():
    raise errors.DataError(
      f"{name!r} is not prepared: there is no {str(builder.data_dir)!r}. "
      + _how_to_prepare(name, data_dir)
    )
  # Read back by its files, it can be sent to a worker whatever its code is.
  return tfds.builder_from_directory(builder.data_dir)


def _how_to_prepare(name: str, data_dir: str | None) -> str:
  place = f" --data_dir={data_dir}" if data_dir else ""
  return (
    "Prepare it once, where tensorflow is installed: "
    f"tfds build {name} --file_format=array_record{place} "
    "(config.data.data_dir says where it then lies)."
  )


def _told(tfds, builder, config) -> tuple[str | None, tuple[str, ...]]:
  """Returns the feature that says what is in an image, and its classes.

  That is the label where there is one, unless the config asks for captions; and
  of images alone there is none.
  """
  if config.images_alone:
    return None, ()
  features = builder.info.features
  labels = _of_kind(features, tfds.features.ClassLabel)
  texts_only = not labels and _of_kind(features, tfds.features.Text)
  asked = config.captions or config.caption_key is not None
  if asked or (config.captions is None and texts_only):
    text = _key(builder, tfds.features.Text, "caption", config.caption_key)
    return text, ()
  key = _key(builder, tfds.features.ClassLabel, "label")
  return key, tuple(features[key].names)


def _key(builder, kind: type, usual: str, asked: str | None = None) -> str:
  """Returns the feature of this kind: the one asked for, or the usual one."""
  found = _of_kind(builder.info.features, kind)
  if asked in found:
    return asked
  if asked is None and usual in found:
    return usual
  if asked is None and len(found) == 1:
    return found[0]
  wanted = "one" if asked is None else repr(asked)
  raise errors.DataError(
    f"{builder.info.full_name} should have {wanted} of the kind "
    f"{kind.__name__}, and has {', '.join(found) or 'none'}; its features are "
    f"{', '.join(builder.info.features)}. config.data.image_key and "
    "caption_key name what is to be read."
  )


def _of_kind(features, kind: type) -> list[str]:
  return [key for key in features if isinstance(features[key], kind)]


def _bytes(text) -> bytes:
  return text.encode() if isinstance(text, str) else text


def _encoded(tfds, features) -> dict[str, Any]:
  """Leaves images encoded: ours are decoded, cut and reported in one way."""
  return {
    key: tfds.decode.SkipDecoding()
    for key in features
    if isinstance(features[key], tfds.features.Image)
  }


def _instructions(builder, part: str, field: str):
  try:
    return builder.info.splits[part].file_instructions
  except (KeyError, ValueError) as error:
    raise errors.DataError(
      f"{builder.info.full_name} has no records in the split {part!r}: it has "
      f"{', '.join(builder.info.splits)}. Set config.data.{field}."
    ) from error


def _shards(tfds, instructions) -> tuple[tuple[str, int, int], ...]:
  shards = tuple((str(i.filename), i.skip, i.take) for i in instructions)
  missing = [path for path, *_ in shards if not tfds.core.Path(path).exists()]
  if missing:
    raise errors.DataError(
      f"{len(missing)} of {len(shards)} files are missing, the first is "
      f"{missing[0]}: the copy or the preparation of the data is incomplete."
    )
  return shards
