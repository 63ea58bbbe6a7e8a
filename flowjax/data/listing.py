"""What lies in a folder of images, and where the caption of each one is."""

# Shape suffixes: N images, M lines of JSON.

import dataclasses
import hashlib
import json
import logging
import os
import pathlib
import time
from array import array
from collections.abc import Iterator
from typing import Any

import numpy as np

from flowjax import errors
from flowjax.data import config as config_lib
from flowjax.data import images, index, names, sizes

LISTS = ("metadata.jsonl", "captions.jsonl")
# In the place of the offset of a line.
NO_CAPTION, BESIDE = -1, -2
_YOUNG_NS = 2 * 10**9  # A change within a tick of the clock shows no new time.

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Directory:
  """One directory below the root, and how many images lie in it itself."""

  path: str  # "" for the root, with "/" on every system.
  changed: int
  images: int


@dataclasses.dataclass(frozen=True)
class Listing:
  """The images below `root`, by directory and name.

  `hash_N` are 64 bits of each path; `line_N` says where its caption is: at this
  offset of the file `list_N` of `lists`, in a text BESIDE it, or nowhere.
  """

  root: str
  directories: tuple[Directory, ...]
  lists: tuple[str, ...]
  arrays: index.Index

  @property
  def names(self) -> names.Names:
    return names.Names(self.arrays["names"], self.arrays["starts"])

  @property
  def captioned(self) -> bool:
    return self.arrays.header["captioned"]

  def path(self, name: str) -> str:
    return os.path.join(self.root, *name.split("/"))


def hashed(name: str) -> int:
  """Returns 64 bits of a name, the same on every machine."""
  content = name.encode(errors="surrogateescape")
  digest = hashlib.blake2b(content, digest_size=8).digest()
  return int.from_bytes(digest, "big")


def held_out(hash_N: Any, fraction: float) -> Any:
  """Marks what is held out: by its own name, so that new ones move no old."""
  return hash_N < fraction * 2.0**64


def of_split(
  hash_N: np.ndarray, config: config_lib.DataConfig, split: str
) -> np.ndarray:
  """Returns which of the N are in the split "train" or "held_out"."""
  return np.flatnonzero(
    held_out(hash_N, config.held_out) == (split == "held_out")
  )


def open(
  root: str, endings: tuple[str, ...], config: config_lib.DataConfig
) -> Listing:
  """Lists `root`, or takes the listing that is kept in `config.index_dir`."""
  listing = _open(root, endings, config)
  for note in listing.arrays.header["notes"]:
    log.warning("%s", note)
  return listing


def _open(root, endings, config) -> Listing:
  header = {
    "root": os.path.abspath(root),
    "endings": list(endings),
    "caption_key": config.caption_key,
    "on_corrupt": config.on_corrupt,
  }
  if config.buckets:
    header["sizes"] = True
  if config.boxes:
    header["boxes"] = True
  kept = _place(header, config.index_dir)
  if kept and (found := index.load(kept, header)) and _is_fresh(found):
    return _listing(root, found)
  began = time.time_ns()
  listing = _list(root, endings, config, header)
  newest = max((d.changed for d in listing.directories), default=0)
  if kept and newest < began - _YOUNG_NS:
    arrays = listing.arrays
    return _listing(root, index.save(kept, arrays.header, arrays.arrays))
  if not kept and time.time_ns() - began > 30 * 10**9:
    log.warning(
      "%d images of %s were listed anew in %.0f s; config.data.index_dir=DIR "
      "keeps the listing.", len(listing.names), root,
      (time.time_ns() - began) / 1e9,
    )  # fmt: skip
  return listing


def _place(header: dict[str, Any], folder: str | None) -> str | None:
  if folder is None:
    return None
  inside = os.path.abspath(os.path.expanduser(folder)) + os.sep
  if inside.startswith(header["root"].rstrip(os.sep) + os.sep):
    raise errors.UserError(
      f"config.data.index_dir={folder!r} lies within {header['root']!r}, whose "
      "listing it is to keep, and would change it: choose another folder."
    )
  name = os.path.basename(header["root"])
  key = hashed(json.dumps(header))
  return os.path.join(os.path.expanduser(folder), f"{name}-{key:016x}.index")


