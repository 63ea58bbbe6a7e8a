"""Writing a folder of shards, so that a kill leaves neither holes nor doubles.

While it is written there are `plan.json`, which says what the folder is to
hold, and beside every finished shard what is known of it. A shard is written
under another name, brought to the disk and renamed; then its JSON is, which
makes it count. Which records a shard holds is a pure function of its number, so
that whoever goes on after a kill, with however many processes, writes what is
missing and nothing twice. `index.json` comes last and takes the place of both.
A shard that is lost after that is written again, and has to be what it was.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
from collections.abc import Iterator, Sequence

from flowjax import errors, schema
from flowjax.data import archive

# A record is a chunk by itself, so that nothing else is read with it. Latents
# and embeddings are noise to a compressor.
_OPTIONS = "group_size:1,uncompressed"


def begin(folder: pathlib.Path, plan: archive.Plan) -> None:
  """Makes the folder that of a plan; refuses one that is another's."""
  for file in (archive.INDEX, archive.PLAN):
    if (folder / file).exists():
      before = archive.read_json(folder / file)
      theirs = {key: before.get(key) for key in plan.to_json()}
      ours = json.loads(json.dumps(plan.to_json()))
      if rows := schema.difference(theirs, ours, file.partition(".")[0]):
        cut = [row if len(row) < 200 else row[:200] + " ..." for row in rows]
        raise errors.UserError(
          f"{folder} holds something else than what is to be encoded:\n  "
          + "\n  ".join(cut)
          + "\nChoose another --out, or go on with the command that began it."
        )
      return
  others = sorted(p.name for p in folder.iterdir() if p.suffix != ".json")
  if others:
    made = any(folder.glob("*.array_record"))
    raise errors.UserError(
      f"{folder} is not empty ({others[0]!r}), and has neither {archive.INDEX} "
      f"nor {archive.PLAN}: "
      + (
        f"what its shards hold is not known. Bring {archive.INDEX} back from a "
        "copy, or remove the shards, or choose another --out."
        if made
        else "choose another --out."
      )
    )
  archive.write_json(folder / archive.PLAN, plan.to_json())


def begin_buckets(folder: pathlib.Path, names: Sequence[str]) -> None:
  """Makes a folder for each bucket; refuses one that holds something else."""
  path = folder / archive.BUCKETS
  if path.exists():
    before = [part.name for part in archive.folders(folder)]
    if before != list(names):
      raise errors.UserError(
        f"{folder} holds the buckets {', '.join(before)}, and these are "
        f"{', '.join(names)}: choose another --out, or go on with the command "
        "that began it. config.data.batch_size says which are merged."
      )
  else:
    ours = {archive.INDEX, archive.PLAN}
    others = sorted(
      p.name for p in folder.iterdir() if p.suffix != ".json" or p.name in ours
    )
    if others:
      lost = any((folder / name / archive.INDEX).exists() for name in others)
      raise errors.UserError(
        f"{folder} is not empty ({others[0]!r}), and has no {archive.BUCKETS}: "
        + ("bring that back from a copy, or " if lost else "")
        + "choose another --out."
      )
    archive.write_json(path, {"buckets": list(names)})
  for name in names:
    (folder / name).mkdir(exist_ok=True)


def missing(folder: pathlib.Path, plan: archive.Plan) -> list[tuple[str, int]]:
  """Returns the shards that are yet to be written, or are lost since."""
  if (folder / archive.INDEX).exists():
    index = archive.read(folder)
    return [
      (split, number)
      for split, shards in index.shards.items()
      for number, shard in enumerate(shards)
      if not _is_whole(folder / archive.name(split, number), shard)
    ]
  return [key for key in plan.shards() if finished(folder, *key) is None]


def finished(
  folder: pathlib.Path, split: str, shard: int
) -> archive.Shard | None:
  """Returns what is known of a shard, if it is whole."""
  path = folder / archive.name(split, shard)
  try:
    found = archive.Shard.from_json(json.loads(_beside(path).read_text()))
  except (OSError, ValueError, KeyError, TypeError):
    return None
  return found if _is_whole(path, found) else None


