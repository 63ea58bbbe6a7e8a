"""A run that is only read: its parts, and its weights on these devices."""

import argparse
import dataclasses
import pathlib
from typing import Any

import jax
import numpy as np

from flowjax import errors, schema
from flowjax.evaluate import sampling
from flowjax.parallel import mesh as meshes
from flowjax.train import checkpoint, experiment, loop, parts, workdir


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

  def draw(
    self, labels: np.ndarray, *, seed: int, done=lambda count: None, **changes
  ) -> np.ndarray:
    """Draws an image per label as the config says, but for `changes`."""
    chosen = {**schema.to_dict(self.config.sample), **changes}
    sample = sampling.build(
      self.run.network,
      solver=chosen["solver"],
      steps=chosen["steps"],
      scale=chosen["guidance"],
      interval=tuple(chosen["guidance_interval"]),
      shift=chosen["shift"],
    )
    most = min(len(labels), self.config.data.batch_size)
    with meshes.use(self.run.mesh), loop.out_of_memory_advice():
      return sampling.draw(
        sample,
        self.params,
        labels,
        shape=(*self.config.model.image_size, self.config.model.channels),
        seed=seed,
        batch_size=meshes.padded(most, self.run.mesh),
        put=loop.put_batch(self.run.mesh),
        done=done,
      )


def open(directory: pathlib.Path, *, ema: bool = True) -> Restored:
  """Restores the averaged (or raw) weights of a workdir, and only these.

  The mesh is over all devices of this machine, whatever the run was trained
  on. Raises UserError if there is no checkpoint, CheckpointError if none is
  sound.
  """
  config = workdir.read_config(directory)
  here = dataclasses.replace(
    config,
    mesh=meshes.MeshConfig(data=1, fsdp=-1),
    data=dataclasses.replace(config.data, batch_size=jax.device_count()),
    optim=dataclasses.replace(config.optim, accumulate=1),
    # The body that the run was trained with may not exist on this machine.
    model=dataclasses.replace(config.model, attention="auto"),
  )
  run = parts.build(here)
  run = dataclasses.replace(run, experiment=config)
  name = "ema" if ema else "params"
  saved = checkpoint.Checkpoints(
    directory / "checkpoints", config.checkpoint, read_only=True
  )
  try:
    with loop.out_of_memory_advice():
      restored = saved.restore_subtree({name: getattr(run.abstract, name)})
  finally:
    saved.close()
  if restored is None:
    raise errors.UserError(
      f"{directory} holds no checkpoint yet. `flowjax train --workdir="
      f"{directory}` makes one."
    )
  return Restored(
    directory, run, restored.step, restored.state[name], restored.extra
  )


def add_run(parser) -> None:
  """Adds the flags that name a run and which of its weights."""
  parser.add_argument(
    "--workdir",
    type=pathlib.Path,
    required=True,
    help="the folder that `flowjax train` wrote",
  )
  parser.add_argument(
    "--ema",
    action=argparse.BooleanOptionalAction,
    default=True,
    help="the averaged weights, or the raw ones",
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
