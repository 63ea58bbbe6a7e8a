"""The `vae/` folder of a pipeline of diffusers, read and written.

`AutoencoderKL` and `VQModel`: config.json beside safetensors.
"""

import json
import pathlib
from typing import Any

import numpy as np

from flowjax import errors
from flowjax.interop import (
  autoencoder,
  diffusers_configs,
  folder_export,
  formats,
  lazy,
  safetensors,
  shards,
  tables,
  weights,
)


def open(
  folder: pathlib.Path, *, dtype: str = "float32"
) -> tuple[Any, dict[str, Any]]:
  """Returns the config and the parameters, arrays of numpy in `dtype`.

  Raises what `find` does.
  """
  config, leaves = find(folder)
  kind = safetensors.DTYPES[dtype][1]
  return config, tables.unflatten(
    {path: np.asarray(leaf, kind) for path, leaf in leaves.items()}
  )


def find(folder: pathlib.Path) -> tuple[Any, dict[str, lazy.Leaf]]:
  """Returns the config and the parameters by path; none of them is read.

  Raises UserError for a folder of another class, and CheckpointError that
  lists every key which does not fit.
  """
  folder = pathlib.Path(folder)
  found = weights.open(folder)
  if found.network not in autoencoder.FIELDS:
    raise errors.UserError(
      f"{folder} holds {found.network or 'no network of ours'!r}; an "
      f"autoencoder is {' or '.join(autoencoder.CLASSES)}."
    )
  config = found.config()
  return config, dict(found.leaves(config)[1])


def write(
  folder: pathlib.Path,
  config: Any,
  params: dict[str, Any],
  *,
  dtype: str = "float32",
) -> None:
  """Writes what `from_pretrained` of the class takes."""
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  table = formats.layout(config, "diffusers")
  stem = folder_export.STEMS["diffusers"]
  shards.write(folder, stem, table.keys, table.to_theirs(params), dtype=dtype)
  content = json.dumps(diffusers_configs.write(config), indent=2)
  (folder / "config.json").write_text(content + "\n")
