"""Folders of encoders of texts and images, as transformers saves them.

A config.json beside `model.safetensors`, or beside several files and their
index. Weights are mapped to memory, and read when they are used.
"""

import dataclasses
import json
import pathlib
from typing import Any

from flowjax import errors
from flowjax.interop import clip, clip_vision, shards, t5, tables, weights
from flowjax.models import clip as clip_model
from flowjax.models import clip_vision as clip_vision_model
from flowjax.models import t5 as t5_model

STEM = "model"
_BY_NAME: dict[str, Any] = {"clip": clip, "t5": t5, "clip_vision": clip_vision}
_KINDS = {module.MODEL_TYPE: module for module in _BY_NAME.values()}
MODULES: dict[str, Any] = {
  "clip": clip_model,
  "t5": t5_model,
  "clip_vision": clip_vision_model,
}


@dataclasses.dataclass(frozen=True)
class Found:
  """An encoder in a folder: its config, and its tensors by transformers' keys.

  `config` says how it is computed as well; whoever computes may change that.
  """

  path: pathlib.Path
  config: Any
  tensors: tables.Tensors

  def leaves(self) -> Any:
    """Yields (path, leaf) of our tree.

    Raises CheckpointError, before the first is read, for what does not fit.
    """
    with errors.naming(str(self.path)):
      return layout(self.config).leaves_of_ours(self.tensors)


def layout(config: Any) -> tables.Table:
  """Returns the table from an encoder's parameters to transformers' keys."""
  return _BY_NAME[config.name].layout(config)


def is_weight(key: str) -> bool:
  """Says whether a tensor is one of the weights, and not a row of numbers."""
  return not key.endswith(clip.UNREAD)


def open(folder: pathlib.Path) -> Found:
  """Finds the text encoder of a folder; nothing but headers is read.

  Raises UserError for another network, and for weights that are pickles.
  """
  path = folder / "config.json"
  try:
    content = json.loads(path.read_text())
  except (OSError, ValueError) as error:
    raise errors.UserError(
      f"{path} cannot be read: {error}. A text encoder is the folder that "
      "transformers' save_pretrained writes."
    ) from error
  kind = content.get("model_type") if isinstance(content, dict) else None
  if kind not in _KINDS:
    raise errors.UserError(
      f"{path}: model_type = {kind!r} is no encoder of FlowJAX; those "
      f"that are: {', '.join(_KINDS)}."
    )
  module = _KINDS[kind]
  file = weights.find(folder, STEM)
  tensors = shards.read(file, is_weight)
  with errors.naming(str(folder)):
    tensors = module.renamed(tensors)
    try:
      config = module.read(content, tensors)
    except TypeError as error:
      raise errors.UserError(f"config.json: {error}") from error
  return Found(folder, config, tensors)


def export(
  params: dict,
  config: Any,
  folder: pathlib.Path,
  *,
  dtype: str = "float32",
  max_bytes: int | None = None,
) -> None:
  """Writes an encoder so that transformers' `from_pretrained` loads it."""
  table = layout(config)
  folder.mkdir(parents=True, exist_ok=True)
  shards.write(
    folder,
    STEM,
    table.keys,
    table.to_theirs(params),
    dtype=dtype,
    max_bytes=max_bytes,
  )
  content = {**_BY_NAME[config.name].write(config), "dtype": dtype}
  (folder / "config.json").write_text(json.dumps(content, indent=2) + "\n")
