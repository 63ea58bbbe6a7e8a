"""What stands beside a transformer in a pipeline of diffusers.

The scheduler that goes along the times of a run, where one can, and the run's
way of sampling that goes along those of a scheduler; and the folder of a whole
pipeline, whose other parts come from another.
"""

import json
import pathlib
import shutil
from typing import Any

from flowjax import errors
from flowjax.interop import clip, clip_vision, diffusers_configs, t5

INDEX = "model_index.json"
TRANSFORMER, SCHEDULER, VAE = "transformer", "scheduler", "vae"
IMAGE_ENCODER = "image_encoder"
(T5,) = t5.CLASSES
_CLIP, _PROJECTED = clip.CLASSES
# Pipelines whose parts are ours: the text encoders of each, with their classes.
KINDS = {"StableDiffusion3Pipeline": "sd3", "FluxPipeline": "flux"}
_ENCODERS = {
  "sd3": {
    "text_encoder": _PROJECTED,
    "text_encoder_2": _PROJECTED,
    "text_encoder_3": T5,
  },
  "flux": {"text_encoder": _CLIP, "text_encoder_2": T5},
}
# T5 is most of the memory, and SD3 can do without it.
_OPTIONAL = ("text_encoder_3",)
_VAE_CLASS = "AutoencoderKL"
_EULER = "FlowMatchEulerDiscreteScheduler"
_SCHEDULER_FILE = "scheduler_config.json"
# What schedulers take a network's output for, in their words and in ours; those
# that match flows know the velocity of the straight path alone.
_FLOW_MATCH = "FlowMatch"
_OUTPUTS = {
  "epsilon": "noise",
  "sample": "data",
  "v_prediction": "v",
  "flow_prediction": "velocity",
}
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
    "_class_name": _EULER,
    "_diffusers_version": diffusers_configs.VERSION,
    "num_train_timesteps": 1000,
    "shift": shift,
    "use_dynamic_shifting": rule is not None,
    **_BY_TOKENS,
  }


def sampling(source: pathlib.Path, guided: bool) -> dict[str, Any] | None:
  """Returns the values of `config.sample` that step as a pipeline does.

  They are None where its scheduler does what no config says. Steps and guidance
  are those that the pipeline takes by itself; FLUX is `guided` if it is told a
  scale.
  """
  index = read_index(source)
  kind = require_kind(source, index)
  content = read_json(source / SCHEDULER / _SCHEDULER_FILE)
  grid: dict[str, Any] = {"name": "flow_match", "compat": True}
  plain = {"num_train_timesteps": 1000, "time_shift_type": "exponential"}
  known = {**plain, "shift": 1.0, "use_dynamic_shifting": False, **_BY_TOKENS}
  others = content.keys() - known.keys()
  if content.get("_class_name") != _EULER or any(
    content[key] for key in others if not key.startswith("_")
  ):
    return None
  found = known | content
  if any(found[key] != value for key, value in plain.items()):
    return None
  if kind == "flux":
    grid["source"] = "even"
  if found["use_dynamic_shifting"]:
    if kind != "flux" or any(found[k] != n for k, n in _BY_TOKENS.items()):
      return None
    grid["shift_by"] = "flux"
  else:
    grid["shift"] = float(found["shift"])
  chosen: dict[str, Any] = {"name": "cfg", "scale": 7.0}
  if kind == "flux":
    chosen = {"name": "distilled", "scale": 3.5} if guided else {"scale": 1.0}
  return {
    "steps": 4 if kind == "flux" and not guided else 28,
    "solver": {"name": "euler"},
    "grid": grid,
    "guidance": chosen,
  }


def read_index(source: pathlib.Path) -> dict[str, Any]:
  """Returns what a pipeline says of its parts."""
  return read_json(source / INDEX)


def require_kind(source: pathlib.Path, index: dict[str, Any]) -> str:
  """Returns the kind of a pipeline whose parts are all ours.

  Raises UserError for another pipeline, and for a part that is missing or of
  another class.
  """
  name = index.get("_class_name")
  if name not in KINDS:
    raise errors.UserError(
      f"{source / INDEX}: _class_name = {name!r} is no pipeline whose parts "
      f"FlowJAX has; those are {', '.join(KINDS)}."
    )
  kind = KINDS[name]
  wanted = {**_ENCODERS[kind], VAE: _VAE_CLASS}
  for part, cls in wanted.items():
    found = (index.get(part) or [None, None])[-1]
    if found is None and part in _OPTIONAL:
      continue
    if found != cls:
      raise errors.UserError(
        f"{source / INDEX}: {part} is {found!r}, where a {name} has {cls!r}. "
        "Copy the pipeline again, or correct its index."
      )
  _require_folders(source, index)
  return kind


def encoders(index: dict[str, Any]) -> dict[str, str]:
  """Returns the text encoders of a pipeline of ours, and their classes."""
  wanted = _ENCODERS[KINDS[index["_class_name"]]]
  return {name: cls for name, cls in wanted.items() if name in parts(index)}


