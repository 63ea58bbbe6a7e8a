"""Where the samples of a tar shard lie: found once, and kept in an index.

Consecutive members whose names agree up to the first dot of the file name are
one sample. Only headers are read, nothing is extracted, and no name in a shard
is ever a path on this disk.
"""

# Shape suffixes: M samples.

import dataclasses
import logging
import os
import pathlib
import tarfile
from array import array
from collections.abc import Iterator

import numpy as np

from flowjax import errors
from flowjax.data import images, index, listing

# The first ending that a sample has of a kind is taken.
KINDS = {
  "image": images.IMAGES,
  "latent": images.LATENTS,
  "txt": (".txt",),
  "json": (".json",),
}
ABSENT = -1
MOST_BYTES = 2**32 - 1
_BLOCK = 512
_BROKEN = (tarfile.TarError, ValueError, EOFError, OverflowError)

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Shard:
  """What is known about a tar: its samples, in their order."""

  index: index.Index

  def __len__(self) -> int:
    return len(self.hash_M)

  @property
  def name(self) -> str:
    return self.index.header["shard"]

  @property
  def size(self) -> int:
    """The bytes of the file."""
    return self.index.header["size"]

  @property
  def hash_M(self) -> np.ndarray:
    """64 bits of the name of each sample."""
    return self.index["hashes"]

  @property
  def notes(self) -> dict[str, tuple[int, str]]:
    """What is unsound: how often, and the first name."""
    return self.index.header["notes"]

  def has(self, kind: str) -> np.ndarray:
    """Marks the samples that have a member of this kind, bool [M]."""
    if f"{kind}_at" not in self.index.arrays:
      return np.zeros(len(self), bool)
    return self.index[f"{kind}_at"] >= 0

  def place(self, kind: str, row: int) -> tuple[int, int] | None:
    """Returns where a member begins, and its bytes; None if there is none."""
    if f"{kind}_at" not in self.index.arrays:
      return None
    at = int(self.index[f"{kind}_at"][row])
    return None if at < 0 else (at, int(self.index[f"{kind}_size"][row]))


def of(path: str, folder: str | None) -> Shard:
  """Returns what is known about a shard, from its index or found anew."""
  try:
    found = os.stat(path)
  except OSError as error:
    raise errors.DataError(f"{path} cannot be read: {error}.") from error
  header = {
    "shard": os.path.basename(path),
    "size": found.st_size,
    "changed": found.st_mtime_ns,
  }
  place = index_path(path, folder)
  return Shard(index.load(place, header) or _make(path, place, header))


def read(path: str, at: int, size: int) -> tuple[bytes, str]:
  """Returns the bytes of a member, and its name for messages."""
  try:
    with pathlib.Path(path).open("rb") as file:
      file.seek(at - _BLOCK)
      block = file.read(_BLOCK + size)
  except OSError as error:
    raise errors.DataError(f"{path} cannot be read: {error}.") from error
  name = block[:100].partition(b"\0")[0].decode(errors="replace")
  return block[_BLOCK:], f"{name} in {path}"


def index_path(path: str, folder: str | None) -> str:
  """Returns where the index of a shard is kept."""
  if folder is None:
    return path + ".index"
  key = listing.hashed(os.path.abspath(path))
  name = f"{os.path.basename(path)}-{key:016x}.index"
  return os.path.join(os.path.expanduser(folder), name)


def _make(path: str, place: str, header: dict) -> index.Index:
  notes: dict[str, list] = {}
  at = {kind: array("q") for kind in KINDS}
  sizes = {kind: array("q") for kind in KINDS}
  hashes = array("Q")
  for key, sample in _samples(path, header["size"], notes):
    hashes.append(listing.hashed(f"{header['shard']}/{key}"))
    for kind in KINDS:
      begin, size = sample.get(kind, (ABSENT, 0))
      at[kind].append(begin)
      sizes[kind].append(size)
  arrays = {"hashes": np.array(hashes, np.uint64)}
  for kind in KINDS:
    at_M = np.array(at[kind], np.int64)
    if (at_M >= 0).any():
      arrays[f"{kind}_at"] = at_M
      arrays[f"{kind}_size"] = np.array(sizes[kind], np.uint32)
  return index.save(place, header | {"notes": notes}, arrays)


def _samples(path: str, size: int, notes) -> Iterator[tuple[str, dict]]:
  """Yields the name of each sample, and where its members lie."""
  last = ""
  sample: dict[str, tuple[int, int]] = {}
  for member in _members(path, size, notes):
    key, ending = _split(member.name)
    if key != last and sample:
      yield last, sample
    if key != last:
      last, sample = key, {}
    for kind, endings in KINDS.items():
      if ending not in endings:
        continue
      if kind in sample:
        _note(notes, "come twice in one sample", member.name)
      elif not member.size and kind in ("image", "latent"):
        _note(notes, "are of zero bytes", member.name)
      elif member.size > MOST_BYTES:
        _note(notes, "are larger than 4 GiB", member.name)
      else:
        sample[kind] = (member.offset_data, member.size)
  if sample:
    yield last, sample


def _members(path: str, size: int, notes) -> Iterator[tarfile.TarInfo]:
  """Yields the files in a tar, and takes note of what ends it too early."""
  if not size:
    return _note(notes, "are empty", os.path.basename(path))
  try:
    # "r:" takes no compression, under which nothing could be found again.
    tar = tarfile.open(path, "r:")
  except _BROKEN:
    return _note(notes, "are no tar files", os.path.basename(path))
  with tar:
    end, offset = None, -1
    try:
      while (member := tar.next()) is not None:
        tar.members.clear()  # type: ignore[attr-defined]  # It keeps all.
        if member.size < 0 or tar.offset <= offset:
          raise tarfile.ReadError("a member of no size")
        offset = tar.offset
        _refuse_paths(path, member.name)
        if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
          if not member.isdir():
            _note(notes, "are links or other things than files", member.name)
        elif member.offset_data + member.size > size:
          _note(notes, "are cut off", member.name)
        else:
          yield member
      tar.fileobj.seek(tar.offset)  # type: ignore[union-attr]
      end = tar.fileobj.read(_BLOCK)  # type: ignore[union-attr]
    except errors.UserError:
      raise
    except _BROKEN as error:
      log.debug("%s: %s", path, error)
    if end != bytes(_BLOCK):
      _note(notes, "end too early, or are broken inside",
        os.path.basename(path))  # fmt: skip


def _split(name: str) -> tuple[str, str]:
  folder, slash, file = name.rpartition("/")
  stem, _, ending = file.partition(".")
  return folder + slash + stem, "." + ending.lower()


def _refuse_paths(path: str, name: str) -> None:
  if name.startswith(("/", "\\")) or ".." in name.replace("\\", "/").split("/"):
    raise errors.DataError(
      f"{path} has a member {name!r}, which would lie outside the folder that "
      "it is extracted to. No honest tool writes such a shard: find out where "
      "it comes from, or leave it out of config.data.source."
    )


def _note(notes: dict[str, list], what: str, name: str) -> None:
  """Counts something unsound, and keeps the first name of it."""
  notes.setdefault(what, [0, name])[0] += 1
