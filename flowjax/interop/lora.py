"""Adapters (LoRA) as diffusers and PEFT hold them, out and in."""

import dataclasses
import json
import logging
import pathlib
import re
from typing import Any

import numpy as np

import flowjax
from flowjax import errors, schema
from flowjax.interop import (
  files,
  folder_export,
  formats,
  safetensors,
  tables,
)
from flowjax.interop import lora_layouts as layouts
from flowjax.models import lora

FORMAT = "lora"
FILE = formats.ADAPTERS_FILE
# How keys begin in a pipeline's adapters that are not the transformer's.
_OTHERS = "text_encoder"
# The entry of a header that `load_lora_weights` heeds.
_METADATA = "lora_adapter_metadata"


@dataclasses.dataclass(frozen=True)
class Adapters:
  """Adapters of a file: what config.lora is for them, and the leaves."""

  config: lora.LoraConfig
  leaves: layouts.Leaves


def export(
  params: dict,
  config: Any,
  adapters: lora.LoraConfig,
  out_dir: pathlib.Path,
  *,
  dtype: str = "float32",
  about: dict[str, Any] | None = None,
) -> None:
  """Writes a folder for `load_lora_weights`, all of it or nothing.

  `about` is what else the marker says of it.
  """
  tensors = _exported(params, config, adapters)
  marker, ours = folder_export.MARKER, folder_export.name(FORMAT)
  with files.export_folder(out_dir, format=ours, marker=marker) as new:
    safetensors.write(
      new / FILE,
      {key: tensor.shape for key, tensor in tensors.items()},
      tensors.items(),
      dtype=dtype,
      metadata={_METADATA: json.dumps(_described(tensors, adapters))},
    )
    description = {
      "format": ours,
      "flowjax": flowjax.__version__,
      "dtype": dtype,
      "model": schema.to_dict(config),
      "lora": schema.to_dict(adapters),
      **(about or {}),
      files.LISTED: [FILE, marker],
    }
    text = json.dumps(description, indent=2) + "\n"
    (new / marker).write_text(text)


def read(path: pathlib.Path, config: Any) -> Adapters:
  """Reads adapters for a network from a file, or a folder with `FILE`.

  Layers and parts of a fused kernel for which it has none get zeros, which stay
  so. Raises CheckpointError, listing the keys, for what does not fit.
  """
  path = path / FILE if path.is_dir() else path
  tensors, told = _tensors(path), _told(path)
  ranks = _ranks(path, tensors)
  rank = told.get("r") or layouts.usual(ranks.values())
  alpha = float(told.get("lora_alpha") or rank)
  for module, key in ((m, m + layouts.B) for m in ranks):
    scale = _scale(told, module, alpha, ranks[module])
    if scale != alpha / rank and key in tensors:
      tensors[key] = tensors[key] * (scale * rank / alpha)

  theirs = formats.layout(config, "diffusers")
  linears = layouts.found(theirs, ranks, rank)
  table = layouts.table(theirs, linears)
  for module in layouts.modules(table.keys):
    pair = (module + layouts.A, module + layouts.B)
    if not tensors.keys() & set(pair):
      tensors |= {key: np.zeros(table.keys[key], np.float32) for key in pair}
  with errors.naming(str(path)):
    leaves = tables.flatten(table.to_ours(tensors))
    for linear in linears:
      layouts.part(leaves, linear, rank)
  return Adapters(
    lora.LoraConfig(rank, alpha, tuple(layouts.kernels(leaves))), leaves
  )


def _exported(
  params: dict, config: Any, adapters: lora.LoraConfig
) -> layouts.Leaves:
  """Returns the tensors of their file.

  An adapter of which both factors are zero is none, and is left out.
  """
  group = tables.flatten({lora.GROUP: params[lora.GROUP]})
  leaves = {path: np.asarray(leaf) for path, leaf in group.items()}
  names = layouts.kernels(leaves)
  theirs = formats.layout(config, "diffusers")
  linears = layouts.chosen(theirs, names, adapters.rank)
  table = layouts.table(theirs, linears)
  for linear in linears:
    layouts.join(leaves, linear, names, table.paths)
  tensors = dict(table.to_theirs(tables.unflatten(leaves)))
  pairs = [
    (module + layouts.A, module + layouts.B)
    for module in layouts.modules(tensors)
  ]
  return {
    key: tensors[key]
    for pair in pairs
    if any(tensors[key].any() for key in pair)
    for key in pair
  }


