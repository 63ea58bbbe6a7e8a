"""Aspect buckets: each image goes to the nearest of a few heights and widths.

All buckets are of about equal area, so that little of an image is cropped and a
batch of any bucket costs about the same. A batch is of one bucket.
"""

# Shape suffixes: B positions, N records, K buckets.

import bisect
import dataclasses
import functools
import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from flowjax import errors
from flowjax.data import config as config_lib
from flowjax.data import order, pairs, rows, sources

Size = tuple[int, int]  # Height and width, as everywhere here.

ASPECTS: tuple[Size, ...] = (
  (1, 1), (5, 4), (4, 5), (3, 2), (2, 3), (4, 3), (3, 4), (16, 9), (9, 16),
  (2, 1), (1, 2),
)  # fmt: skip
_CHUNK = 2**20

log = logging.getLogger(__name__)


def of_area(
  area: int, divisor: int, aspects: Sequence[Size] = ASPECTS
) -> tuple[Size, ...]:
  """Returns a bucket of about this area for each aspect, for a config.

  Its height is sqrt(area height / width), and both sides are rounded to a
  multiple of `divisor`, such as the pixels of a patch. What then is of one
  aspect is one bucket.
  """
  found: list[Size] = []
  for height, width in aspects:
    exact = math.sqrt(area * height / width), math.sqrt(area * width / height)
    high, wide = (
      max(divisor, round(side / divisor) * divisor) for side in exact
    )
    if not any(high * w == wide * h for h, w in found):
      found.append((high, wide))
  return tuple(found)


def nearest(size_N2: np.ndarray, buckets: Sequence[Size]) -> np.ndarray:
  """Returns the bucket whose aspect is nearest to that of each size.

  With the aspect r = height / width, that of the least |log r - log r_bucket|:
  of an image exp(-that) is left once it is cut to cover the bucket. So the
  least is cropped, whatever the areas are; where they are equal, this is the
  least |height width_bucket - width height_bucket| too.
  """
  aspect_K = np.log([height / width for height, width in buckets])
  order_K = np.argsort(aspect_K, kind="stable")
  between = (aspect_K[order_K][1:] + aspect_K[order_K][:-1]) / 2
  bucket_N = np.empty(len(size_N2), np.int16)
  for start in range(0, len(size_N2), _CHUNK):
    part = size_N2[start : start + _CHUNK]
    aspect = np.log(part[:, 0] / part[:, 1])
    bucket_N[start : start + _CHUNK] = order_K[np.searchsorted(between, aspect)]
  return bucket_N


def merged(
  counts: Sequence[int], buckets: Sequence[Size], fewest: int
) -> list[int]:
  """Returns into which bucket each goes: itself, if it has `fewest` records.

  In turn the smallest goes into the nearest one that is left, until all that
  are left have so many, or one is left.
  """
  into, left, held = list(range(len(buckets))), list(buckets), list(counts)
  while len(left) > 1:
    small = min(map(buckets.index, left), key=held.__getitem__)
    if held[small] >= fewest:
      break
    left.remove(buckets[small])
    (k,) = nearest(np.array([buckets[small]]), left).tolist()
    to = buckets.index(left[k])
    held[to] += held[small]
    into = [to if each == small else each for each in into]
  return into


@dataclasses.dataclass(frozen=True)
class Bucketed:
  """A source in parts, one for each bucket that has records.

  Each part has its own `shape`; that of all is the reference, for which the
  network is made. Which part has a step, and which of its positions, follows
  from the seed and the step; each part is a source with an order of its own.
  """

  name: str
  parts: tuple[Any, ...]
  shape: tuple[int, int, int]
  shares: tuple[int, ...] = ()  # Of steps; by default, as it has records.

  @property
  def class_names(self) -> tuple[str, ...]:
    return self.parts[0].class_names

  @property
  def num_classes(self) -> int:
    return self.parts[0].num_classes

  @property
  def blank(self) -> sources.Record:
    """A record of zeros, of the reference's shape."""
    first = self.parts[0]
    return {
      key: np.zeros(self.shape, value.dtype)
      if np.shape(value) == first.shape
      else value
      for key, value in sources.blank(first).items()
    }

  @property
  def reference(self) -> Any:
    """The part of the reference's shape; the first, if it has no records."""
    same = [part for part in self.parts if part.shape == self.shape]
    return (*same, self.parts[0])[0]

  @functools.cached_property
  def _ends(self) -> list[int]:
    return np.cumsum([len(part) for part in self.parts]).tolist()

  @functools.cached_property
  def _shares(self) -> tuple[int, ...]:
    return self.shares or order.shares([len(part) for part in self.parts])

  def __len__(self) -> int:
    return self._ends[-1]

  def __getitem__(self, i: int) -> sources.Record:
    """Returns a record in the shape of its bucket: bucket after bucket."""
    variant, i = divmod(i, len(self))
    k = bisect.bisect_right(self._ends, i)
    part = self.parts[k]
    return part[i - self._ends[k] + len(part) * (1 + variant)]

  def turn(self, seed: int, step: int) -> tuple[Any, int, int]:
    """Returns whose turn a step is, that part's seed, and its own step."""
    k, own = order.turn(seed, self._shares, step)
    return self.parts[k], order.apart(seed, k), own

  def each(self, function: Callable[[Any], Any]) -> "Bucketed":
    """Returns the source whose parts are what `function` makes of these."""
    return dataclasses.replace(self, parts=tuple(map(function, self.parts)))

  def fingerprint(self) -> dict[str, Any]:
    """Returns what the order of the records hangs on, as JSON can hold it."""
    parts = {said(part.shape): part.fingerprint() for part in self.parts}
    of = [part.pop("of", None) for part in parts.values()]  # All the same.
    told: dict[str, Any] = {"records": len(self), "of": of[0], "buckets": parts}
    return told | ({"shares": list(self.shares)} if self.shares else {})


