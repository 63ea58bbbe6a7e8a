"""Exports that PyTorch opens without FlowJAX, and the way back.

A folder of four files: the weights in `model.safetensors`, `config.json`, the
network and its sampler in `model.py`, and a model card in `README.md`.
"""

import dataclasses
import importlib.resources
import importlib.util
import json
import pathlib
import types
from typing import Any

import jax
import numpy as np

import flowjax
from flowjax import errors, models, schema
from flowjax.interop import (
  cards,
  dit,
  files,
  flux,
  formats,
  mmdit,
  safetensors,
  tables,
)

FORMAT = "flowjax-torch"
TIMES = 5  # at which outputs are compared

# By the name of the network: the table, and beside it torch/<name>.py.
_LAYOUTS: dict[str, Any] = {
  "dit": dit.torch_layout,
  "mmdit": mmdit.torch_layout,
  "flux": flux.torch_layout,
}


def export(
  params: dict,
  config: Any,
  out_dir: str | pathlib.Path,
  *,
  card: dict | str | None = None,
  dtype: str = "float32",
  path: str = "straight",
  prediction: str = "velocity",
):
  """Writes the weights, the config, the PyTorch source and the model card.

  `path` and `prediction` are what the network was trained for; the sampler in
  the PyTorch source refuses all but a velocity on the straight path.

  All four files appear together or not at all. `card` is the text of the
  README, or what `cards.Card` asks for. Only an earlier export is replaced.
  """
  if dtype not in safetensors.DTYPES:
    raise errors.UserError(
      f"Cannot export weights as {dtype!r}. "
      f"{schema.closest(dtype, safetensors.DTYPES)}"
    )
  table, flow = _table(config), {"path": path, "prediction": prediction}
  if isinstance(card, str):
    text = card
  else:
    known = schema.build(cards.Card, card or {}, "card")
    text = cards.render(known, table, config, dtype, flow)
  description = {
    "format": FORMAT,
    "flowjax": flowjax.__version__,
    "dtype": dtype,
    "flow": flow,
    "model": schema.to_dict(config),
  }
  out_dir = pathlib.Path(out_dir)
  with files.export_folder(out_dir, marker="config.json", format=FORMAT) as new:
    safetensors.write(
      new / "model.safetensors",
      table.keys,
      table.to_theirs(params),
      dtype=dtype,
    )
    (new / "model.py").write_text(_source(config))
    (new / "README.md").write_text(text)
    (new / "config.json").write_text(json.dumps(description, indent=2) + "\n")


def read_config(directory: str | pathlib.Path) -> Any:
  """Returns the model config of an export."""
  path = pathlib.Path(directory) / "config.json"
  if files.format_of(path) != FORMAT:
    raise errors.UserError(
      f"{path.parent} is not a finished export of FlowJAX for PyTorch: "
      f"there is no config.json with format '{FORMAT}' in it."
    )
  values = json.loads(path.read_text())["model"]
  return schema.build(models.CONFIGS[values["name"]], values, str(path))


def load(directory: str | pathlib.Path) -> dict:
  """Returns the parameters of an export in our tree, as float32.

  Bit for bit those that were exported, rounded to the dtype of the export.
  """
  table = _table(read_config(directory))
  path = pathlib.Path(directory) / "model.safetensors"
  params = table.to_ours(safetensors.read(path))
  return jax.tree.map(lambda leaf: leaf.astype(np.float32), params)


def verify(
  directory: str | pathlib.Path,
  network: models.Network,
  params: dict,
  *,
  seed: int = 0,
) -> float:
  """Returns the largest difference between the outputs of torch and of ours.

  Noise goes through both networks, in float32, at times from data to noise,
  with conditions and without. An export that was rounded to a smaller dtype
  differs from `params` by that rounding, and not from `load`'s.
  """
  torch = require_torch()
  theirs = load_module(directory).load(directory)
  config = dataclasses.replace(
    network.config, dtype="float32", attention="auto"
  )
  network = models.build(config)

  rng = np.random.default_rng(seed)
  t_B = np.linspace(0.0, 1.0, TIMES, dtype=np.float32)
  shape = (len(t_B), *config.image_size, config.channels)
  x_BHWC = rng.standard_normal(shape, np.float32)

  apply = jax.jit(network.apply)
  params = jax.tree.map(np.asarray, params)
  x_BCHW = torch.from_numpy(x_BHWC).permute(0, 3, 1, 2)
  difference = 0.0
  for cond in conditions(network, rng, len(t_B)):
    # Accelerators round the inputs of float32 products unless told not to.
    with jax.default_matmul_precision("highest"):
      ours_BHWC = np.asarray(apply(params, x_BHWC, t_B, cond))
    told = {key: torch.from_numpy(np.array(cond[key])) for key in cond}
    if "context" in told:
      told["context"] = told["context"].permute(0, 3, 1, 2)
    words: list[Any] = [told]
    if config.name == "dit":
      words = [told.get("label"), told.get("context")]
    with torch.no_grad():
      out_BCHW = theirs(x_BCHW, torch.from_numpy(t_B), *words)
    out_BHWC = out_BCHW.permute(0, 2, 3, 1).numpy()
    difference = max(difference, float(np.abs(out_BHWC - ours_BHWC).max()))
  return difference


def conditions(
  network: models.Network, rng: np.random.Generator, batch: int
) -> list[dict[str, Any]]:
  """Returns what a network may be told, drawn, and what stands for nothing.

  Of texts also one that is padded, with a guidance where there is one.
  """
  config = network.config
  drawn: dict[str, Any] = {}
  for key, value in network.example(batch).items():
    if key == "label":
      drawn[key] = rng.integers(0, config.num_classes, batch, np.int32)
    else:
      drawn[key] = rng.standard_normal(value.shape, np.float32)
  found = [drawn]
  if "text" in drawn:
    mask_BL = rng.random(drawn["text"].shape[:2]) < 0.7
    padded = {**drawn, "text_mask": mask_BL}
    if getattr(config, "guidance_embed", False):
      padded["guidance"] = rng.uniform(1.0, 4.0, batch).astype(np.float32)
    found.append(padded)
  without = [network.unconditional(cond) for cond in found]
  return jax.tree.map(np.asarray, [*found, *without])


def require_torch() -> types.ModuleType:
  """Returns torch, or says how to install it."""
  try:
    import safetensors.torch  # noqa: F401
    import torch
  except ImportError as error:
    raise errors.UserError(
      f"Comparing with PyTorch needs {error.name}: pip install -e '.[torch]'."
    ) from error
  return torch


def load_module(directory: str | pathlib.Path) -> types.ModuleType:
  """Returns the `model.py` of an export as a module."""
  path = pathlib.Path(directory) / "model.py"
  spec = importlib.util.spec_from_file_location("flowjax_exported", path)
  assert spec is not None and spec.loader is not None
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def _table(config: Any) -> tables.Table:
  if config.name not in _LAYOUTS:
    raise errors.UserError(
      f"A network of the kind {config.name!r} cannot be exported for PyTorch; "
      f"those that can: {', '.join(_LAYOUTS)}."
    )
  formats.require_place(config, "torch")
  return _LAYOUTS[config.name](config)


def _source(config: Any) -> str:
  folder = importlib.resources.files("flowjax.interop.torch")
  return (folder / f"{config.name}.py").read_text()
