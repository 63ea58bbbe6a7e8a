"""A folder that `flowjax encode` wrote: latents, or images, in any order.

A record has "mean" and "log_variance", of which training samples the latents,
or an "image"; a label, or the embedded text, or a caption; and "size" and
"crop" of the original where the source knew them. Embeddings and latents are in
the dtype that they are stored in. The splits are those of the source that was
encoded.
"""

# Shape suffixes: B batch of one process, S shards and their end.

import dataclasses
import functools
import hashlib
import itertools
import pathlib
import resource
from collections.abc import Sequence
from typing import Any

import numpy as np

from flowjax import errors, schema
from flowjax.data import (
  archive,
  buckets,
  embeddings,
  reading,
  records,
  sources,
)
from flowjax.data import config as config_lib

KIND = "arrayrecord"


@dataclasses.dataclass(frozen=True)
class Encoded:
  """What is known of a folder of records without opening a shard."""

  folder: pathlib.Path
  index: archive.Index

  @property
  def about(self) -> Any:
    return self.index.plan.about

  @property
  def shape(self) -> tuple[int, int, int]:
    height, width, channels = self.about["shape"]
    return height, width, channels

  @property
  def layout(self) -> records.Layout:
    return self.index.plan.layout

  @property
  def latents(self) -> bool:
    """Whether the records are latents, and not images."""
    return "mean" in self.layout.names

  @functools.cached_property
  def texts(self) -> embeddings.Texts | None:
    """The sizes of the embedded texts, if there are any."""
    values = self.about["texts"]
    return None if values is None else embeddings.Texts.from_json(values)

  @functools.cached_property
  def empty(self) -> dict[str, np.ndarray] | None:
    """The embedded empty caption, without a dim of examples, if known."""
    if self.texts is None or self.index.empty is None:
      return None
    path = self.folder / archive.EMPTY
    try:
      if archive.checksum(path) != self.index.empty:
        raise ValueError("it is not what was written")
      fields = self.layout.unpack([path.read_bytes()])
    except (OSError, ValueError) as error:
      raise errors.DataError(
        f"{path}, the empty caption, cannot be read: {error}. Copy it again."
      ) from error
    return {k: v[0] for k, v in self.texts.together(fields).items()}

  @property
  def origin(self) -> dict[str, Any]:
    """What all buckets of a folder must have in common."""
    about = self.about
    return {
      # In which dtype they computed is no matter.
      "frozen": about["frozen"] and {**about["frozen"], "dtype": None},
      "texts": about["texts"],
      "class_names": about["class_names"],
      "fields": {field.name: field.dtype for field in self.layout.fields},
    }

  def read(self, parts: Sequence[bytes]) -> dict[str, np.ndarray]:
    """Returns the batch that records are; raises ValueError for a broken one.

    A caption is left out where it is embedded.
    """
    batch = self.layout.unpack(parts)
    del batch[archive.NUMBER]
    if self.texts is not None:
      batch.pop("caption", None)
      batch |= self.texts.together(batch)
    if "image" in batch:
      batch["image"] = _pixels(batch["image"])
    return batch

  def blank(self) -> dict[str, np.ndarray]:
    """Returns an example of zeros."""
    return {key: value[0] for key, value in self.read([self._zeros()]).items()}

  def _zeros(self) -> bytes:
    return bytes(self.layout.dtype.itemsize)


