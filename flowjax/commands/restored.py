"""A run that is only read: its parts, and its weights on these devices."""

import argparse
import dataclasses
import pathlib
from typing import Any

import jax
import numpy as np

from flowjax import errors, models
from flowjax.commands import configs, drawing, flags
from flowjax.evaluate import sampling
from flowjax.models import lora as adapters
from flowjax.parallel import mesh as meshes
from flowjax.train import (
  aspects,
  checkpoint,
  experiment,
  flows,
  freezing,
  loop,
  methods,
  parts,
  workdir,
)


@dataclasses.dataclass(frozen=True)
class Restored:
  """A workdir's newest sound checkpoint, on a mesh over all devices."""

  directory: pathlib.Path
  run: parts.Parts
  step: int
  params: Any
  extra: dict[str, Any]

  @property
  def config(self) -> experiment.Experiment:
    return self.run.experiment

  def network_params(self) -> dict[str, Any]:
    """Returns the parameters of the network alone, adapters merged."""
    if self.config.is_autoencoder:
      return self.run.network.own(self.params)
    params = {k: v for k, v in self.params.items() if k != "uncertainty"}
    return adapters.merged(self.config.lora, params)

  def draw(
    self,
    cond: dict[str, Any],
    *,
    seed: int,
    method: methods.SampleConfig | None = None,
    worse: "Restored | None" = None,
    inverse: bool = False,
    strength: float = 1.0,
    count: int | None = None,
    **options: Any,
  ) -> np.ndarray:
    """Draws an image per row of `cond`, by `method` or as the config says.

    `worse` is a run to be guided away from (autoguidance); the `inverse` draws
    the noise of images. With a `strength` below 1 samples start from `images`.
    Other options are those of `evaluate.sampling.draw`.
    """
    count = sampling.rows_of(cond, count)
    draw = drawing.build(
      self.run,
      self.config.sample if method is None else method,
      min(count, self.config.data.batch_size),
      worse.run if worse else None,
      inverse=inverse,
      strength=strength,
    )
    params = (self.params, worse.params) if worse else self.params

    def stopped(reason: str) -> None:
      raise errors.NumericError(reason)

    images_NHWC = draw(
      params, cond, seed=seed, stopped=stopped, count=count, **options
    )
    broken = int(np.sum(~np.isfinite(images_NHWC).all(axis=(1, 2, 3))))
    if broken:
      raise errors.NumericError(
        f"{broken} of {count} samples are not finite: the weights are "
        "broken, guidance is too strong, or the solver takes too few steps. "
        "Try --guidance=1, more --steps, or an earlier checkpoint."
      )
    return images_NHWC


def open(
  directory: pathlib.Path,
  *,
  ema: bool = True,
  image_size: tuple[int, int] | None = None,
) -> Restored:
  """Restores the averaged (or raw) weights of a workdir, and only these.

  The mesh is over all devices of this machine, whatever the run was trained
  on. The network draws images of `image_size`, by default of that of training.
  Raises UserError if there is no checkpoint, CheckpointError if none is sound.
  """
  config = workdir.read_config(directory)
  # What is looked at is an image, and no canvas.
  config = dataclasses.replace(
    config, data=dataclasses.replace(config.data, padded_patch=0)
  )
  if image_size is not None:
    config = _resized(config, image_size)
  model = config.model
  if hasattr(model, "attention"):
    # The body that the run was trained with may not exist on this machine.
    model = dataclasses.replace(model, attention="auto")
  here = dataclasses.replace(
    config,
    mesh=meshes.MeshConfig(data=1, fsdp=-1),
    data=dataclasses.replace(config.data, batch_size=jax.device_count()),
    optim=dataclasses.replace(config.optim, accumulate=1),
    model=model,
  )
  run = parts.build(here)
  run = dataclasses.replace(run, experiment=config)
  name = "ema" if ema else "params"
  # What is frozen has no average of its own.
  names = {name, "params"} if run.frozen else {name}
  saved = checkpoint.Checkpoints(
    directory / "checkpoints", config.checkpoint, read_only=True
  )
  try:
    with loop.out_of_memory_advice():
      restored = saved.restore_subtree(
        {name: getattr(run.abstract, name) for name in sorted(names)}
      )
  finally:
    saved.close()
  if restored is None:
    raise errors.UserError(
      f"{directory} holds no checkpoint yet: train into it until the first "
      "is saved (config.checkpoint.every), with the command that made it."
    )
  params = freezing.overlaid(
    restored.state.get("params", {}), restored.state[name]
  )
  return Restored(directory, run, restored.step, params, restored.extra)