def _is_whole(path: pathlib.Path, shard: archive.Shard) -> bool:
  return not shard.records or archive.size_of(path) == shard.bytes


@contextlib.contextmanager
def writing(folder: pathlib.Path, split: str, shard: int) -> Iterator["Writer"]:
  """Yields a `Writer` of a shard, which counts when all went well.

  One that an index knows must come out as the same bytes.
  """
  path = folder / archive.name(split, shard)
  indexed = (folder / archive.INDEX).exists()
  before = archive.read(folder).shards[split][shard] if indexed else None
  _beside(path).unlink(missing_ok=True)
  partial = path.with_name(path.name + ".partial")
  writer = Writer(partial)
  try:
    yield writer
    writer.close()
    with _explained(folder):
      archive.sync(partial)
      known = archive.Shard(0, 0, "", tuple(writer.failed))
      if writer.count:
        known = dataclasses.replace(
          known,
          records=writer.count,
          bytes=partial.stat().st_size,
          checksum=archive.checksum(partial),
        )
      if before is not None:
        _require_same(path, before, known)
      if known.records:
        os.replace(partial, path)
      else:
        path.unlink(missing_ok=True)
      if before is None:
        archive.write_json(_beside(path), dataclasses.asdict(known))
      else:
        archive.sync(folder)
  finally:
    # What was written so far goes, so it does not matter that it does not fit.
    with contextlib.suppress(errors.UserError):
      writer.close()
    with contextlib.suppress(OSError):
      partial.unlink(missing_ok=True)


def _require_same(
  path: pathlib.Path, before: archive.Shard, now: archive.Shard
) -> None:
  """Refuses a shard written again that is not the one of the index."""
  if now.checksum == before.checksum:
    return
  reason = "The source, the device or a library has changed since"
  if now.records != before.records:
    reason = f"It had {before.records} records, and now has {now.records}"
    if now.failed:
      reason += f" ({now.failed[0][1]})"
  raise errors.DataError(
    f"{path} was encoded again, and its checksum is {now.checksum or 'none'}, "
    f"where the index says {before.checksum}. {reason.rstrip('.')}: bring the "
    "shard back from a copy, or encode all of it into another --out."
  )


class Writer:
  """Writes the records of one shard, and remembers those that failed."""

  def __init__(self, path: pathlib.Path):
    self._path, self.count = path, 0
    self.failed: list[tuple[int, str]] = []
    self._file = archive.library().ArrayRecordWriter(str(path), _OPTIONS)

  def write(self, parts: Sequence[bytes]) -> None:
    """Writes records, in their order."""
    with _explained(self._path.parent):
      for part in parts:
        self._file.write(part)
    self.count += len(parts)

  def fail(self, number: int, reason: str) -> None:
    """Takes note that a record of the source is left out, and why."""
    self.failed.append((number, reason))

  def close(self) -> None:
    """Writes what is buffered; may be called twice."""
    with _explained(self._path.parent):
      if self._file.is_open():
        self._file.close()


def write_empty(folder: pathlib.Path, part: bytes) -> None:
  """Keeps the record of the empty caption, unless it is there and whole."""
  path = folder / archive.EMPTY
  if archive.size_of(path) == len(part):
    return
  partial = folder / f"{archive.EMPTY}.partial"
  partial.write_bytes(part)
  archive.sync(partial)
  if (folder / archive.INDEX).exists():
    before = archive.read(folder).empty
    if (found := archive.checksum(partial)) != before:
      partial.unlink()
      raise errors.DataError(
        f"{path} was encoded again, and its checksum is {found}, where the "
        f"index says {before}. The device or a library has changed since: "
        "bring it back from a copy, or encode all of it into another --out."
      )
  os.replace(partial, path)


