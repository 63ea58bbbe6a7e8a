"""The pipeline of a run: frozen parts that make conditions and pictures."""

# Shape suffixes: N rows, H height, W width, C channels.

import dataclasses
import logging
import pathlib
import shutil
from typing import Any

import numpy as np

from flowjax import errors
from flowjax.interop import frozen, pipelines
from flowjax.parallel import distributed
from flowjax.parallel import mesh as meshes
from flowjax.train import experiment, workdir

# Where a workdir keeps the parts of the pipeline that it was imported from.
FOLDER = "pipeline"


def folder(
  directory: pathlib.Path, config: experiment.Experiment
) -> pathlib.Path | None:
  """Returns the folder that config.pipeline names, from the workdir on.

  What is not there is looked for from where the command is given.
  """
  if config.pipeline is None:
    return None
  inside, here = directory / config.pipeline, pathlib.Path(config.pipeline)
  for found in (inside, here.expanduser()):
    if found.is_dir():
      return found
  raise errors.UserError(
    f"config.pipeline = {config.pipeline!r}: there is no folder {inside}, nor "
    "one of that name from here. Copy it there from where the run was imported."
  )


def open(directory: pathlib.Path) -> frozen.Frozen | None:
  """Opens the pipeline of a run, if it has one, over all devices.

  An encoder is held only while it reads: the network has the memory next. What
  is no workdir has none; whoever restores the run says so.
  """
  if not (directory / "config.json").exists():
    return None
  config = workdir.read_config(directory)
  found = folder(directory, config)
  if found is None:
    return None
  mesh = meshes.build(meshes.MeshConfig(data=1, fsdp=-1))
  return frozen.open(found, mesh=mesh, dtype=config.model.dtype, keep=False)


def named(
  config: experiment.Experiment, source: pathlib.Path
) -> experiment.Experiment:
  """Returns the config with the pipeline in `source`, if that is one of ours.

  Raises UserError, before anything large is read, for parts that do not fit
  each other or the network.
  """
  if not _is_ours(source):
    return config
  try:
    pipelines.read(source, config.model)
    parts = frozen.open(source)
    parts.check(config.model)
  except errors.UserError as error:
    raise type(error)(
      f"{error} (To import the transformer alone, name it: "
      f"--from={source / pipelines.TRANSFORMER}.)"
    ) from error
  model = dataclasses.replace(config.model, text_tokens=parts.text_length)
  return dataclasses.replace(config, model=model, pipeline=FOLDER)


def keep(
  config: experiment.Experiment,
  source: pathlib.Path,
  directory: pathlib.Path,
) -> list[str]:
  """Copies the pipeline in `source`, itself or that of a run, into a workdir.

  Returns lines that say so.
  """
  if not _is_ours(source):
    if not (source / "checkpoints").is_dir() or config.pipeline != FOLDER:
      return []
    source = source / FOLDER
  if distributed.is_first():
    partial = directory / f"{FOLDER}.partial"
    try:
      for path in (partial, directory / FOLDER):
        shutil.rmtree(path, ignore_errors=True)
      pipelines.copy(source, partial)
      partial.rename(directory / FOLDER)
    except OSError as error:
      raise errors.UserError(
        f"The pipeline {source} cannot be copied into {directory}: {error}. "
        "Make room, and import again."
      ) from error
  names = ", ".join(pipelines.parts(pipelines.read_index(source)))
  return [
    f"Kept as they are, in {directory / FOLDER}: {names}. To draw:",
    f"  flowjax sample --workdir={directory} --prompt='...'",
  ]


def sampling(source: pathlib.Path, model: Any) -> dict[str, Any]:
  """Returns the values of config.sample with which a pipeline draws."""
  if not _is_ours(source):
    return {}
  guided = getattr(model, "guidance_embed", False)
  found = pipelines.sampling(source, guided)
  if found is None:
    logging.warning(
      "%s: config.sample cannot say what this scheduler does, and is as by "
      "default.",
      source / pipelines.SCHEDULER,
    )
  return found or {}


def texts(
  parts: frozen.Frozen, captions: list[str], negative: str | None
) -> dict[str, Any]:
  """Returns what the network is told of captions, and says which were cut.

  Guidance is away from `negative`; SD3's is away from the empty caption where
  nothing else is said, and FLUX's then from a text of zeros.
  """
  if negative is None and parts.kind == "sd3":
    negative = ""
  rows = [*captions, *([] if negative is None else [negative])]
  for name, cut_N in parts.truncated(rows).items():
    if cut_N.any():
      print(
        f"{cut_N.sum()} of {len(rows)} prompts are longer than the tokens that "
        f"{name} reads, and it sees only how they begin."
      )
  told, count = parts.texts(rows), len(captions)
  cond: dict[str, Any] = {key: value[:count] for key, value in told.items()}
  if negative is not None:
    cond["negative"] = {
      key: np.repeat(value[count:], count, axis=0)
      for key, value in told.items()
    }
  return cond


def latent_size(
  parts: frozen.Frozen | None, size: tuple[int, int] | None
) -> tuple[int, int] | None:
  """Returns the height and width of what is drawn for images of a size."""
  if parts is None or size is None:
    return size
  factor = pipelines.factor(parts.folder)
  if any(side % factor for side in size):
    near = "x".join(str(max(1, round(side / factor)) * factor) for side in size)
    raise errors.UserError(
      f"--size={size[0]}x{size[1]}: the autoencoder makes one latent of "
      f"{factor}x{factor} pixels, which must divide it, as --size={near}."
    )
  return size[0] // factor, size[1] // factor


def pictures(
  parts: frozen.Frozen, z_NHWC: np.ndarray, *, tiled: bool = False
) -> np.ndarray:
  """Returns the images of latents, one at a time on each device."""
  assert parts.mesh is not None
  at_once = meshes.batch_ways(parts.mesh)
  return parts.decode(z_NHWC, at_once, tiled=tiled)


def _is_ours(source: pathlib.Path) -> bool:
  """Says whether a folder holds a pipeline whose parts are known here."""
  if not (source / pipelines.INDEX).is_file():
    return False
  kind = pipelines.read_index(source).get("_class_name")
  return kind in pipelines.KINDS