@dataclasses.dataclass(frozen=True)
class ArrayRecord:
  """One split of a folder. Shards are opened when they are read."""

  encoded: Encoded
  split: str
  first_S: np.ndarray  # How many records lie before each shard, and in all.

  @property
  def name(self) -> str:
    return f"{KIND}:{self.encoded.folder.name}"

  @property
  def shape(self) -> tuple[int, int, int]:
    return self.encoded.shape

  @property
  def class_names(self) -> tuple[str, ...]:
    return tuple(self.encoded.about["class_names"])

  @property
  def num_classes(self) -> int:
    return len(self.class_names)

  @functools.cached_property
  def blank(self) -> dict[str, np.ndarray]:
    """An example of zeros, with which a batch is filled up."""
    return self.encoded.blank()

  def __len__(self) -> int:
    return int(self.first_S[-1])

  def __getitem__(self, i: int) -> dict[str, Any]:
    batch = self._read(np.array([i % len(self)]))
    return {key: value[0] for key, value in batch.items()}

  def gather(self, records_B: np.ndarray) -> dict[str, np.ndarray]:
    """Reads a batch at once; raises `Corrupt` where one record of it is."""
    batch = self._read(np.asarray(records_B) % len(self))
    return batch | {"skipped": np.zeros(len(records_B), np.int32)}

  def captions(self, records_B: Sequence[int]) -> list[str]:
    """Returns the captions of records, also where they are embedded."""
    if not self.encoded.layout.captioned:
      raise errors.UserError(f"{self.name} has no captions.")
    parts = self._parts(np.asarray(records_B))
    return self.encoded.layout.unpack(parts)["caption"].tolist()

  def fingerprint(self) -> dict[str, Any]:
    found = self.encoded.index.shards[self.split]
    listing = "\n".join(shard.checksum for shard in found).encode()
    return {
      "records": len(self),
      "classes": list(self.class_names),
      "hash": hashlib.blake2b(listing, digest_size=8).hexdigest(),
    }

  def _read(self, records_B: np.ndarray) -> dict[str, np.ndarray]:
    parts = self._parts(records_B)
    try:
      return self.encoded.read(parts)
    except ValueError as error:
      place = self._place(int(records_B[0]))
      raise sources.Corrupt(f"{place}, or one near it: {error}.") from error

  def _parts(self, records_B: np.ndarray) -> list[bytes]:
    """Returns the bytes of records; a shard is asked once for all of its."""
    shard_B = np.searchsorted(self.first_S, records_B, side="right") - 1
    inside_B = records_B - self.first_S[shard_B]
    order_B = np.argsort(shard_B, kind="stable").tolist()
    groups = [
      list(rows) for _, rows in itertools.groupby(order_B, shard_B.__getitem__)
    ]

    def read(rows: list[int]) -> list[bytes]:
      path = self._path(int(shard_B[rows[0]]))
      try:
        return _reader(str(path)).read(inside_B[rows].tolist())
      except RuntimeError as error:
        # What array_record says of a broken checksum; the rest is the disk's.
        corrupt = str(error).startswith("Corrupted")
        kind = sources.Corrupt if corrupt else errors.DataError
        place = self._place(int(records_B[rows[0]]))
        raise kind(f"{place} cannot be read: {error}.") from error

    parts: list[bytes] = [b""] * len(records_B)
    for rows, found in zip(groups, reading.mapped(read, groups), strict=True):
      for row, part in zip(rows, found, strict=True):
        parts[row] = part
    return parts

  def _path(self, shard: int) -> pathlib.Path:
    return self.encoded.folder / archive.name(self.split, shard)

  def _place(self, i: int) -> str:
    shard = int(np.searchsorted(self.first_S, i, side="right")) - 1
    return f"Record {i - self.first_S[shard]} of {self._path(shard)}"


def open(
  config: config_lib.DataConfig, split: str
) -> ArrayRecord | buckets.Bucketed:
  """Opens `split` of the folder that `config.source` names.

  Every shard must be there and as long as it was written.
  """
  folder = _folder(config)
  every = _every(folder)
  _check_buckets(folder, every, config)
  if not config.buckets:
    return _split(every[0], config, split)
  # Not all need to have records of each split.
  have = [one for one in every if one.index.plan.splits.get(split)]
  parts = [_split(one, config, split) for one in have or every[:1]]
  return buckets.of_parts(f"{KIND}:{folder.name}", parts, config, split)


def _split(
  encoded: Encoded, config: config_lib.DataConfig, split: str
) -> ArrayRecord:
  if not encoded.index.plan.splits.get(split):
    raise errors.DataError(
      f"{encoded.folder} has no records of the split {split!r}: encode it with "
      "--splits=train,held_out, or do without by config.log.validation_every=0."
    )
  if encoded.latents and config.flip:
    raise errors.UserError(
      "config.data.flip=True: a mirrored latent is not the latent of the "
      "mirrored image. Set False."
    )
  archive.check_sizes(encoded.folder, encoded.index, split)
  return ArrayRecord(
    encoded, split, archive.first_records(encoded.index, split)
  )