def _listing(root: str, arrays: index.Index) -> Listing:
  header = arrays.header
  return Listing(
    root,
    tuple(Directory(*row) for row in header["directories"]),
    tuple(path for path, *_ in header["lists"]),
    arrays,
  )


def _is_fresh(found: index.Index) -> bool:
  root = found.header["root"]
  try:
    return all(
      os.stat(os.path.join(root, path)).st_mtime_ns == changed
      for path, changed, _ in found.header["directories"]
    ) and all(_stamp(os.path.join(root, path)) == stamp
      for path, *stamp in found.header["lists"]
    )  # fmt: skip
  except OSError:
    return False


def _stamp(path: str) -> list[int]:
  found = os.stat(path)
  return [found.st_size, found.st_mtime_ns]


def _list(root, endings, config, header) -> Listing:
  built, hashes, lines = names.Builder(), array("Q"), array("q")
  directories, lists, notes = [], [], list[str]()
  for directory, files, texts, listed in _walk(root, endings):
    prefix = f"{directory.path}/" if directory.path else ""
    paths = [prefix + file for file in files]
    built.extend(paths)
    hashes.extend(map(hashed, paths))
    lines.extend(
      BESIDE if os.path.splitext(file)[0] in texts else NO_CAPTION
      for file in files
    )
    directories.append(directory)
    lists += [prefix + file for file in listed]
  made = built.done()
  hash_N = np.frombuffer(hashes, np.uint64)
  line_N = np.frombuffer(lines, np.int64)
  arrays = {"names": made.byte_K, "starts": made.start_N, "hashes": hash_N}
  beside = int((line_N == BESIDE).sum())
  if lists:
    if beside:
      raise errors.DataError(
        f"{root!r} has captions in {lists[0]} and in {beside} .txt files "
        "beside images: keep one of both."
      )
    line_N, list_N = _match(root, lists, hash_N, config, notes)
    arrays["list_of"] = list_N
  if lists or beside:
    arrays["line_of"] = line_N
  if config.buckets:
    found = _sizes(root, made)
    arrays |= {"heights": found.height_N, "widths": found.width_N}
    if found.unknown:
      notes.append(found.note(root))
  header = header | {
    "directories": [dataclasses.astuple(d) for d in directories],
    "lists": [[path, *_stamp(os.path.join(root, path))] for path in lists],
    "captioned": bool(lists or beside),
    "notes": notes,
  }
  return _listing(root, index.Index(header, arrays))


def _sizes(root: str, found: names.Names) -> sizes.Sizes:
  """Reads the header of every image."""

  def measure(row: int) -> tuple[int, int] | None:
    path = os.path.join(root, *found[row].split("/"))
    try:
      with pathlib.Path(path).open("rb") as file:
        return images.size(file)
    except OSError as error:
      raise errors.DataError(f"{path} cannot be read: {error}.") from error

  return sizes.measure(len(found), measure, found.__getitem__)


def _walk(root: str, endings: tuple[str, ...]) -> Iterator[tuple]:
  """Yields directories in order, each with its images, texts and lists."""
  stack: list[tuple[str, tuple]] = [("", ())]
  while stack:
    path, above = stack.pop()
    place = os.path.join(root, path)
    status = os.stat(place)
    if (status.st_dev, status.st_ino) in above:
      continue  # A link to where we come from.
    above += ((status.st_dev, status.st_ino),)
    files, texts, lists, inner = [], set(), [], []
    with os.scandir(place) as entries:
      for entry in entries:
        name = entry.name
        if name.startswith("."):
          continue
        low = name.lower()
        if low.endswith(endings) and entry.is_file():
          files.append(name)
        elif low.endswith(".txt"):
          texts.add(name[:-4])
        elif name in LISTS:
          lists.append(name)
        elif entry.is_dir():
          inner.append(f"{path}/{name}" if path else name)
    yield (
      Directory(path, status.st_mtime_ns, len(files)),
      sorted(files),
      texts,
      sorted(lists),
    )
    stack += [(name, above) for name in sorted(inner, reverse=True)]