def finish(folder: pathlib.Path, plan: archive.Plan) -> archive.Index:
  """Writes the index of a folder that has all its shards, and tidies up."""
  if (folder / archive.INDEX).exists():
    index = archive.read(folder)
    for split in index.shards:
      archive.check_sizes(folder, index, split)
    return index
  found: dict[str, list[archive.Shard]] = {split: [] for split in plan.splits}
  for split, shard in plan.shards():
    known = finished(folder, split, shard)
    if known is None:
      raise errors.DataError(
        f"{folder / archive.name(split, shard)} is gone since it was written: "
        "run the same command again."
      )
    found[split].append(known)
  for split, made in found.items():
    if plan.splits[split] and not any(shard.records for shard in made):
      raise errors.DataError(
        f"All {plan.splits[split]} records of the split {split!r} failed, the "
        f"first because: {made[0].failed[0][1]}"
      )
  empty = folder / archive.EMPTY
  index = archive.Index(
    plan,
    {split: tuple(made) for split, made in found.items()},
    archive.checksum(empty) if empty.exists() else None,
  )
  archive.write_json(folder / archive.INDEX, index.to_json())
  for split, shard in plan.shards():
    _beside(folder / archive.name(split, shard)).unlink(missing_ok=True)
  (folder / archive.PLAN).unlink(missing_ok=True)
  return index


def problems_of_folder(folder: pathlib.Path, index: archive.Index) -> list[str]:
  """Returns what is wrong with a folder beside its shards."""
  found = []
  empty = folder / archive.EMPTY
  if index.empty is not None:
    if not empty.exists():
      found.append(f"{empty.name} is missing")
    elif archive.checksum(empty) != index.empty:
      found.append(f"{empty.name} is not what was written")
  known = {archive.name(*key) for key in index.plan.shards()}
  for path in sorted(folder.glob("*.array_record")):
    if path.name not in known:
      found.append(f"{path.name} is no shard of the index")
  return found


def problems(
  folder: pathlib.Path, index: archive.Index, split: str, number: int
) -> list[str]:
  """Returns what is wrong with a shard: its bytes, or what they hold."""
  shard, path = (
    index.shards[split][number],
    folder / archive.name(split, number),
  )
  if not shard.records:
    return _wrong_numbers(index.plan, split, number, shard, [])
  size = archive.size_of(path)
  if size is None:
    return [f"{path.name} is missing"]
  if size != shard.bytes:
    return [f"{path.name} has {size} bytes, and the index says {shard.bytes}"]
  if (found := archive.checksum(path)) != shard.checksum:
    return [
      f"{path.name} has the checksum {found}, and the index says "
      f"{shard.checksum}"
    ]
  reader = archive.library().ArrayRecordReader(str(path), archive.READING)
  numbers: list[int] = []
  for start in range(0, reader.num_records(), 256):
    stop = min(start + 256, reader.num_records())
    fields = index.plan.layout.unpack(reader.read(list(range(start, stop))))
    numbers += fields[archive.NUMBER].tolist()
  return _wrong_numbers(index.plan, split, number, shard, numbers)


def _wrong_numbers(plan, split, number, shard, found) -> list[str]:
  """Returns which records of the source are there twice, or not at all."""
  file = archive.name(split, number)
  if len(found) != shard.records:
    return [
      f"{file} holds {len(found)} records, and the index says {shard.records}"
    ]
  failed = [i for i, _ in shard.failed]
  if sorted([*found, *failed]) == list(plan.numbers(split, number)):
    return []
  wanted = set(plan.numbers(split, number)) - set(failed)
  lost, twice = sorted(wanted - set(found)), len(found) - len(set(found))
  return [
    f"{file} lacks {len(lost)} records of the source"
    + (f" (the first is {lost[0]})" if lost else "")
    + f", and has {twice} twice"
  ]


@contextlib.contextmanager
def _explained(folder: pathlib.Path) -> Iterator[None]:
  """Says what to do where the disk refuses; ArrayRecord raises RuntimeError."""
  try:
    yield
  except (OSError, RuntimeError) as error:
    raise errors.UserError(
      f"{folder} cannot be written: {error}. Make room there, or correct its "
      "permissions, and give the same command again: it goes on."
    ) from error


def _beside(path: pathlib.Path) -> pathlib.Path:
  return path.with_name(path.name + ".json")
