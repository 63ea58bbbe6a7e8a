"""A run that begins with weights from elsewhere: its checkpoint of step 0."""

import collections.abc
import concurrent.futures
import functools
import logging
import pathlib
from typing import Any

import jax
import numpy as np

from flowjax import errors, schema
from flowjax.parallel import distributed
from flowjax.train import checkpoint, lock, loop, manifest, parts, workdir
from flowjax.train import state as states

_THREADS = 8

# Arrays, or what becomes one when it is asked for.
Leaves = collections.abc.Iterable[tuple[str, Any]]


def require_new(directory: pathlib.Path) -> None:
  """Refuses a workdir in which there is a run already, and one that is none."""
  if directory.exists() and not directory.is_dir():
    raise errors.UserError(f"--workdir={directory} is a file; name a folder.")
  saved = checkpoint.Checkpoints(directory / "checkpoints", read_only=True)
  try:
    steps = saved.steps()
  finally:
    saved.close()
  if steps:
    raise errors.UserError(
      f"{directory} holds a run already, at step {steps[-1]}. Choose another "
      "--workdir for the imported one."
    )


def place(run: parts.Parts, leaves: Leaves) -> dict[str, jax.Array]:
  """Places leaves on the mesh as they come, each device its own slice.

  The host holds one at a time.
  """
  named = manifest.named_leaves(run.abstract.params)
  placed: dict[str, jax.Array] = {}
  with loop.out_of_memory_advice():
    for path, leaf in leaves:
      # Read once, as it will be, and then each device has its slice.
      whole = np.asarray(leaf, named[path].dtype)
      if not _is_finite(whole):
        logging.warning("%s is not finite: these weights are broken.", path)
      placed[path] = jax.make_array_from_callback(
        whole.shape, named[path].sharding, whole.__getitem__
      )
      # The copies to devices read from `whole`, which ends here.
      placed[path].block_until_ready()
  return placed


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


def _is_finite(array: np.ndarray) -> bool:
  def total(part):
    with np.errstate(over="ignore", invalid="ignore"):
      return part.sum()

  # Sums are quickly made, and finite only if each term is.
  with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
    totals = list(pool.map(total, np.array_split(array.reshape(-1), _THREADS)))
  return bool(np.isfinite(totals).all() or np.isfinite(array).all())
