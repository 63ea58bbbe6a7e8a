"""A folder of latents with the embeddings of their texts: <dir>/**/*.npz.

Each file is one example: "image" [H, W, C], latents or pixels in [-1, 1];
"text" [L, E], the embedded tokens; "pooled" [P], one vector of the whole text;
and, where some of the tokens are padding, "text_mask" [L], true for the others.
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
from typing import Any

import numpy as np

from flowjax import errors
from flowjax.data import config as config_lib
from flowjax.data import folder, sources

KEYS = ("image", "text", "pooled", "text_mask")


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
      found = _read(self.root, self.files[0])
    except sources.Corrupt as error:
      raise errors.DataError(
        f"{error} It is the first file, which says what all of them hold: "
        "repair or remove it."
      ) from error
    return {key: np.zeros_like(value) for key, value in found.items()}

  def __len__(self) -> int:
    return len(self.files)

  def __getitem__(self, i: int) -> dict[str, np.ndarray]:
    blank, found = self.blank, _read(self.root, self.files[i])
    if found["image"].shape != self.shape:
      raise sources.Corrupt(
        f"{self.files[i]} holds an image of {found['image'].shape}, and "
        f"{self.shape} is asked for."
      )
    for key, value in blank.items():
      if key not in found or found[key].shape != value.shape:
        raise sources.Corrupt(
          f"{self.files[i]}: {key!r} must be of the shape {value.shape}, as it "
          f"is in {self.files[0]}."
        )
    return {key: found[key] for key in blank}

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
    if folder.is_held_out(file, config.held_out) == (split == "held_out")
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
    with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
      found = {key: arrays[key] for key in KEYS if key in arrays}
  except (ValueError, EOFError, OSError, zipfile.BadZipFile) as error:
    raise sources.Corrupt(f"{path} is corrupt: {error}.") from error
  for key in ("image", "text", "pooled"):
    if key not in found:
      raise sources.Corrupt(f"{path} has no {key!r}, only {sorted(found)}.")
  kinds = {"text_mask": np.bool_}
  return {k: v.astype(kinds.get(k, np.float32)) for k, v in found.items()}
