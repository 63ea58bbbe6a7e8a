"""Weights that come in: what lies somewhere, and in which format.

safetensors only, each tensor read from disk when it is used. Before the first
is used, the keys and shapes of all are known to fit the network.
"""

import collections
import collections.abc
import dataclasses
import itertools
import json
import logging
import pathlib
import re
from typing import Any

import numpy as np

from flowjax import errors
from flowjax.interop import (
  autoencoder,
  diffusers_configs,
  files,
  folder_export,
  formats,
  lazy,
  safetensors,
  shards,
  tables,
  torch_export,
)

# Where other parts lie beside the transformer in one file, it has this before
# its keys.
PREFIX = "model.diffusion_model."

Tensors = collections.abc.Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Weights:
  """Tensors of one network, by the keys of a format.

  `description` is what a folder says of them, and `format` is None where
  nothing does: then the keys will tell. `labels` are a network's own texts for
  labels. `left` counts what the file holds beside the network, by its part.
  """

  path: pathlib.Path
  tensors: Tensors
  labels: Tensors
  format: str | None = None
  description: dict[str, Any] = dataclasses.field(default_factory=dict)
  left: dict[str, int] = dataclasses.field(default_factory=dict)

  @property
  def network(self) -> str | None:
    """The name of the network that these are said to be of."""
    if "model" in self.description:
      return str(self.description["model"].get("name"))
    return diffusers_configs.kind(self.description)

  @property
  def bytes(self) -> int:
    return sum(tensor.nbytes for tensor in self.tensors.values())

  def config(self, like: Any = None) -> Any:
    """Returns the config of the network, as the folder or its tensors say it.

    What it does not say is as in `like`.
    """
    if "model" in self.description:
      return formats.config_of(self.description["model"], like, self.path)
    config = like
    if self.format == "diffusers":
      with errors.naming(str(self.path)):
        config = diffusers_configs.read(self.description, like)
    return formats.as_stored(config, self.tensors)

  def leaves(self, config: Any) -> tuple[list[str], lazy.Leaves]:
    """Returns the paths of our leaves, and the leaves as they are read.

    Raises CheckpointError, before the first is read, for what does not fit.
    """
    self._require_as_deep(config)
    table, labels = self._table(config), formats.labels_layout(config)
    with errors.naming(str(self.path)):
      paths, leaves = list(table.paths), table.leaves_of_ours(self.tensors)
      if labels is None or not self.labels:
        return paths, leaves
    with errors.naming(str(self.path / formats.LABELS_FILE)):
      both = labels.leaves_of_ours(self.labels)
    return [*paths, *labels.paths], itertools.chain(leaves, both)

  def _require_as_deep(self, config: Any) -> None:
    """Refuses a depth that would be a table without end.

    Each block has tensors of its own.
    """
    for name in ("depth", "double_depth", "single_depth"):
      depth = getattr(config, name, 0)
      if depth > len(self.tensors):
        raise errors.CheckpointError(
          f"{self.path} has {len(self.tensors)} tensors, and {name}={depth} "
          "would have more. Is the config that of these weights?"
        )

  def _table(self, config: Any) -> tables.Table:
    """Returns the table of the format, or of that whose keys these are."""
    if self.format is not None:
      return formats.layout_to_read(config, self.format)
    found: list[tuple[int, int, tables.Table]] = []
    reasons = []
    for name in formats.held(config):
      try:
        table = formats.layout_to_read(config, name)
      except errors.UserError as error:
        reasons.append(str(error))
        continue
      common = len(self.tensors.keys() & table.keys.keys())
      found.append((common, -len(found), table))
    common, _, table = max(found)
    if not common and reasons:
      raise errors.UserError(
        f"{self.path} is in no format that holds this config:\n"
        + "\n".join(reasons)
      )
    return table


def open(path: pathlib.Path) -> Weights:
  """Finds the weights in a folder of an export or of diffusers, or in a file.

  Of a pipeline's folder the transformer is taken. Nothing but headers is read.
  """
  if not path.exists():
    raise errors.UserError(
      f"--from={path}: there is no such file or folder. (Nothing is fetched: a "
      "repository of weights is to be downloaded first.)"
    )
  if path.is_file():
    return _open_file(path)
  return _open_folder(path)


def _open_folder(path: pathlib.Path) -> Weights:
  if not (path / "config.json").exists() and (path / "transformer").is_dir():
    path = path / "transformer"
  if files.format_of(path / "config.json") == torch_export.FORMAT:
    description = _described(path / "config.json")
    tensors = shards.read(find(path, "model"))
    return Weights(path, tensors, {}, "torch", description)
  if (path / "config.json").exists():
    return _open_diffusers(find(path, folder_export.STEMS["diffusers"]))
  tensors = shards.read(find(path, folder_export.STEMS["original"]))
  return Weights(path, tensors, _labels(path), "original", _marker(path))


