"""Where the samples of a tar shard lie: found once, and kept in an index.

Consecutive members whose names agree up to the first dot of the file name are
one sample. Only headers are read, nothing is extracted, and no name in a shard
is ever a path on this disk.
"""

# Shape suffixes: M samples.

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
_BLOCK = 512
_BROKEN = (tarfile.TarError, ValueError, EOFError, OverflowError)

log = logging.getLogger(__name__)


def of(path: str, folder: str | None) -> index.Index:
  """Returns the index of a shard, from its file or made anew.

  For each kind it has `<kind>_at` and `<kind>_size`, int64 [M], in bytes, and
  the `hashes` of the samples' names. Its header has `notes`, what is unsound.
  """
  try:
    found = os.stat(path)
  except OSError as error:
    raise errors.DataError(f"{path} cannot be read: {error}.") from error
  header = {
    "shard": os.path.basename(path),
    "size": found.st_size,
    "changed": found.st_mtime_ns,
  }
  place = _place(path, folder)
  return index.load(place, header) or _make(path, place, header)


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


def _place(path: str, folder: str | None) -> str:
  if folder is None:
    return path + ".index"
  key = listing.hashed(os.path.abspath(path))
  name = f"{os.path.basename(path)}-{key:016x}.index"
  return os.path.join(os.path.expanduser(folder), name)


def _make(path: str, place: str, header: dict) -> index.Index:
  notes: dict[str, list] = {}
  columns = {name: array("q") for kind in KINDS for name in _columns(kind)}
  hashes = array("Q")
  for key, sample in _samples(path, header["size"], notes):
    hashes.append(listing.hashed(f"{header['shard']}/{key}"))
    for kind in KINDS:
      at, size = sample.get(kind, (ABSENT, 0))
      columns[f"{kind}_at"].append(at)
      columns[f"{kind}_size"].append(size)
  arrays = {
    name: np.array(column, np.int64) for name, column in columns.items()
  }
  arrays["hashes"] = np.array(hashes, np.uint64)
  return index.save(place, header | {"notes": notes}, arrays)


def _columns(kind: str) -> tuple[str, str]:
  return f"{kind}_at", f"{kind}_size"


def _samples(path: str, size: int, notes) -> Iterator[tuple[str, dict]]:
  """Yields the name of each sample, and where its members lie."""
  last, sample = None, {}
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
        tar.members.clear()  # It would keep all of them.
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
      tar.fileobj.seek(tar.offset)
      end = tar.fileobj.read(_BLOCK)
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