def _tensors(path: pathlib.Path) -> layouts.Leaves:
  """Returns the tensors of a file in float32, all keys with their prefix."""
  if not path.is_file():
    raise errors.UserError(f"--lora={path}: there is no such file.")
  held = safetensors.read(path)
  others = {key for key in held if key.startswith(_OTHERS)}
  if others:
    logging.warning(
      "%s: %d tensors are of text encoders, such as %s, and are left.",
      path, len(others), min(others),
    )  # fmt: skip
  tensors = {
    layouts.PREFIX + key.removeprefix(layouts.PREFIX): tensor.astype(np.float32)
    for key, tensor in held.items()
    if key not in others
  }
  if not layouts.modules(tensors):
    raise errors.CheckpointError(
      f"{path} has no key that ends with {layouts.A}: these are no adapters as "
      f"diffusers and PEFT hold them. It has {safetensors.keys(path)[:3]}. Of "
      "another trainer's file diffusers may make such: load_lora_weights, then "
      "save_lora_weights."
    )
  return tensors


def _ranks(path: pathlib.Path, tensors: layouts.Leaves) -> dict[str, int]:
  """Returns the rank of each module's factors."""
  ranks = {}
  for module in layouts.modules(tensors):
    shape = tensors[module + layouts.A].shape
    if not shape or not shape[0]:
      raise errors.CheckpointError(
        f"{path}: {module}{layouts.A} {list(shape)} has no rank: it is damaged."
      )
    ranks[module] = shape[0]
  return ranks


def _described(
  tensors: layouts.Leaves, adapters: lora.LoraConfig
) -> dict[str, Any]:
  """Returns the fields of a `LoraConfig` of PEFT, as diffusers prefixes them.

  A rank that is not the usual one comes with an alpha of the same ratio.
  """
  ranks = {
    module.removeprefix(layouts.PREFIX): tensors[module + layouts.A].shape[0]
    for module in layouts.modules(tensors)
  }
  other = {
    f"^{re.escape(module)}": rank
    for module, rank in ranks.items()
    if rank != adapters.rank
  }
  fields = {
    "r": adapters.rank,
    "lora_alpha": adapters.scale * adapters.rank,
    "rank_pattern": other,
    "alpha_pattern": {name: adapters.scale * r for name, r in other.items()},
    "target_modules": list(ranks),
  }
  return {layouts.PREFIX + name: value for name, value in fields.items()}


def _told(path: pathlib.Path) -> dict[str, Any]:
  """Returns the fields of PEFT's `LoraConfig` in a header, if there are any."""
  text = safetensors.metadata(path).get(_METADATA, "{}")
  try:
    fields = {
      key.removeprefix(layouts.PREFIX): value
      for key, value in json.loads(text).items()
    }
  except (ValueError, AttributeError) as error:
    raise errors.CheckpointError(
      f"{path}: its header entry {_METADATA!r} is damaged: {error}."
    ) from error
  for name, good in (
    ("r", lambda value: type(value) is int and value > 0),
    ("lora_alpha", _is_scale),
    ("alpha_pattern", _are_scales),
  ):
    if fields.get(name) is not None and not good(fields[name]):
      raise errors.CheckpointError(
        f"{path}: {name} = {fields[name]!r} in its header is none that PEFT "
        "writes: the file is damaged or edited."
      )
  if fields.get("use_dora"):
    raise errors.UserError(
      f"{path} holds DoRA, which also scales the columns of each weight; only "
      "LoRA is read. Merge it in diffusers, and import the merged weights."
    )
  return fields


def _is_scale(value: Any) -> bool:
  return type(value) in (int, float) and 0 < value < float("inf")


def _are_scales(values: Any) -> bool:
  """Says whether these are numbers by regexes over names of modules."""
  try:
    return all(
      re.compile(name) and _is_scale(value) for name, value in values.items()
    )
  except (AttributeError, TypeError, re.error):
    return False


def _scale(told: dict[str, Any], module: str, alpha: float, rank: int) -> float:
  """Returns what the product of a module's factors is multiplied by in PEFT."""
  name = module.removeprefix(layouts.PREFIX)
  for pattern, value in (told.get("alpha_pattern") or {}).items():
    if re.match(rf"(.*\.)?({pattern})$", name):
      alpha = value
      break
  return alpha / (rank**0.5 if told.get("use_rslora") else rank)
