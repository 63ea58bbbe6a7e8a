"""What a folder of shards in ArrayRecord is to hold, and what it holds.

`index.json` has the layout of the records, where they came from, and of every
shard its records, its bytes and its checksum. It is small: that of ten million
records in a thousand shards is a few hundred kilobytes.

What comes in aspect buckets lies in a folder of this kind for each of them,
with `buckets.json` above them.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from flowjax import errors
from flowjax.data import records

FORMAT = 1
PLAN, INDEX, EMPTY = "plan.json", "index.json", "empty.record"
BUCKETS = "buckets.json"
# Of every record, which one of its source it was.
NUMBER = "index"
READING = "readahead_buffer_size:0,max_parallelism:0"


@dataclasses.dataclass(frozen=True)
class Shard:
  """One finished shard; `failed` are the source's records that it lacks."""

  records: int
  bytes: int
  checksum: str
  failed: tuple[tuple[int, str], ...] = ()

  @classmethod
  def from_json(cls, values: Mapping[str, Any]) -> "Shard":
    failed = tuple((int(i), str(reason)) for i, reason in values["failed"])
    return cls(
      int(values["records"]),
      int(values["bytes"]),
      str(values["checksum"]),
      failed,
    )


@dataclasses.dataclass(frozen=True)
class Plan:
  """What a folder holds: the layout, and how many records of which splits.

  `about` says where the records came from, as JSON: the source with its
  fingerprint, the config of its data, and of latents the frozen networks that
  made them and the texts' parts.
  """

  layout: records.Layout
  splits: Mapping[str, int]
  records_per_shard: int
  about: Mapping[str, Any]

  def shards(self) -> list[tuple[str, int]]:
    """Returns the split and the number of every shard."""
    return [
      (split, i) for split in self.splits for i in range(self.count(split))
    ]

  def count(self, split: str) -> int:
    """Returns how many shards a split has."""
    return -(-self.splits[split] // self.records_per_shard)

  def numbers(self, split: str, shard: int) -> range:
    """Returns which records of the source a shard holds."""
    start = shard * self.records_per_shard
    return range(start, min(start + self.records_per_shard, self.splits[split]))

  def to_json(self) -> dict[str, Any]:
    return {
      "format": FORMAT,
      "layout": self.layout.to_json(),
      "splits": dict(self.splits),
      "records_per_shard": self.records_per_shard,
      "about": dict(self.about),
    }

  @classmethod
  def from_json(cls, values: Mapping[str, Any]) -> "Plan":
    if values["format"] != FORMAT:
      raise ValueError(
        f"its format is {values['format']!r}, and this FlowJAX reads {FORMAT}"
      )
    return cls(
      records.Layout.from_json(values["layout"]),
      {str(split): int(n) for split, n in values["splits"].items()},
      int(values["records_per_shard"]),
      values["about"],
    )


@dataclasses.dataclass(frozen=True)
class Index:
  """A plan, and the shards that were made by it."""

  plan: Plan
  shards: Mapping[str, tuple[Shard, ...]]
  empty: str | None = None  # The checksum of the record of the empty caption.

  def to_json(self) -> dict[str, Any]:
    return {
      **self.plan.to_json(),
      "records": {
        split: sum(shard.records for shard in found)
        for split, found in self.shards.items()
      },
      "failed": sum(
        len(shard.failed) for found in self.shards.values() for shard in found
      ),
      "empty": self.empty,
      "shards": {
        split: [dataclasses.asdict(shard) for shard in found]
        for split, found in self.shards.items()
      },
    }


def name(split: str, shard: int) -> str:
  """Returns what the file of a shard is called."""
  return f"{split}-{shard:05d}.array_record"


def library():
  """Returns the module of ArrayRecord."""
  try:
    from array_record.python import array_record_module
  except ImportError as error:
    raise errors.UserError(
      f"ArrayRecord cannot be used ({error}): pip install -e '.[encode]'"
    ) from error
  return array_record_module


def read(folder: pathlib.Path) -> Index:
  """Reads the index of a folder; the shards are not looked at."""
  path = folder / INDEX
  if not folder.is_dir():
    raise errors.DataError(
      f"There is no folder {str(folder)!r}: correct config.data.source."
    )
  if not path.exists():
    begun = (folder / PLAN).exists()
    raise errors.DataError(
      f"{folder} has no {INDEX}: "
      + (
        "its encoding was not finished. Give the same `flowjax encode` again."
        if begun
        else "it is none of `flowjax encode`, or the copy is incomplete."
      )
    )
  values = read_json(path)
  try:
    found = {
      split: tuple(Shard.from_json(shard) for shard in shards)
      for split, shards in values["shards"].items()
    }
    return Index(Plan.from_json(values), found, values["empty"])
  except (KeyError, TypeError, ValueError, AttributeError) as error:
    raise errors.DataError(
      f"{path} is damaged: {error}. Bring it back from a copy, or encode again."
    ) from error


def folders(folder: pathlib.Path) -> list[pathlib.Path]:
  """Returns the folder of each bucket, or, where there are none, the folder."""
  path = folder / BUCKETS
  if not path.exists():
    return [folder]
  try:
    return [folder / name for name in read_json(path)["buckets"]]
  except (KeyError, TypeError) as error:
    raise errors.DataError(
      f"{path} is damaged: {error}. Bring it back from a copy, or encode again."
    ) from error


def check_sizes(folder: pathlib.Path, index: Index, split: str) -> None:
  """Refuses shards of a split that are missing or not as long as they were."""
  for number, shard in enumerate(index.shards[split]):
    path = folder / name(split, number)
    size = size_of(path) if shard.records else 0
    if size != shard.bytes:
      state = "is missing" if size is None else f"has {size} bytes"
      raise errors.DataError(
        f"{path} {state}, and the index says {shard.bytes} bytes: the copy is "
        "incomplete. Copy it again, or give the same `flowjax encode` again, "
        "which writes such shards anew; with --verify it looks at all."
      )


def checksum(path: pathlib.Path) -> str:
  """Returns a hash of the bytes of a file."""
  with open(path, "rb") as file:
    return hashlib.file_digest(
      file, lambda: hashlib.blake2b(digest_size=16)
    ).hexdigest()


def write_json(path: pathlib.Path, values: Any) -> None:
  """Writes JSON so that a kill leaves the old file or the new one, whole."""
  partial = path.with_name(path.name + ".partial")
  partial.write_text(json.dumps(values, indent=1) + "\n")
  sync(partial)
  os.replace(partial, path)
  sync(path.parent)


def read_json(path: pathlib.Path) -> dict[str, Any]:
  """Returns what a JSON file of a folder holds."""
  try:
    values = json.loads(path.read_text())
    if not isinstance(values, dict):
      raise ValueError("it holds no JSON object")
  except ValueError as error:
    raise errors.DataError(
      f"{path} is damaged: {error}. Bring it back from a copy, or encode again."
    ) from error
  return values


def first_records(index: Index, split: str) -> np.ndarray:
  """Returns how many records of a split lie before each shard, and in all."""
  counts = [shard.records for shard in index.shards[split]]
  return np.cumsum([0, *counts])


def size_of(path: pathlib.Path) -> int | None:
  """Returns how long a file is, if there is one."""
  try:
    return path.stat().st_size
  except FileNotFoundError:
    return None


def sync(path: pathlib.Path) -> None:
  """Brings a file, or the names in a folder, to the disk."""
  handle = os.open(path, os.O_RDONLY)
  try:
    os.fsync(handle)
  finally:
    os.close(handle)