def of(config: config_lib.DataConfig) -> Encoded | None:
  """Returns what is known of the encoded folder of a config, if it is one.

  Of buckets, of that of the reference, or of the first: they differ in shape.
  """
  if config.source.partition(":")[0] != KIND:
    return None
  every = _every(_folder(config))
  same = [one for one in every if one.shape[:2] == tuple(config.image_size)]
  return (*same, *every)[0]


def _folder(config: config_lib.DataConfig) -> pathlib.Path:
  place = config.source.partition(":")[2]
  return pathlib.Path(place).expanduser().absolute()


def _every(folder: pathlib.Path) -> list[Encoded]:
  """Returns what is known of each bucket of a folder, or of the only one."""
  found = []
  for part in archive.folders(folder):
    path = part / archive.INDEX
    found.append(_of(part, path.stat().st_mtime_ns if path.exists() else None))
  return found


def _check_buckets(
  folder: pathlib.Path, every: list[Encoded], config: config_lib.DataConfig
) -> None:
  """Refuses buckets of a config that are not those of the records."""
  wanted = {(*size, config.channels) for size in config.buckets}
  divided = every[0].folder != folder
  if not divided and wanted:
    raise errors.UserError(
      f"config.data.buckets={config.buckets}: the records of {folder} are all "
      "of one size. Set buckets=(), or encode again with buckets."
    )
  found = sorted({one.shape for one in every})
  if divided and not wanted.issuperset(found):
    sizes = tuple(shape[:2] for shape in found)
    raise errors.UserError(
      f"config.data.buckets={config.buckets} with channels={config.channels} "
      f"are not those of {folder}, whose records are of {found}: set "
      f"buckets={sizes}, image_size to one of them, and channels="
      f"{found[0][2]}."
    )
  for other in every[1:]:
    _check_alike(every[0], other)


def _check_alike(one: Encoded, other: Encoded) -> None:
  """Refuses buckets that others encoded: they would train as one."""
  rows = schema.difference(one.origin, other.origin, "records")
  if not rows and not _same(one.empty, other.empty):
    rows = ["records.empty: the embedded empty caption is another"]
  if rows:
    raise errors.DataError(
      f"{one.folder} and {other.folder} were not encoded alike:\n  "
      + "\n  ".join(rows)
      + f"\n({one.folder.name} -> {other.folder.name}). Encode both by the "
      "same networks, in one `flowjax encode`."
    )


def _same(one: Any, other: Any) -> bool:
  """Whether two embeddings are one, but for how their devices rounded."""
  if one is None or other is None:
    return one is other
  return all(
    np.allclose(other[key], value, rtol=0, atol=0.05 * np.max(np.abs(value)))
    for key, value in one.items()
  )


@functools.lru_cache(maxsize=64)
def _of(folder: pathlib.Path, changed: int | None) -> Encoded:
  del changed
  return Encoded(folder, archive.read(folder))


def _pixels(image: np.ndarray) -> np.ndarray:
  if image.dtype == np.uint8:
    return image.astype(np.float32) / 127.5 - 1.0
  return image.astype(np.float32)


def _most_readers() -> int:
  """Returns how many shards may be open: a share of the files that may be."""
  soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
  return (
    4096 if soft == resource.RLIM_INFINITY else max(64, min(soft // 2, 4096))
  )


@functools.lru_cache(maxsize=_most_readers())
def _reader(path: str) -> Any:
  """Opens a shard; its index takes 8 bytes a record."""
  reader = archive.library().ArrayRecordReader(
    path, archive.READING, file_reader_buffer_size=2**15
  )
  if not reader.ok():
    raise errors.DataError(
      f"{path} cannot be opened: it is no whole ArrayRecord file. `flowjax "
      "encode --verify` looks at all shards."
    )
  return reader
