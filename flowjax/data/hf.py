"""Data sets in local parquet or arrow files, as Hugging Face keeps them.

hf:<dir, file or pattern>. An image is a column of bytes, or of structs with
"bytes"; what is in it a column of strings, or of class labels, whose names are
in the schema. A group of rows is decoded as a whole: the order of training
deals out a few groups together, so that each is decoded about once an epoch.
"""

# Shape suffixes: F files, G groups of all files, N rows of a group.

import dataclasses
import functools
import hashlib
import io
import logging
import os
import pathlib
import re
from typing import Any

import numpy as np

from flowjax import errors
from flowjax.data import columns as columns_lib
from flowjax.data import config as config_lib
from flowjax.data import (
  images,
  listing,
  order,
  shards,
  sizes,
  sources,
  tables,
  texts,
  webdataset,
  windows,
)

# Of decompressed groups that are dealt out together.
WINDOW_BYTES = 128 * 2**20
LARGE_GROUP = 2**30
SPLITS = {"train", "test", "validation", "valid", "val", "dev"}

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Place:
  """A group of rows: its file, its number there, and its first row."""

  path: str
  group: int
  first: int
  rows: int
  lost: np.ndarray | None  # Rows to be left out, bool [N].

  def kept(self, fraction: float, split: str) -> np.ndarray:
    """Returns its rows in a split: held out are some by file and number."""
    keep_N = np.ones(self.rows, bool) if self.lost is None else ~self.lost
    if fraction:
      row_N = np.arange(self.first, self.first + self.rows, dtype=np.uint64)
      key = order.mix(listing.hashed(os.path.basename(self.path)))
      held_N = listing.held_out(order.mix(key ^ row_N), fraction)
      keep_N &= held_N == (split == "held_out")
    elif split == "held_out":
      keep_N[:] = False
    return np.flatnonzero(keep_N)


@dataclasses.dataclass(frozen=True, eq=False)
class Hf:
  """One split of the rows of some files, in the order of their names."""

  name: str
  places: tuple[Place, ...]
  split: tuple[float, str]
  windows: windows.Windows
  columns: columns_lib.Columns
  read: images.Reader
  cache: tables.Cache
  index_dir: str | None = None

  @property
  def class_names(self) -> tuple[str, ...]:
    return self.columns.class_names

  @property
  def num_classes(self) -> int:
    return len(self.class_names)

  @property
  def shape(self) -> tuple[int, int, int]:
    return self.read.shape

  def __len__(self) -> int:
    return self.windows.total

  def draw(self, seed: int, position_B: np.ndarray) -> np.ndarray:
    """Returns the record of each position; neighbours share a few groups."""
    return self.windows.draw(seed, position_B)

  def __getitem__(self, i: int) -> sources.Record:
    begin_G = self.windows.begin_G
    number = int(np.searchsorted(begin_G, i, side="right")) - 1
    place = self.places[number]
    group, row_N = self.cache.get(number, functools.partial(self._group, place))
    row = int(row_N[i - int(begin_G[number])])
    name = f"Row {place.first + row} of {place.path}"
    content = _bytes(group.column(self.columns.image)[row])
    image = self.read.record(content or b"", name)
    if self.columns.told is None:
      return image
    told = group.column(self.columns.told)[row]
    if not self.num_classes:
      text = b"" if not told.is_valid else told.as_buffer().to_pybytes()
      return {**image, "caption": texts.decode(text, name)}
    label = told.as_py()
    if label is None or not 0 <= label < self.num_classes:
      raise errors.DataError(
        f"{name} has the label {label}, which is out of range: there are "
        f"{self.num_classes} classes. It is of a split without labels."
      )
    return {**image, "label": np.int32(label)}

  def sizes(self) -> np.ndarray:
    """Returns the height and width of each original, [N, 2]."""
    found, known = [], {}
    for place in self.places:
      path = place.path
      if path not in known:
        at = shards.index_path(f"{path}.sizes", self.index_dir)
        make = functools.partial(_sizes, path, self.columns.image)
        known = {path: sizes.kept(path, at, make)}  # Files come in order.
        known[path].warn(path)
      found.append(known[path].of(place.first + place.kept(*self.split)))
    return np.concatenate(found)

  def cut(self, image_size: tuple[int, int]) -> "Hf":
    """Returns the same images, cut to another size, with groups of its own."""
    read, cache = self.read.cut(image_size), self.cache.empty()
    return dataclasses.replace(self, read=read, cache=cache)

  def _group(self, place: Place) -> tuple[Any, np.ndarray]:
    table = tables.open(place.path).read(place.group, self.columns.all)
    return table, place.kept(*self.split)

  def fingerprint(self) -> dict[str, Any]:
    """Returns what the order of the records hangs on, as JSON can hold it."""
    told = {"classes": list(self.class_names)}
    if not self.num_classes:
      told = {"captions": list(self.columns.all[1:])}
    rows = [
      (os.path.basename(place.path), place.group, place.rows, int(count))
      for place, count in zip(self.places, self.windows.count_G, strict=True)
    ]
    return {
      "records": len(self),
      **told,
      "window": self.windows.size,
      "hash": hashlib.blake2b(repr(rows).encode(), digest_size=8).hexdigest(),
    }


