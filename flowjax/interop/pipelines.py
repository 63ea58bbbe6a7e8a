"""What stands beside a transformer in a pipeline of diffusers.

The scheduler that goes along the times of a run, where one can; and the folder
of a whole pipeline, whose other parts come from another.
"""

import json
import pathlib
import shutil
from typing import Any

from flowjax import errors
from flowjax.interop import diffusers_configs

INDEX = "model_index.json"
TRANSFORMER, SCHEDULER, VAE = "transformer", "scheduler", "vae"
# The rule by which FLUX shifts, exp(mu) with mu linear in the tokens.
_BY_TOKENS = {
  "base_shift": 0.5,
  "max_shift": 1.15,
  "base_image_seq_len": 256,
  "max_image_seq_len": 4096,
}


def scheduler(
  flow: dict[str, Any], sample: dict[str, Any]
) -> dict[str, Any] | None:
  """Returns the scheduler that steps as `config.sample` says, if one does.

  Euler's steps along the straight path, at times that are even but for a
  shift: the scheduler knows the shift alone, and a pipeline begins with times
  of its own unless it is given sigmas.
  """
  grid = _set(sample["grid"])
  even = _set(flow["path"]) == {"name": "straight"}
  as_trained = _set(sample["path"]) == {"name": "as_trained"}
  euler = _set(sample["solver"]) == {"name": "euler"}
  if not (even and as_trained and euler and flow["prediction"] == "velocity"):
    return None
  if grid.pop("name") not in ("uniform", "flow_match"):
    return None
  shift, rule = grid.pop("shift", 1.0), grid.pop("shift_by", None)
  if grid.keys() - {"source", "compat"} or rule not in (None, "flux"):
    return None
  if rule and shift != 1.0:
    return None  # It shifts either by its own number or by the tokens.
  return {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "_diffusers_version": diffusers_configs.VERSION,
    "num_train_timesteps": 1000,
    "shift": shift,
    "use_dynamic_shifting": rule is not None,
    **_BY_TOKENS,
  }


def read(source: pathlib.Path, config: Any) -> dict[str, Any]:
  """Returns the index of a pipeline into which a network of ours fits.

  Raises UserError for a folder that is none, or is one of another network.
  """
  index = _read_json(source / INDEX)
  ours = diffusers_configs.write(config)["_class_name"]
  theirs = (index.get(TRANSFORMER) or [None])[-1]
  if theirs != ours:
    raise errors.UserError(
      f"{source / INDEX}: its transformer is {theirs!r}, and this run's is "
      f"{ours!r}: name a pipeline of that class."
    )
  for name in _parts(index):
    if pathlib.PurePath(name).name != name or not (source / name).is_dir():
      raise errors.UserError(
        f"{source / INDEX} names {name!r}, and there is no such folder: copy "
        "the pipeline again, whole but for its transformer."
      )
  if VAE in _parts(index):
    latents = _read_json(source / VAE / "config.json").get("latent_channels")
    if latents != config.channels:
      raise errors.UserError(
        f"{source / VAE}: its latents have {latents} channels, and the network "
        f"draws {config.channels}: this is not its VAE."
      )
  return index


def write(
  folder: pathlib.Path, source: pathlib.Path, index: dict[str, Any]
) -> None:
  """Copies the parts of a pipeline that `folder` has not yet, and its index."""
  for name in _parts(index):
    if not (folder / name).exists():
      # What are links to read-only files, as in a cache, become files of ours.
      shutil.copytree(
        source / name, folder / name, copy_function=shutil.copyfile
      )
  if (folder / SCHEDULER).exists():
    content = _read_json(folder / SCHEDULER / "scheduler_config.json")
    index = {**index, SCHEDULER: ["diffusers", content["_class_name"]]}
  (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _parts(index: dict[str, Any]) -> list[str]:
  """Returns the names of the parts other than the transformer."""
  return [
    name
    for name, value in index.items()
    if isinstance(value, list) and value[0] and name != TRANSFORMER
  ]


def _set(group: dict[str, Any]) -> dict[str, Any]:
  """Returns what a group of a config says, without what it leaves open."""
  return {key: value for key, value in group.items() if value is not None}


def _read_json(path: pathlib.Path) -> dict[str, Any]:
  try:
    content = json.loads(path.read_text())
  except (OSError, ValueError) as error:
    raise errors.UserError(
      f"{path} cannot be read: {error}. A pipeline of diffusers is the folder "
      f"that its save_pretrained writes, with {INDEX} in it."
    ) from error
  if not isinstance(content, dict):
    raise errors.UserError(f"{path} is no description of a pipeline's part.")
  return content