def require_field(found: Restored, what: str) -> None:
  """Refuses an autoencoder, which draws no samples and has no likelihood."""
  if found.config.is_autoencoder:
    raise errors.UserError(
      f"{found.directory} is the run of an autoencoder, which maps images to "
      f"latents and back: there is nothing in it to {what}. `flowjax evaluate` "
      "shows what it reconstructs, and `flowjax export --format=diffusers` "
      "writes it for a network of its latents."
    )


def _resized(
  config: experiment.Experiment, image_size: tuple[int, int]
) -> experiment.Experiment:
  """Returns the config with images of another size."""
  trained = aspects.sizes(config.data)
  if image_size not in trained and config.model.name not in ("mmdit", "flux"):
    sizes = ", ".join(f"{height}x{width}" for height, width in trained)
    raise errors.UserError(
      f"--size={image_size[0]}x{image_size[1]}: a network "
      f"{config.model.name!r} draws images of the size that it was trained on "
      f"({sizes}); an MM-DiT and a FLUX draw any."
    )
  with errors.naming("--size"):
    data = dataclasses.replace(
      config.data,
      image_size=image_size,
      # Of another aspect what is held out is cut to it.
      buckets=config.data.buckets if image_size in trained else (),
    )
    model = aspects.sized(config.model, image_size)
    return dataclasses.replace(config, model=model, data=data)


def worse(
  directory: pathlib.Path | None, better: Restored, *, ema: bool = True
) -> Restored | None:
  """Restores a run for autoguidance (arXiv:2406.02507): it must be of a kind.

  Raises UserError for one whose flow, images or conditions are not those of
  `better`.
  """
  if directory is None:
    return None
  found = open(directory, ema=ema)
  require_field(found, "guide away from")
  runs = better, found
  if any(run.run.network.inverse is not None for run in runs):
    raise errors.UserError(
      f"--worse={directory}: a normalizing flow has no field to be guided; "
      "both runs must have one."
    )
  ours, theirs = map(_kind, runs)
  rows = [
    f"{key}: {value} and {theirs[key]}"
    for key, value in ours.items()
    if theirs[key] != value
  ]
  if rows:
    raise errors.UserError(
      f"--worse={directory} answers another question than {better.directory}: "
      f"{'; '.join(rows)}. Name a run that has these alike."
    )
  return found


def _kind(found: Restored) -> dict[str, Any]:
  """Returns what runs must share for one to be guided away from the other."""
  flow, model = found.config.flow, found.config.model
  texts = drawing.reads_text(found.run.network)
  return {
    "path": {"name": flow.path.name, **flows.options(flow.path)},
    "prediction": flow.prediction,
    "sigma_data": flow.sigma_data,
    "condition": models.told(model),
    "text_width": model.text_width if texts else None,
    "pooled_width": model.pooled_width if texts else None,
    "num_classes": model.num_classes,
    "image_size": model.image_size,
    "channels": model.channels,
    "context_channels": model.context_channels,
    "task": found.config.task.name,
  }


def add_run(parser) -> None:
  """Adds the flags that name a run and which of its weights."""
  parser.add_argument(
    "--workdir",
    type=flags.path,
    required=True,
    help="the folder that `flowjax train` wrote",
  )
  parser.add_argument(
    "--ema",
    action=argparse.BooleanOptionalAction,
    default=True,
    help="the averaged weights, or the raw ones",
  )


