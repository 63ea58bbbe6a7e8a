"""Tar shards of images with captions: webdataset:<pattern>.

A pattern has braces, {000..099} or {a,b}, and the wildcards of a shell. In a
shard, `cat.jpg` and `cat.txt` are one sample, or `cat.jpg` and `cat.json` with
its caption under "text"; of both the .txt is taken. An index beside each shard
(or in `index_dir`) gives random access.
"""

# Shape suffixes: M samples of a shard, S shards.

import dataclasses
import functools
import glob
import hashlib
import io
import itertools
import logging
import os
import re
import time
from typing import Any

import numpy as np

from flowjax import errors
from flowjax.data import config as config_lib
from flowjax.data import images, listing, shards, sizes, sources, texts

_HEAD = 2**16  # Bytes of an image that are read for its size.

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Choice:
  """Which samples of a shard are records."""

  latents: bool
  without_caption: bool
  held_out: float
  split: str

  def rows(self, shard: shards.Shard) -> np.ndarray:
    """Returns the samples that are records, in their order."""
    keep_M = shard.has(self.kind)
    if not self.without_caption:
      keep_M &= has_caption(shard)
    if self.held_out:
      held_M = listing.held_out(shard.hash_M, self.held_out)
      keep_M &= held_M == (self.split == "held_out")
    elif self.split == "held_out":
      keep_M[:] = False
    return np.flatnonzero(keep_M).astype(np.int32)

  @property
  def kind(self) -> str:
    return "latent" if self.latents else "image"


@dataclasses.dataclass(frozen=True)
class WebDataset:
  """One split of the samples of some shards, in the order of the shards."""

  paths: tuple[str, ...]
  index_dir: str | None
  end_S: np.ndarray  # Records up to the end of each shard.
  choice: Choice
  read: images.Reader
  caption_key: str
  name: str
  hash: str
  alone: bool = False  # Of no image anything is said.
  class_names: tuple[str, ...] = ()
  num_classes: int = 0

  @property
  def shape(self) -> tuple[int, int, int]:
    return self.read.shape

  def __len__(self) -> int:
    return int(self.end_S[-1])

  def __getitem__(self, i: int) -> sources.Record:
    number = int(np.searchsorted(self.end_S, i, side="right"))
    path = self.paths[number]
    shard, rows = _opened(path, self.index_dir, self.choice)
    row = int(rows[i - int(self.end_S[number]) + len(rows)])
    found = _member(path, shard, self.choice.kind, row)
    assert found is not None
    image = self.read.record(*found)
    if self.alone:
      return image
    return {**image, "caption": self._caption(path, shard, row)}

  def sizes(self) -> np.ndarray:
    """Returns the height and width of each original, [N, 2]."""
    found = []
    for path in self.paths:
      shard, row_M = _opened(path, self.index_dir, self.choice)
      place = shards.index_path(f"{path}.sizes", self.index_dir)
      known = sizes.kept(path, place, functools.partial(_sizes, path, shard))
      known.warn(path)
      found.append(known.of(row_M))
    return np.concatenate(found)

  def cut(self, image_size: tuple[int, int]) -> "WebDataset":
    """Returns the same images, cut to another size."""
    return dataclasses.replace(self, read=self.read.cut(image_size))

  def _caption(self, path: str, shard: shards.Shard, row: int) -> str:
    if text := _member(path, shard, "txt", row):
      return texts.decode(*text)
    if text := _member(path, shard, "json", row):
      content, name = text
      return texts.from_json(content, self.caption_key, name)
    return ""

  def fingerprint(self) -> dict[str, Any]:
    """Returns what the order of the records hangs on, as JSON can hold it."""
    told = {"captions": not self.alone}
    return {"records": len(self), **told, "hash": self.hash}


def open(config: config_lib.DataConfig, split: str) -> WebDataset:
  """Finds the shards of the pattern in `config.source`, and indexes them."""
  read = images.reader(config)
  pattern = os.path.expanduser(config.source.partition(":")[2])
  paths = find(pattern)
  found = _index(paths, config)
  _tell(pattern, found, config)
  choice = Choice(
    latents=read.endings is images.LATENTS,
    without_caption=_captions(pattern, found, read, config, split),
    held_out=config.held_out,
    split=split,
  )
  counts = [len(choice.rows(each)) for each in found]
  if not sum(counts):
    samples = sum(map(len, found))
    raise errors.DataError(
      f"The split {split!r} of {pattern!r} is empty: of its {samples} samples "
      f"in {len(paths)} shards, config.data.held_out={config.held_out} are "
      f"held out. Change that, or add samples with {'/'.join(read.endings)}."
    )
  rows = [
    (each.name, each.size, count)
    for each, count in zip(found, counts, strict=True)
  ]
  return WebDataset(
    paths=tuple(paths),
    index_dir=config.index_dir,
    end_S=np.cumsum(counts),
    choice=choice,
    read=read,
    caption_key=config.caption_key or "text",
    name=f"webdataset:{os.path.basename(pattern)}",
    hash=hashlib.blake2b(repr(rows).encode(), digest_size=8).hexdigest(),
    alone=config.images_alone,
  )


