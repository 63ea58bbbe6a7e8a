"""A run that begins with weights from elsewhere: its checkpoint of step 0."""

import functools
import pathlib

import jax

from flowjax import errors, schema
from flowjax.parallel import distributed, placing
from flowjax.train import checkpoint, lock, loop, manifest, parts, workdir
from flowjax.train import state as states


def require_new(directory: pathlib.Path) -> None:
  """Refuses a workdir in which there is a run already, and one that is none."""
  if directory.exists() and not directory.is_dir():
    raise errors.UserError(f"--workdir={directory} is a file; name a folder.")
  workdir.require_no_other(directory)
  saved = checkpoint.Checkpoints(directory / "checkpoints", read_only=True)
  try:
    last = saved.last_saved()  # Its metrics may be there without it.
    last = max(saved.steps(), default=last)
  finally:
    saved.close()
  if last is not None:
    raise errors.UserError(
      f"{directory} is that of a run already, at step {last}. Choose another "
      "--workdir for the imported one."
    )


def place(run: parts.Parts, leaves: placing.Leaves) -> dict[str, jax.Array]:
  """Places leaves on the mesh as they come, each device its own slice."""
  with loop.out_of_memory_advice():
    named = manifest.named_leaves(run.abstract.params)
    return placing.put_leaves(leaves, named)


def draw(run: parts.Parts, paths: list[str]) -> dict[str, jax.Array]:
  """Draws some of the parameters anew, as a run that begins with none."""
  named = manifest.named_leaves(run.abstract.params)

  def make():
    params = run.network.init(jax.random.key(run.experiment.seed))
    leaves = manifest.named_leaves(params)
    return {path: leaves[path] for path in paths}

  shardings = {path: named[path].sharding for path in paths}
  return jax.jit(make, out_shardings=shardings)()


def save(
  run: parts.Parts, params: dict[str, jax.Array], directory: pathlib.Path
) -> None:
  """Makes a workdir whose step 0 has these parameters, by path.

  They are also the average, and the optimizer has seen nothing. The arrays of
  `params` are given away.
  """
  make = functools.partial(
    states.begin, optimizer=run.optimizer, frozen=run.frozen
  )
  begin = jax.jit(
    make, out_shardings=parts.shardings_of(run.abstract), donate_argnums=0
  )
  with lock.WorkdirLock(directory), loop.out_of_memory_advice():
    require_new(directory)
    state = begin(manifest.nested(params))
    config = run.experiment
    saved = checkpoint.Checkpoints(directory / "checkpoints", config.checkpoint)
    try:
      extra = {
        "config": schema.to_dict(config),
        "data": None,  # None of it was seen.
        "train_seconds": 0.0,
        "corrupt": 0,
      }
      if not (saved.save(0, state, extra) and saved.wait()):
        raise errors.CheckpointError(
          f"The imported weights could not be saved in {directory}, for the "
          "reason above. Make room, and import again."
        )
    finally:
      saved.close()
    # Last: a workdir without weights is to be none, or `train` would draw some.
    if distributed.is_first():
      workdir.claim(directory, run.experiment)