# Flags for what is changed most; every key has its --config.sample.KEY.
_METHOD = {
  "steps": ("steps", flags.count, "steps of the solver"),
  "solver": ("solver.name", str, "a solver, as named in flowjax/flow/solvers"),
  "grid": ("grid.name", str, "its times, as named in flowjax/flow/grids.py"),
  "shift": ("grid.shift", float, "resolution shift of the times"),
  "guidance": ("guidance.scale", float, "guidance scale; 1 is none"),
}


def add_method(parser, *, scales: bool = False) -> None:
  """Adds the flags that change how the config of a run draws samples.

  With `scales`, --guidance takes several of them.
  """
  parser.adjustable = True
  for name, (_, kind, text) in _METHOD.items():
    if scales and name == "guidance":
      kind = flags.numbers
      text += "; of several, as 1,1.5,3, each image gets the next"
    parser.add_argument(f"--{name}", type=kind, help=text)


def method(config: experiment.Experiment, args) -> methods.SampleConfig:
  """Returns how samples are drawn, from the config and then the flags.

  Of several scales of guidance it has the one that is furthest from none.
  """
  given = {
    name: getattr(args, name)
    for name in _METHOD
    if getattr(args, name) is not None
  }
  if isinstance(given.get("guidance"), tuple):
    given["guidance"] = max(given["guidance"], key=lambda s: abs(s - 1.0))
  if config.model.name == "coupling":
    _refuse_for_inverse([f"--{name}" for name in given] + args.overrides)
  words = [
    f"--config.sample.{_METHOD[name][0]}={value}"
    for name, value in given.items()
  ]
  changed = configs.adjusted(config, [*args.overrides, *words], "sample")
  return changed.sample


def refuse_method(found: Restored, args) -> None:
  """Refuses flags of sampling for a run that draws no samples."""
  given = [f"--{name}" for name in _METHOD if getattr(args, name) is not None]
  if given or args.overrides:
    raise errors.UserError(
      f"{[*given, *args.overrides][0]} would be without effect: "
      f"{found.directory} is the run of an autoencoder, which draws no "
      "samples. Leave it out."
    )


def _refuse_for_inverse(words: list[str]) -> None:
  """Refuses what a normalizing flow would not heed; a scale is looked at."""
  scale = ("--guidance", "--config.sample.guidance.scale=")
  for word in words:
    if not word.startswith(scale):
      raise errors.UserError(
        f"{word} would be without effect: a normalizing flow is inverted, in "
        "one evaluation, and follows neither a solver nor a grid. Leave it out."
      )


def refuse_unheeded(
  found: Restored, chosen: methods.SampleConfig, args
) -> None:
  """Refuses flags of a grid where the solver chooses its own steps."""
  if found.run.network.inverse is not None:
    return
  flow, tokens = found.config.flow, flows.tokens_of(found.config.model)
  words = [
    f"--{name}={getattr(args, name)}"
    for name in ("steps", "grid", "shift")
    if getattr(args, name) is not None
  ]
  if not words:
    return
  with errors.naming("config.sample"):
    solver = chosen.method(flow, tokens).solver
  if hasattr(solver, "run"):
    raise errors.UserError(
      f"{words[0]} would be without effect: the solver {solver.name!r} chooses "
      "its own steps. Leave it out, set --config.sample.solver.rtol, or take a "
      "solver that follows a grid, as --solver=heun."
    )


def parse_labels(text: str | None, count: int, classes: int) -> np.ndarray:
  """Returns `count` labels: those of `text` in turn, or all classes in turn.

  Raises UserError for a label that is no number or out of range.
  """
  if text is None:
    return np.arange(count) % classes
  try:
    labels = [int(word) for word in text.split(",")]
  except ValueError as error:
    raise errors.UserError(
      f"--labels={text!r} must be numbers with commas between them."
    ) from error
  outside = [label for label in labels if not 0 <= label < classes]
  if outside:
    raise errors.UserError(
      f"--labels: {outside[0]} is out of range; classes are 0 to {classes - 1}."
    )
  return np.resize(labels, count)
