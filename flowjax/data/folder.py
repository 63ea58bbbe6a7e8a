"""A folder of class folders of images: <dir>/<class>/<file>.

Images of 1 or 3 channels are read from image files. Any other number of
channels is that of latents, [H, W, C] in one `.npy` array per image, which are
taken as they are.
"""

# Shape suffixes: N records.

import dataclasses
import hashlib
import os
import pathlib
from typing import Any

import numpy as np

from flowjax import errors
from flowjax.data import config as config_lib
from flowjax.data import images

IMAGES = (".png", ".jpg", ".jpeg", ".webp")
LATENTS = (".npy",)


@dataclasses.dataclass(frozen=True)
class Folder:
  """One split of the images under `root`, in the order of their paths."""

  root: str
  files: tuple[str, ...]  # "class/file", with "/" on every system.
  label_N: np.ndarray
  class_names: tuple[str, ...]
  shape: tuple[int, int, int]

  @property
  def name(self) -> str:
    return f"folder:{os.path.basename(os.path.abspath(self.root))}"

  @property
  def num_classes(self) -> int:
    return len(self.class_names)

  def __len__(self) -> int:
    return len(self.files)

  def __getitem__(self, i: int) -> dict[str, np.ndarray]:
    path = os.path.join(self.root, *self.files[i].split("/"))
    try:
      content = pathlib.Path(path).read_bytes()
    except OSError as error:
      # Not `Corrupt`: a disk that fails now and then must not change the order.
      raise errors.DataError(f"{path} cannot be read: {error}.") from error
    height, width, channels = self.shape
    if path.lower().endswith(LATENTS):
      image_HWC = images.decode_array(content, shape=self.shape, name=path)
    else:
      image_HWC = images.decode(
        content, image_size=(height, width), channels=channels, name=path
      )
    return {"image": image_HWC, "label": self.label_N[i]}

  def fingerprint(self) -> dict[str, Any]:
    listing = "\n".join(self.files).encode()
    return {
      "records": len(self),
      "classes": list(self.class_names),
      "hash": hashlib.blake2b(listing, digest_size=8).hexdigest(),
    }


def open(config: config_lib.DataConfig, split: str) -> Folder:
  """Lists the images of `split` of the folder that `config.source` names."""
  endings = IMAGES if config.channels in (1, 3) else LATENTS
  if endings is IMAGES:
    images.check_channels(config.channels)
  root = os.path.expanduser(config.source.partition(":")[2])
  classes = _list_classes(root, endings)
  files, labels = [], []
  for label, name in enumerate(classes):
    for file in _list_images(root, name, endings):
      if is_held_out(file, config.held_out) == (split == "held_out"):
        files.append(file)
        labels.append(label)
  if not files:
    raise errors.DataError(
      f"The split {split!r} of {root!r} is empty at "
      f"config.data.held_out={config.held_out}: change that fraction, or add "
      "images."
    )
  shape = (*config.image_size, config.channels)
  label_N = np.array(labels, np.int32)
  return Folder(root, tuple(files), label_N, tuple(classes), shape)


def _list_classes(root: str, endings: tuple[str, ...]) -> list[str]:
  if not os.path.isdir(root):
    raise errors.DataError(
      f"There is no folder {root!r}: correct config.data.source."
    )
  entries = _visible(root)
  classes = [entry.name for entry in entries if entry.is_dir()]
  loose = [entry.name for entry in entries if _is_image(entry, endings)]
  if not classes and not loose:
    raise errors.DataError(
      f"The folder {root!r} is empty: it should hold one folder of images for "
      "each class."
    )
  if loose:
    raise errors.DataError(
      f"{len(loose)} images lie in {root!r} outside any class folder (the "
      f"first is {loose[0]!r}), so they have no label: move each into a folder "
      "named after its class."
    )
  return classes


def _list_images(root: str, name: str, endings: tuple[str, ...]) -> list[str]:
  entries = _visible(os.path.join(root, name))
  files = [
    f"{name}/{entry.name}" for entry in entries if _is_image(entry, endings)
  ]
  if files:
    return files
  text = f"The class folder {name!r} of {root!r} holds no {'/'.join(endings)}"
  inner = [entry.name for entry in entries if entry.is_dir()]
  if inner:
    text += (
      f", but {len(inner)} folders (the first is {inner[0]!r}): if these are "
      f"the classes, set config.data.source='folder:{os.path.join(root, name)}'"
    )
  raise errors.DataError(f"{text}.")


def _visible(path: str) -> list[os.DirEntry]:
  with os.scandir(path) as entries:
    seen = [entry for entry in entries if not entry.name.startswith(".")]
  return sorted(seen, key=lambda entry: entry.name)


def _is_image(entry: os.DirEntry, endings: tuple[str, ...]) -> bool:
  return entry.name.lower().endswith(endings) and entry.is_file()


def is_held_out(file: str, fraction: float) -> bool:
  """Decides by the file's own path, so that new files move no old one."""
  digest = hashlib.blake2b(file.encode(), digest_size=8).digest()
  return int.from_bytes(digest, "big") < fraction * 2**64
