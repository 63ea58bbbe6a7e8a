"""A folder of latents with the embeddings of their texts: <dir>/**/*.npz.

Each file is one example: "image" [H, W, C], latents or pixels in [-1, 1];
"text" [L, E], the embedded tokens; "pooled" [P], one vector of the whole text;
and, where some of the tokens are padding, "text_mask" [L], true for the others.
Beside or in place of text and pooled it may have "embedding" [P], of an image.
All files of a split have the same keys and shapes: those of its first one.
"""

# Shape suffixes: H height, W width, C channels, L text tokens, E width of the
# text, P width of the pooled text.

import dataclasses
import functools
import hashlib
import io
import os
import pathlib
import zipfile
import zlib
from typing import Any

import numpy as np

from flowjax import errors
from flowjax.data import config as config_lib
from flowjax.data import listing, sources

# Each key, and the dims that it has.
DIMS = {
  "image": "HWC",
  "text": "LE",
  "pooled": "P",
  "text_mask": "L",
  "embedding": "P",
}


@dataclasses.dataclass(frozen=True)
class Embedded:
  """One split of the files under `root`, in the order of their paths."""

  root: str
  files: tuple[str, ...]  # With "/" on every system.
  shape: tuple[int, int, int]
  class_names: tuple[str, ...] = ()

  @property
  def name(self) -> str:
    return f"embedded:{os.path.basename(os.path.abspath(self.root))}"

  @property
  def num_classes(self) -> int:
    return 0

  @functools.cached_property
  def blank(self) -> dict[str, np.ndarray]:
    """An example of zeros, of the shapes that all must have."""
    try:
      found = self._read(0)
    except sources.Corrupt as error:
      raise errors.DataError(
        f"{error} It is the first file, which says what all of them hold: "
        "repair or remove it."
      ) from error
    return {key: np.zeros_like(value) for key, value in found.items()}

  def __len__(self) -> int:
    return len(self.files)

  def __getitem__(self, i: int) -> dict[str, np.ndarray]:
    blank, found = self.blank, self._read(i)
    if found.keys() != blank.keys():
      raise sources.Corrupt(
        f"{self.files[i]} holds {', '.join(found)}, and the first file, "
        f"{self.files[0]}, {', '.join(blank)}: give all of them a 'text_mask', "
        "true where nothing is padding, or none."
      )
    for key, value in blank.items():
      if found[key].shape != value.shape:
        raise sources.Corrupt(
          f"{self.files[i]}: {key!r} must be of the shape {value.shape}, as it "
          f"is in {self.files[0]}."
        )
    return found

  def _read(self, i: int) -> dict[str, np.ndarray]:
    found = _read(self.root, self.files[i])
    if found["image"].shape != self.shape:
      raise sources.Corrupt(
        f"{self.files[i]} holds an image of {found['image'].shape}, and "
        f"{self.shape} is asked for."
      )
    return found

  def fingerprint(self) -> dict[str, Any]:
    """Returns what the order of the records hangs on, as JSON can hold it."""
    listing = "\n".join(self.files).encode()
    return {
      "records": len(self),
      "hash": hashlib.blake2b(listing, digest_size=8).hexdigest(),
    }


def open(config: config_lib.DataConfig, split: str) -> Embedded:
  """Lists the files of `split` of the folder that `config.source` names."""
  root = os.path.expanduser(config.source.partition(":")[2])
  if not os.path.isdir(root):
    raise errors.DataError(
      f"There is no folder {root!r}: correct config.data.source."
    )
  every = sorted(
    path.relative_to(root).as_posix()
    for path in pathlib.Path(root).rglob("*.npz")
  )
  files = [
    file
    for file in every
    if bool(listing.held_out(listing.hashed(file), config.held_out))
    == (split == "held_out")
  ]
  if not files:
    raise errors.DataError(
      f"The split {split!r} of {root!r} is empty: of its {len(every)} .npz "
      f"files, config.data.held_out={config.held_out} are held out. Change "
      "that fraction, or add files with 'image', 'text' and 'pooled'."
    )
  return Embedded(root, tuple(files), (*config.image_size, config.channels))


def _read(root: str, file: str) -> dict[str, np.ndarray]:
  path = os.path.join(root, *file.split("/"))
  try:
    content = pathlib.Path(path).read_bytes()
  except OSError as error:
    raise errors.DataError(f"{path} cannot be read: {error}.") from error
  try:
    arrays = np.load(io.BytesIO(content), allow_pickle=False)
    if not isinstance(arrays, np.lib.npyio.NpzFile):
      raise ValueError("it holds one array without a name, as a .npy does")
    with arrays:
      found = {key: np.asarray(arrays[key]) for key in DIMS if key in arrays}
  except (
    ValueError,
    EOFError,
    OSError,
    NotImplementedError,
    zipfile.BadZipFile,
    zlib.error,
  ) as error:
    raise sources.Corrupt(f"{path} is corrupt: {error}.") from error
  wanted: tuple[str, ...] = ("image", "text", "pooled")
  if "embedding" in found and not {"text", "pooled"} & found.keys():
    wanted = ("image",)
  for key in wanted:
    if key not in found:
      raise sources.Corrupt(f"{path} has no {key!r}, only {sorted(found)}.")
  try:
    found = {key: _sound(key, value) for key, value in found.items()}
    if "text_mask" in found and len(found["text_mask"]) != len(found["text"]):
      raise ValueError(
        f"'text_mask' is of {len(found['text_mask'])} tokens, and 'text' has "
        f"{len(found['text'])}."
      )
    return found
  except ValueError as error:
    raise sources.Corrupt(f"{path}: {error}") from error


def _sound(key: str, array: np.ndarray) -> np.ndarray:
  """Returns an array as batches have it; raises ValueError where it cannot."""
  dims = DIMS[key]
  if array.ndim != len(dims) or not array.size:
    raise ValueError(
      f"{key!r} has the shape {array.shape}; it must be [{', '.join(dims)}], "
      "of one example."
    )
  if key == "text_mask":
    if array.dtype.kind not in "biuf" or not np.isin(array, (0, 1)).all():
      raise ValueError(
        f"{key!r} must hold true or false, or 1 and 0, and holds {array.dtype}."
      )
    return array.astype(bool)
  if array.dtype.kind != "f":
    raise ValueError(
      f"{key!r} holds {array.dtype}; it must be floating point: latents, or "
      "pixels in [-1, 1], and embeddings, not tokens."
    )
  with np.errstate(over="ignore"):
    array = array.astype(np.float32)
  if not np.isfinite(array).all():
    broken = array.size - np.isfinite(array).sum()
    raise ValueError(f"{broken} numbers of {key!r} are not finite in float32.")
  return array
