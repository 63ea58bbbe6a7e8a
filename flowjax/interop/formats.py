"""The formats in which weights cross the border, by name.

  torch      model.py beside its weights, for torch alone   torch_export.py
  diffusers  a folder for its `from_pretrained`             folder_export.py
  original   the keys of the code that came with a paper    folder_export.py

`weights.py` reads them all. What a network is called in each is a table, beside
the others of that network: `dit.py`, `mmdit.py`, `flux.py`.
"""

import dataclasses
import pathlib
from typing import Any

from flowjax import errors, models, schema
from flowjax.interop import autoencoder, dit, flux, mmdit, tables

FORMATS = ("torch", "diffusers", "original")
NETWORKS: dict[str, Any] = {
  "dit": dit,
  "mmdit": mmdit,
  "flux": flux,
  "autoencoder": autoencoder,
  "vq": autoencoder,
}

# The parameters of a network that belong to no format of others: a text
# network's own texts for labels, in a file of their own.
LABELS = "label_embed"
LABELS_FILE = "label_embeddings.safetensors"
# Adapters, by the name that diffusers' `load_lora_weights` looks for.
ADAPTERS_FILE = "pytorch_lora_weights.safetensors"

# What a config says of computing and training alone.
COMPUTED = (
  "scan",
  "remat",
  "attention",
  "dtype",
  "label_dropout",
  "condition_dropout",
)


def require_place(config: Any, format: str) -> None:
  """Raises UserError for a network that is told what a format does not know."""
  if getattr(config, "size_conditioning", False):
    raise errors.UserError(
      f"size_conditioning=True: a network that is told sizes of images has "
      f"weights for which the format {format!r} has no place. Train it without "
      "to export it."
    )


def layout(config: Any, format: str) -> tables.Table:
  """Returns the table from a network's parameters to the keys of a format.

  Raises UserError if the format does not hold this network, with the reason.
  """
  names = held(config)
  if format not in names:
    raise errors.UserError(
      f"A network of the kind {config.name!r} has no format {format!r}. "
      f"{schema.closest(format, names)}"
    )
  require_place(config, format)
  find = getattr(NETWORKS[config.name], f"{format}_layout")
  # Only our own torch has a place for what a network learned of its labels.
  return find(config if format == "torch" else without_labels(config))


def layout_to_read(config: Any, format: str) -> tables.Table:
  """Returns the table with which tensors in a format are read.

  Constants that they do not tell may be others than those of the format: it is
  for whoever imports to say how the weights were trained.
  """
  if config.name == "dit":
    told = dit.HELD.get(format, {})
    as_told = {key: told[key] for key in dit.UNTOLD if key in told}
    config = dataclasses.replace(config, **as_told)
  return layout(config, format)


def as_stored(config: Any, tensors: tables.Tensors) -> Any:
  """Returns the config with what tensors tell and their config.json does not.

  That is the grid of an MM-DiT's positions.
  """
  if getattr(config, "position", None) != "sincos2d" or config.name != "mmdit":
    return config
  for key in (mmdit.POSITIONS_IN_DIFFUSERS, mmdit.POSITIONS):
    # Of another shape, it will be told with all that does not fit.
    if key in tensors and mmdit.is_grid(tensors[key].shape):
      return dataclasses.replace(config, **mmdit.grid_of(tensors[key]))
  return config


def held(config: Any) -> list[str]:
  """Returns the formats that know networks of a config's kind."""
  module = NETWORKS.get(config.name)
  return [name for name in FORMATS if hasattr(module, f"{name}_layout")]


def without_labels(config: Any) -> Any:
  """Returns the config of the network that is told its texts.

  A DiT's labels are its own, and stay.
  """
  if config.name == "dit" or not getattr(config, "num_classes", 0):
    return config
  return dataclasses.replace(config, num_classes=0)


def labels_layout(config: Any) -> tables.Table | None:
  """Returns the table to `LABELS_FILE`, where a network has it."""
  if without_labels(config) is config:
    return None
  # K labels and the one for none, S tokens of E, and P of the pooled text.
  sizes = {
    "K": config.num_classes + 1,
    "S": config.label_tokens,
    "E": config.text_width,
    "P": config.pooled_width,
  }
  rules = (
    tables.Rule(f"{LABELS}/text", "text", "K S E -> K S E"),
    tables.Rule(f"{LABELS}/pooled", "pooled", "K P -> K P"),
  )
  return tables.Table(rules, sizes)


def config_of(values: dict[str, Any], like: Any, path: pathlib.Path) -> Any:
  """Returns the config of a network that an export of ours describes.

  How it is computed, which the weights do not hang on, is as in `like`.
  """
  name = values.get("name")
  if name not in NETWORKS:
    raise errors.UserError(
      f"{path}: there is no network {name!r}. "
      f"{schema.closest(str(name), NETWORKS)}"
    )
  config = schema.build(models.CONFIGS[name], values, f"{path}: model")
  if like is None:
    return config
  kept = [key for key in COMPUTED if hasattr(like, key)]
  return dataclasses.replace(
    config, **{key: getattr(like, key) for key in kept}
  )