def has_image_encoder(index: dict[str, Any]) -> bool:
  """Says whether a pipeline has an image encoder that is ours."""
  found = (index.get(IMAGE_ENCODER) or [None])[-1]
  return found in clip_vision.CLASSES


def factor(source: pathlib.Path) -> int:
  """Returns how many pixels, either way, a latent of a pipeline stands for."""
  content = read_json(source / VAE / "config.json")
  return 2 ** (len(content["block_out_channels"]) - 1)


def text_width(source: pathlib.Path) -> int:
  """Returns how wide the text is that the transformer of a pipeline reads."""
  content = read_json(source / TRANSFORMER / "config.json")
  return int(content["joint_attention_dim"])


def read(source: pathlib.Path, config: Any) -> dict[str, Any]:
  """Returns the index of a pipeline into which a network of ours fits.

  Raises UserError for a folder that is none, or is one of another network.
  """
  index = read_index(source)
  ours = diffusers_configs.write(config)["_class_name"]
  theirs = (index.get(TRANSFORMER) or [None])[-1]
  if theirs != ours:
    raise errors.UserError(
      f"{source / INDEX}: its transformer is {theirs!r}, and this run's is "
      f"{ours!r}: name a pipeline of that class."
    )
  _require_folders(source, index)
  if VAE in parts(index):
    latents = read_json(source / VAE / "config.json").get("latent_channels")
    if latents != config.channels:
      raise errors.UserError(
        f"{source / VAE}: its latents have {latents} channels, and the network "
        f"draws {config.channels}: this is not its VAE."
      )
  return index


def require_steps(source: pathlib.Path, flow: dict[str, Any]) -> None:
  """Refuses a run whose output the scheduler of a pipeline takes for another.

  One that says nothing of it is not judged.
  """
  path = source / SCHEDULER / _SCHEDULER_FILE
  content = read_json(path) if path.exists() else {}
  name = str(content.get("_class_name"))
  told = content.get("prediction_type")
  if name.startswith(_FLOW_MATCH):
    told = "flow_prediction"
  if told not in _OUTPUTS:
    return
  straight = flow["path"]["name"] == "straight"
  if flow["prediction"] == _OUTPUTS[told] and straight == (
    told == "flow_prediction"
  ):
    return
  kind = "the straight path" if told == "flow_prediction" else "another path"
  raise errors.UserError(
    f"{path}: {name} takes the output of a network for {_OUTPUTS[told]!r} on "
    f"{kind}, and this run has config.flow.prediction = "
    f"{flow['prediction']!r} on the path {flow['path']['name']!r}: the "
    "pipeline would draw something else without a word. Name a pipeline with "
    "another scheduler, or export with --format=torch, whose config.json says "
    "both."
  )


def same_scheduler(source: pathlib.Path, scheduler: dict[str, Any]) -> bool:
  """Says whether the scheduler of a pipeline does what another one does."""
  path = source / SCHEDULER / _SCHEDULER_FILE
  found = read_json(path) if path.exists() else {}
  return all(
    found.get(key) == value
    for key, value in scheduler.items()
    if key != "_diffusers_version"
  )


def copy(source: pathlib.Path, folder: pathlib.Path) -> None:
  """Copies a pipeline but for its transformer, of which it says the sizes."""
  index = read_index(source)
  (folder / TRANSFORMER).mkdir(parents=True)
  name = f"{TRANSFORMER}/config.json"
  shutil.copyfile(source / name, folder / name)
  write(folder, source, index)


def write(
  folder: pathlib.Path, source: pathlib.Path, index: dict[str, Any]
) -> None:
  """Copies the parts of a pipeline that `folder` has not yet, and its index."""
  for name in parts(index):
    if not (folder / name).exists():
      # What are links to read-only files, as in a cache, become files of ours.
      shutil.copytree(
        source / name, folder / name, copy_function=shutil.copyfile
      )
  if (folder / SCHEDULER).exists():
    content = read_json(folder / SCHEDULER / _SCHEDULER_FILE)
    entry = ["diffusers", content["_class_name"]]
    if index.get(SCHEDULER) != entry:
      index = {**index, SCHEDULER: entry}
      (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
      return
  shutil.copyfile(source / INDEX, folder / INDEX)


def _require_folders(source: pathlib.Path, index: dict[str, Any]) -> None:
  for name in parts(index):
    if pathlib.PurePath(name).name != name or not (source / name).is_dir():
      raise errors.UserError(
        f"{source / INDEX} names {name!r}, and there is no such folder: copy "
        "the pipeline again, whole but for its transformer."
      )


def parts(index: dict[str, Any]) -> list[str]:
  """Returns the names of the parts other than the transformer."""
  return [
    name
    for name, value in index.items()
    if isinstance(value, list) and value[0] and name != TRANSFORMER
  ]


def _set(group: dict[str, Any]) -> dict[str, Any]:
  """Returns what a group of a config says, without what it leaves open."""
  return {key: value for key, value in group.items() if value is not None}


def read_json(path: pathlib.Path) -> dict[str, Any]:
  """Returns what a JSON file of a pipeline says; raises UserError without."""
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
