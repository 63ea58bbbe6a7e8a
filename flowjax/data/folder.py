"""A folder of images: in class folders, or each with a caption.

Labelled: <dir>/<class>/<file>. Captioned, in folders as they come: a `.txt`
beside each image, or `metadata.jsonl` with {"file_name": ..., "text": ...}.
What is no image by the channels of the config are latents (data/images.py).
"""

# Shape suffixes: N records.

import dataclasses
import functools
import logging
import os
import pathlib
from typing import Any

import numpy as np

from flowjax import errors
from flowjax.data import config as config_lib
from flowjax.data import images, listing, sizes, sources, texts

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Folder:
  """One split of the images under a root, in the order of their paths."""

  listing: listing.Listing
  row_N: np.ndarray  # Of the listing, in 32 bits: each worker has its own.
  label_N: np.ndarray | None  # None: captions, or nothing.
  class_names: tuple[str, ...]
  read: images.Reader
  caption_key: str | None
  alone: bool = False  # Of no image anything is said.
  boxes: bool = False  # Captions may be lists of them.

  @property
  def name(self) -> str:
    root = os.path.basename(os.path.abspath(self.listing.root))
    return f"folder:{root}"

  @property
  def num_classes(self) -> int:
    return len(self.class_names)

  @property
  def shape(self) -> tuple[int, int, int]:
    return self.read.shape

  def __len__(self) -> int:
    return len(self.row_N)

  def sizes(self) -> np.ndarray:
    """Returns the height and width of each original, [N, 2]."""
    arrays = self.listing.arrays
    known = sizes.Sizes(arrays["heights"], arrays["widths"])
    return known.of(self.row_N)

  def cut(self, image_size: tuple[int, int]) -> "Folder":
    """Returns the same images, cut to another size."""
    return dataclasses.replace(self, read=self.read.cut(image_size))

  def file(self, i: int) -> str:
    """Returns the path of a record from the root, with "/" on every system."""
    return self.listing.names[int(self.row_N[i])]

  def __getitem__(self, i: int) -> sources.Record:
    path = self.listing.path(self.file(i))
    image = self.read.record(_content(path), path)
    if self.alone:
      return image
    if self.label_N is None:
      return {**image, "caption": self._caption(i, path)}
    return {**image, "label": self.label_N[i]}

  def _caption(self, i: int, path: str) -> str:
    row, arrays = int(self.row_N[i]), self.listing.arrays
    line = int(arrays["line_of"][row])
    if line == listing.NO_CAPTION:
      return ""
    if line == listing.BESIDE:
      beside = _text_beside(path)
      return texts.decode(_content(beside), beside)
    place = self.listing.path(self.listing.lists[arrays["list_of"][row]])
    try:
      with pathlib.Path(place).open("rb") as file:
        file.seek(line)
        said = file.readline()
        name, text = listing.parse(said, self.caption_key, self.boxes)
    except OSError as error:
      raise errors.DataError(f"{place} cannot be read: {error}.") from error
    except ValueError as error:
      raise errors.DataError(
        f"{place} has changed while it was in use: {error}. Start again."
      ) from error
    assert text is not None and path.endswith(os.path.basename(name))
    return texts.clean(text)

  @functools.cached_property
  def _hash(self) -> str:
    return self.listing.names.hash(self.row_N)

  def fingerprint(self) -> dict[str, Any]:
    """Returns what the order of the records hangs on, as JSON can hold it."""
    told: dict[str, Any] = {"classes": list(self.class_names)}
    if self.label_N is None:
      told = {"captions": not self.alone}
    return {"records": len(self), **told, "hash": self._hash}


def open(config: config_lib.DataConfig, split: str) -> Folder:
  """Lists the images of `split` of the folder that `config.source` names."""
  read = images.reader(config)
  root = os.path.expanduser(config.source.partition(":")[2])
  if not os.path.isdir(root):
    raise errors.DataError(
      f"There is no folder {root!r}: correct config.data.source."
    )
  found = listing.open(root, read.endings, config)
  label_N: np.ndarray | None
  classes: tuple[str, ...]
  if config.images_alone:
    row_N, label_N, classes = _all_rows(found), None, ()
  elif _is_captioned(found, config.captions):
    row_N, label_N, classes = _captioned_rows(found, config, split), None, ()
  else:
    row_N, label_N, classes = _labels(found, read.endings)
  split_N = listing.of_split(found.arrays["hashes"][row_N], config, split)
  row_N = row_N[split_N].astype(np.uint32)
  if not len(row_N):
    raise errors.DataError(
      f"The split {split!r} of {root!r} is empty at "
      f"config.data.held_out={config.held_out}: change that fraction, or add "
      "images."
    )
  if label_N is not None:
    label_N = label_N[split_N]
  return Folder(
    found,
    row_N,
    label_N,
    classes,
    read,
    config.caption_key,
    config.images_alone,
    bool(config.boxes),
  )