def _open_diffusers(file: pathlib.Path) -> Weights:
  """Opens weights beside which lies a config.json of diffusers.

  What our marker says counts while it is of the same network.
  """
  path = file.parent
  content, ours = _read_json(path / "config.json"), _marker(path)
  with errors.naming(str(path / "config.json")):
    diffusers_configs.require_known(content)
  if unknown := diffusers_configs.unknown(content):
    logging.warning(
      "%s: %s, of which %s knows nothing, is passed over.",
      path / "config.json",
      ", ".join(unknown),
      content["_class_name"],
    )
  tensors = shards.read(file)
  if diffusers_configs.kind(content) in autoencoder.FIELDS:
    tensors = autoencoder.renamed(tensors)
  if ours:
    config = formats.config_of(ours["model"], None, path)
    theirs = diffusers_configs.read(content, config)
    if diffusers_configs.write(theirs) == diffusers_configs.write(config):
      content = ours
  return Weights(path, tensors, _labels(path), "diffusers", content)


def _open_file(path: pathlib.Path) -> Weights:
  """Opens one file, or the index of several, of which nothing else is known."""
  if shard := re.fullmatch(r"(.+)-\d+-of-(\d+)\.safetensors", path.name):
    raise errors.UserError(
      f"--from={path} is one of {int(shard.group(2))} files: name their index, "
      f"{shard.group(1)}{shards.INDEX}, or the folder."
    )
  if path.name.startswith(folder_export.STEMS["diffusers"]) and (
    path.with_name("config.json").exists()
  ):
    return _open_diffusers(path)
  if path.name.endswith(shards.INDEX):
    return Weights(path, shards.read(path), {})
  keys = safetensors.keys(path)
  if not any(key.startswith(PREFIX) for key in keys):
    return Weights(path, safetensors.read(path), {})
  found = safetensors.read(path, lambda key: key.startswith(PREFIX))
  left = collections.Counter(
    key.split(".")[0] for key in keys if key not in found
  )
  tensors = {key.removeprefix(PREFIX): found[key] for key in found}
  return Weights(path, tensors, {}, left=dict(left))


def find(folder: pathlib.Path, stem: str) -> pathlib.Path:
  """Returns the weights file of a folder, or the index of its files."""
  for suffix in (shards.INDEX, ".safetensors"):
    if (folder / f"{stem}{suffix}").exists():
      return folder / f"{stem}{suffix}"
  # A variant has its name in between, such as `stem.fp16.safetensors`.
  found = sorted(folder.glob(f"{stem}.*{shards.INDEX}"))
  found = found or sorted(folder.glob(f"{stem}.*.safetensors"))
  if len(found) == 1:
    return found[0]
  if found:
    names = ", ".join(path.name for path in found)
    raise errors.UserError(f"{folder} holds {names}: name one with --from.")
  for path in sorted(folder.iterdir()):
    if path.suffix in safetensors.PICKLES:
      safetensors.refuse_pickle(path)
  raise errors.UserError(
    f"{folder} holds no weights: there is no {stem}.safetensors and no "
    f"{stem}{shards.INDEX} in it. {_hint(folder, stem)}".strip()
  )


def _hint(folder: pathlib.Path, stem: str) -> str:
  """Says what a folder without weights seems to be."""
  if next(folder.glob(f"{stem}-*-of-*.safetensors"), None):
    return "Shards are there without their index: copy it too."
  if (folder / formats.ADAPTERS_FILE).exists():
    return (
      f"In {formats.ADAPTERS_FILE} are adapters: name the weights that they "
      f"are for with --from, and these with --lora={folder}."
    )
  return ""


def _marker(folder: pathlib.Path) -> dict[str, Any]:
  path = folder / folder_export.MARKER
  return _described(path) if path.exists() else {}


def _described(path: pathlib.Path) -> dict[str, Any]:
  """Reads what an export of ours says of itself."""
  content = _read_json(path)
  for name in ("model", "flow", "sample"):
    absent: dict[str, Any] | None = None if name == "model" else {}
    if not isinstance(content.get(name, absent), dict):
      raise errors.CheckpointError(
        f"{path} is damaged: {name} = {content.get(name)!r} is no group of "
        "keys. Export, or copy, the folder again."
      )
  return content


def _labels(folder: pathlib.Path) -> Tensors:
  path = folder / formats.LABELS_FILE
  if path.exists():
    return safetensors.read(path)
  if path.name in _marker(folder).get(files.LISTED, []):
    raise errors.CheckpointError(
      f"{folder} is an export with {path.name}, which is missing: copy it, or "
      "the folder, again."
    )
  return {}


def _read_json(path: pathlib.Path) -> dict[str, Any]:
  try:
    content = json.loads(path.read_text())
  except (OSError, ValueError) as error:
    content = error
  if not isinstance(content, dict):
    raise errors.CheckpointError(f"{path} is damaged: {content}.")
  return content