def parts_of(source: Any) -> tuple[Any, ...]:
  """Returns the parts of a source, each of one shape: itself, mostly."""
  return source.parts if isinstance(source, Bucketed) else (source,)


def reference(source: Any) -> Any:
  """Returns the part of a source that has the reference's shape."""
  return source.reference if isinstance(source, Bucketed) else source


def divide(source: Any, config: config_lib.DataConfig, split: str) -> Bucketed:
  """Divides a source among `config.buckets` by the sizes of its originals.

  A source that can be divided has `sizes()`, the heights and widths [N, 2] of
  its records, 0 where that is not known, and can be `cut`. One that comes in
  parts already stays as it is.
  """
  if isinstance(source, Bucketed):
    return source
  if not hasattr(source, "sizes"):
    raise errors.UserError(
      f"{source.name} does not say how large its images are, which "
      "config.data.buckets needs: take a source of folder, webdataset, hf or "
      "scenes, or what `flowjax encode` made of one with these buckets; or set "
      "buckets=()."
    )
  buckets = [(height, width) for height, width in config.buckets]
  size_N2 = source.sizes()
  unknown_N = (size_N2 == 0).any(axis=1)
  size_N2[unknown_N] = config.image_size
  bucket_N = nearest(size_N2, buckets)
  counts = np.bincount(bucket_N, minlength=len(buckets)).tolist()
  # What is held out is measured as it is, in batches that are filled up.
  fewest = config.batch_size if split == "train" else 1
  into = merged(counts, buckets, fewest)
  _tell(source, split, buckets, counts, into, fewest)
  bucket_N = np.array(into, np.int16)[bucket_N]
  found = [
    np.flatnonzero(bucket_N == k).astype(np.uint32) for k in range(len(buckets))
  ]
  parts = tuple(
    rows.of(source, size, row_N)
    for size, row_N in zip(buckets, found, strict=True)
    if len(row_N)
  )
  return Bucketed(source.name, parts, (*config.image_size, config.channels))


def of_parts(
  name: str, parts: Sequence[Any], config: config_lib.DataConfig, split: str
) -> Bucketed:
  """Returns a source of parts that are of one bucket each already."""
  _count(name, split, {said(part.shape): len(part) for part in parts})
  for part in parts:
    if split == "train" and len(part) < config.batch_size:
      log.warning(
        "A batch of %d holds each of the %d records of %s more than once.",
        config.batch_size, len(part), part.name,
      )  # fmt: skip
  return Bucketed(name, tuple(parts), (*config.image_size, config.channels))


def paired(first: Bucketed, other: Bucketed) -> Bucketed:
  """Pairs two sources, bucket by bucket."""
  by_shape = {part.shape: part for part in other.parts}
  for part in first.parts:
    if part.shape not in by_shape:
      raise errors.DataError(
        f"{other.name} has too few images nearest to {said(part.shape[:2])} "
        f"for a bucket, and {first.name} has {len(part)}: leave that out of "
        "config.data.buckets."
      )
  shapes = [part.shape for part in first.parts]
  for part in other.parts:
    if part.shape not in shapes:
      log.warning(
        "%d images of %s are left out: %s has none nearest to %s.",
        len(part), other.name, first.name, said(part.shape[:2]),
      )  # fmt: skip
  name = f"{first.name} from {other.name}"
  pair = [pairs.paired(part, by_shape[part.shape]) for part in first.parts]
  return Bucketed(name, tuple(pair), first.shape)


def _tell(source, split, buckets, counts, into, fewest) -> None:
  """Says how many records each bucket has, and which were too few."""
  names = map(said, buckets)
  _count(source.name, split, dict(zip(names, counts, strict=True)))
  for k, to in enumerate(into):
    if to != k and counts[k]:
      log.warning(
        "%s has %d images nearest to the bucket %s, fewer than a batch of %d: "
        "they go to %s, which has %d.", source.name, counts[k],
        said(buckets[k]), fewest, said(buckets[to]), counts[to],
      )  # fmt: skip


def _count(name: str, split: str, counts: dict[str, int]) -> None:
  each = ", ".join(f"{bucket}: {count:,}" for bucket, count in counts.items())
  log.info("%s, %s, by aspect bucket: %s.", name, split, each)


def said(size: Sequence[int]) -> str:
  """Returns what a bucket is called: its height and width."""
  return f"{size[0]}x{size[1]}"