def _all_rows(found: listing.Listing) -> np.ndarray:
  """Returns the rows of all images, wherever they lie."""
  count = len(found.names)
  if not count:
    raise errors.DataError(f"There are no images in {found.root!r}.")
  return np.arange(count)


def _is_captioned(found: listing.Listing, asked: bool | None) -> bool:
  """Tells captions from labels, by the config or by what lies there."""
  if asked and not found.captioned:
    raise errors.DataError(
      f"There are no captions in {found.root!r}: it should hold a .txt beside "
      f"each image, or a {' or '.join(listing.LISTS)} with a file_name and a "
      "text in each line. config.data.captions=False takes class folders."
    )
  if asked is not None or not found.captioned:
    return bool(asked)
  classes = [d.path for d in found.directories if d.images]
  if len(classes) > 1 and all(path and "/" not in path for path in classes):
    raise errors.DataError(
      f"{found.root!r} has captions, and all its images lie in folders that "
      f"could be {len(classes)} classes (the first is {classes[0]!r}): set "
      "config.data.captions=True for the captions, or False for the classes."
    )
  return True


def _captioned_rows(
  found: listing.Listing, config: config_lib.DataConfig, split: str
) -> np.ndarray:
  without_N = found.arrays["line_of"] == listing.NO_CAPTION
  missing = np.flatnonzero(without_N)
  if len(missing):
    hint = f"the first is {found.names[int(missing[0])]}"
    total, what = len(without_N), f"images of {found.root}"
    texts.without(len(missing), total, config, split, what, hint)
    if config.on_no_caption == "skip":
      return np.flatnonzero(~without_N)
  return np.arange(len(without_N))


def _labels(
  found: listing.Listing, endings: tuple[str, ...]
) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
  """Returns the rows that lie in class folders, their labels, and the names."""
  root, (top, *below) = found.root, found.directories
  classes = [d for d in below if "/" not in d.path]
  if not classes and not top.images:
    raise errors.DataError(
      f"The folder {root!r} is empty: it should hold one folder of images for "
      f"each class, and has no {'/'.join(endings)}. (With config.data.channels "
      "1 or 3 these are images, with any other number latents in .npy.)"
    )
  if top.images:
    raise errors.DataError(
      f"{top.images} images lie in {root!r} outside any class folder (the "
      f"first is {found.names[0]!r}), so they have no label: move each into a "
      "folder named after its class, give each a caption, or set "
      "config.data.images_alone=True for a network that is told nothing."
    )
  for directory in classes:
    if not directory.images:
      raise _no_images(root, directory.path, below, endings)
  if deeper := sum(d.images for d in below if "/" in d.path):
    log.warning(
      "%d images lie in folders inside the class folders of %s, and are left "
      "out.", deeper, root,
    )  # fmt: skip
  numbers = {d.path: label for label, d in enumerate(classes)}
  label_N = np.repeat(
    np.array([numbers.get(d.path, -1) for d in below], np.int32),
    [d.images for d in below],
  )
  row_N = np.flatnonzero(label_N >= 0)
  return row_N, label_N[row_N], tuple(numbers)


def _no_images(root, name, below, endings) -> errors.DataError:
  text = f"The class folder {name!r} of {root!r} holds no {'/'.join(endings)}"
  inner = [d.path for d in below if os.path.dirname(d.path) == name]
  if inner:
    text += (
      f", but {len(inner)} folders (the first is "
      f"{os.path.basename(inner[0])!r}): if these are the classes, set "
      f"config.data.source='folder:{os.path.join(root, name)}'"
    )
  return errors.DataError(f"{text}.")


def _text_beside(path: str) -> str:
  return os.path.splitext(path)[0] + ".txt"


def _content(path: str) -> bytes:
  try:
    return pathlib.Path(path).read_bytes()
  except OSError as error:
    # Not `Corrupt`: a disk that fails now and then must not change the order.
    raise errors.DataError(f"{path} cannot be read: {error}.") from error