def find(pattern: str) -> list[str]:
  """Returns the shards of a pattern; refuses it if one is not there."""
  paths, missing = [], []
  for each in expand(pattern):
    wild = glob.has_magic(each)
    matches = sorted(glob.glob(each, recursive=True)) if wild else [each]
    if not matches or not all(map(os.path.isfile, matches)):
      missing.append(each)
    paths += [path for path in matches if path not in paths]
  if missing:
    raise errors.DataError(
      f"{len(missing)} of the shards of {pattern!r} are not there, the first "
      f"is {missing[0]!r}: correct config.data.source, or copy them."
    )
  for path in paths:
    if path.endswith((".gz", ".tgz", ".bz2", ".xz", ".zst")):
      raise errors.DataError(
        f"{path} is compressed, so that nothing in it can be found without "
        "reading all before it: unpack it to a plain .tar (images gain nothing "
        "from compression)."
      )
  return paths


def expand(pattern: str) -> list[str]:
  """Expands {a,b} and {00..12}, each from the left, as a shell does."""
  pieces = re.split(r"\{([^{}]*)\}", pattern)
  choices = [
    _alternatives(piece) if i % 2 else [piece] for i, piece in enumerate(pieces)
  ]
  return ["".join(parts) for parts in itertools.product(*choices)]


def _alternatives(inside: str) -> list[str]:
  ends = re.fullmatch(r"(\d+)\.\.(\d+)", inside)
  if ends is None:
    return inside.split(",")
  first, last = ends.groups()
  width = len(first) if first.startswith("0") else 0
  return [f"{n:0{width}d}" for n in range(int(first), int(last) + 1)]


def _index(paths: list[str], config) -> list[shards.Shard]:
  found, told = [], time.monotonic()
  for number, path in enumerate(paths, 1):
    found.append(shards.of(path, config.index_dir))
    if time.monotonic() - told > 10.0:
      told = time.monotonic()
      log.info("Indexed %d of %d shards.", number, len(paths))
  return found


def _tell(pattern: str, found: list[shards.Shard], config) -> None:
  """Says what is unsound in the shards, or refuses it."""
  notes: dict[str, list] = {}
  for each in found:
    for what, (count, name) in each.notes.items():
      place = f"{name} ({each.name})"
      notes.setdefault(what, [0, place])[0] += count
  said = [
    f"{count} {what}, the first is {name}"
    for what, (count, name) in notes.items()
  ]
  if said and config.on_corrupt == "stop":
    raise errors.DataError(
      f"In {pattern!r} of shards and members " + "; ".join(said) + ". Repair "
      "or remove them, or set config.data.on_corrupt='skip'."
    )
  for line in said:
    log.warning("In %r of shards and members %s; left out.", pattern, line)


def _captions(pattern, found, read: images.Reader, config, split) -> bool:
  """Tells whether samples without a caption are to stay; says how many."""
  if config.images_alone:
    return True
  kind = "latent" if read.endings is images.LATENTS else "image"
  count = lost = 0
  first = ""
  for each in found:
    image_M = each.has(kind)
    without = int((image_M & ~has_caption(each)).sum())
    first = first or (each.name if without else "")
    count, lost = count + int(image_M.sum()), lost + without
  hint, what = f"the first is in {first}", f"samples of {pattern}"
  texts.without(lost, count, config, split, what, hint)
  return config.on_no_caption == "empty"


def has_caption(shard: shards.Shard) -> np.ndarray:
  """Marks the samples with a text, bool [M]."""
  return shard.has("txt") | shard.has("json")


def _member(
  path: str, shard: shards.Shard, kind: str, row: int
) -> tuple[bytes, str] | None:
  """Reads a member of a sample, if it has it, with its name for messages."""
  place = shard.place(kind, row)
  if place is None:
    return None
  content, name = shards.read(path, *place)
  if len(content) != place[1]:
    raise sources.Corrupt(f"{name} is cut off: the shard has been changed.")
  return content, name


def _sizes(path: str, shard: shards.Shard) -> sizes.Sizes:
  """Reads the header of every image of a shard; other samples have none."""
  row_M = np.flatnonzero(shard.has("image"))

  def head(i: int, most: int) -> tuple[bytes, str]:
    at, size = shard.place("image", int(row_M[i])) or (0, 0)
    return shards.read(path, at, min(size, most))

  def measure(i: int) -> tuple[int, int] | None:
    # Nearly always the first bytes do; a long Exif can come before the size.
    return next(
      filter(
        None,
        (
          images.size(io.BytesIO(head(i, most)[0]))
          for most in (_HEAD, shards.MOST_BYTES)
        ),
      ),
      None,
    )

  known = sizes.measure(len(row_M), measure, lambda i: head(i, 0)[1])
  height_M, width_M = np.zeros((2, len(shard)), np.uint32)
  height_M[row_M], width_M[row_M] = known.height_N, known.width_N
  return dataclasses.replace(known, height_N=height_M, width_N=width_M)


@functools.lru_cache(maxsize=4096)
def _opened(
  path: str, folder: str | None, choice: Choice
) -> tuple[shards.Shard, np.ndarray]:
  shard = shards.of(path, folder)
  return shard, choice.rows(shard)