def _match(root, lists, hash_N, config, notes) -> tuple[np.ndarray, np.ndarray]:
  """Finds for each image the line that names it."""
  hashes, offsets, numbers = array("Q"), array("q"), array("i")
  for number, path in enumerate(lists):
    for offset, key in _lines(root, path, config, notes):
      hashes.append(key)
      offsets.append(offset)
      numbers.append(number)
  line_N = np.full(len(hash_N), NO_CAPTION, np.int64)
  list_N = np.zeros(len(hash_N), np.int32)
  if not hashes:
    return line_N, list_N
  hash_M = np.frombuffer(hashes, np.uint64)
  # Stable: of two lines for one image the first is taken.
  order_M = np.argsort(hash_M, kind="stable")
  sorted_M = hash_M[order_M]
  found_N = np.searchsorted(sorted_M, hash_N)
  found_N[found_N == len(sorted_M)] = 0
  hit_N = sorted_M[found_N] == hash_N
  row_N = order_M[found_N[hit_N]]
  line_N[hit_N] = np.frombuffer(offsets, np.int64)[row_N]
  list_N[hit_N] = np.frombuffer(numbers, np.int32)[row_N]
  if spare := len(hash_M) - int(hit_N.sum()):
    notes.append(
      f"{spare} of the {len(hash_M)} captions in {', '.join(lists)} are left "
      "out: they name images that are not there, or one a second time."
    )
  return line_N, list_N


def _lines(root, path, config, notes) -> Iterator[tuple[int, int]]:
  """Yields the offset of each line that has a caption, and its image's hash."""
  prefix = path[: path.rfind("/") + 1]
  place = os.path.join(root, *path.split("/"))
  bad, first = 0, ""
  with pathlib.Path(place).open("rb") as file:
    offset = 0
    for number, line in enumerate(file, 1):
      begin, offset = offset, offset + len(line)
      if not line.strip():
        continue
      try:
        name, text = parse(line, config.caption_key, bool(config.boxes))
      except ValueError as error:
        bad, first = bad + 1, first or f"line {number}: {error}"
        if config.on_corrupt == "stop":
          raise errors.DataError(
            f"{place}, {first}. Mend that line."
          ) from error
        continue
      _check_name(name, place, number)
      if text is not None:
        yield begin, hashed(prefix + name)
  if bad:
    notes.append(f"{bad} lines of {place} are left out, the first is {first}.")


def parse(
  line: bytes, key: str | None, boxes: bool = False
) -> tuple[str, str | None]:
  """Returns the image and the caption of one line of JSON.

  A list is a caption only where it is one of `boxes`, as JSON.
  Raises ValueError for a line that is none, and UnicodeDecodeError is one.
  """
  found = json.loads(line.removeprefix(b"\xef\xbb\xbf").decode())
  if not isinstance(found, dict) or not isinstance(found.get("file_name"), str):
    raise ValueError('it is no JSON object with a "file_name"')
  text = found.get(key or "text")
  if boxes and isinstance(text, list):
    text = json.dumps(text)  # Boxes, which data/layouts.py reads.
  if text is not None and not isinstance(text, str):
    raise ValueError(f"{key or 'text'!r} is {type(text).__name__}, not a text")
  return found["file_name"], text


def _check_name(name: str, place: str, number: int) -> None:
  parts = name.split("/")
  if name.startswith("/") or ".." in parts or "\\" in name:
    raise errors.DataError(
      f"{place}, line {number}: {name!r} does not lie below that file. Name "
      "images by their path from there, with '/'."
    )