def open(config: config_lib.DataConfig, split: str) -> Hf:
  """Opens the files that `config.source` names; nothing is downloaded."""
  read = images.reader(config)
  tables.library()
  place = os.path.expanduser(config.source.partition(":")[2])
  files = _sound(find(place), config)
  columns = columns_lib.choose(files[0], config)
  for file in files:
    _check_schema(file, files[0], columns)
  groups = [(file, file.groups(columns.all)) for file in files]
  places = _places(groups, place, columns, config, split)
  count_G = np.array([len(p.kept(config.held_out, split)) for p in places])
  if not count_G.sum():
    raise errors.DataError(
      f"The split {split!r} of {place!r} is empty: of its "
      f"{sum(p.rows for p in places)} rows, config.data.held_out="
      f"{config.held_out} are held out. Change that fraction."
    )
  largest = max(1, *(group.size for _, each in groups for group in each))
  if largest > LARGE_GROUP:
    log.warning(
      "A row group of %r has %.1f GiB, and is read whole: write the files "
      "with smaller ones (100 to 1,000 images).", place, largest / 2**30,
    )  # fmt: skip
  # Each bucket is read in windows of its own, which share the memory.
  share = WINDOW_BYTES // max(1, len(config.buckets))
  window = max(1, min(len(places), share // largest))
  return Hf(
    name=f"hf:{os.path.basename(os.path.abspath(place))}",
    places=places,
    split=(config.held_out, split),
    windows=windows.Windows(count_G, window),
    columns=columns,
    read=read,
    cache=tables.Cache(2 * window),
    index_dir=config.index_dir,
  )


def find(place: str) -> list[str]:
  """Returns the files of a folder, or of a pattern as webdataset has them."""
  if not os.path.isdir(place):
    return webdataset.find(place)
  paths = sorted(
    str(path)
    for path in pathlib.Path(place).rglob("*")
    if path.name.endswith(tables.ENDINGS)
    # `datasets` keeps what it has computed in files of this name.
    and not path.name.startswith("cache-")
    and not any(p.startswith(".") for p in path.relative_to(place).parts)
  )
  if not paths:
    raise errors.DataError(
      f"There is no {' or '.join(tables.ENDINGS)} in {place!r}: correct "
      "config.data.source. Nothing is downloaded."
    )
  splits = sorted(
    {
      word
      for path in paths
      for word in re.split(r"[^a-z]+", os.path.relpath(path, place).lower())
      if word in SPLITS
    }
  )
  if len(splits) > 1:
    raise errors.DataError(
      f"{place!r} holds several splits, by the names of its files: "
      f"{', '.join(splits)}. Name those of one, such as "
      f"config.data.source='hf:{place}/**/{splits[-1]}*.parquet'; "
      "config.data.held_out divides it."
    )
  return paths


def _sound(paths: list[str], config) -> list[tables.File]:
  files, broken = [], []
  for path in paths:
    try:
      files.append(tables.open(path))
    except sources.Corrupt as error:
      broken.append(str(error))
  if broken and (config.on_corrupt == "stop" or not files):
    raise errors.DataError(
      f"{len(broken)} of {len(paths)} files are unsound. {broken[0]} Repair or "
      "remove them."
    )
  if broken:
    log.warning("%d of %d files are left out: %s",
      len(broken), len(paths), broken[0])  # fmt: skip
  return files


def _check_schema(file, first, columns: columns_lib.Columns) -> None:
  for name in columns.all:
    found = file.schema.field(name).type if name in file.schema.names else None
    if found != first.schema.field(name).type:
      raise errors.DataError(
        f"{file.path} has {name!r} as {found}, and {first.path} as "
        f"{first.schema.field(name).type}: files of one source are alike."
      )


def _places(
  groups, place: str, columns: columns_lib.Columns, config, split: str
) -> tuple[Place, ...]:
  """Lists the groups of all files, and which of their rows have no caption."""
  places: list[Place] = []
  missing = total = 0
  hint = ""
  for file, each in groups:
    first = 0
    for number, group in enumerate(each):
      lost_N = None
      if columns.told is not None and not columns.class_names:
        lost_N = file.missing(number, columns.told)
      if lost_N is not None:
        missing += int(lost_N.sum())
        row = first + int(np.flatnonzero(lost_N)[0])
        hint = hint or f"the first is row {row} of {file.path}"
      if config.on_no_caption == "empty":
        lost_N = None
      places.append(Place(file.path, number, first, group.rows, lost_N))
      first += group.rows
    total += first
  texts.without(missing, total, config, split, f"rows of {place}", hint)
  return tuple(places)


def _sizes(path: str, column: str) -> sizes.Sizes:
  """Returns the sizes of all images of a file, from their headers.

  Columns "height" and "width" are passed over: in data from the web they are
  often those of another file, from which this one was cut.
  """
  file = tables.open(path)
  parts, first = [], 0
  for number, group in enumerate(file.groups((column,))):
    try:
      images_N = file.read(number, (column,)).column(column)
    except sources.Corrupt:
      images_N = None  # When its rows are read, it is said.

    def measure(i: int, images_N=images_N) -> tuple[int, int] | None:
      if images_N is None:
        return None
      return images.size(io.BytesIO(_bytes(images_N[i]) or b""))

    def name(i: int, first=first) -> str:
      return f"row {first + i}"

    parts.append(sizes.measure(group.rows, measure, name))
    first += group.rows
  return sizes.joined(parts)


def _bytes(value) -> bytes | None:
  """Returns the bytes of an image, in a struct or by themselves."""
  found = value.as_py()
  return found.get("bytes") if isinstance(found, dict) else found
