"""Drawing samples of a run, while it trains or after."""

import collections.abc
from typing import Any

import numpy as np

from flowjax import errors, models
from flowjax.data import sources
from flowjax.evaluate import sampling
from flowjax.parallel import mesh as meshes
from flowjax.train import loop, methods, parts

Draw = collections.abc.Callable[..., np.ndarray]


def build(
  run: parts.Parts,
  method: methods.SampleConfig,
  batch_size: int,
  worse: parts.Parts | None = None,
) -> Draw:
  """Returns `draw(params, labels, *, seed, done)` for a run's network.

  It gives one image [H, W, C] per label, at most `batch_size` at a time, and is
  compiled once. A flow between images starts from those that are held out. With
  `worse`, a run to be guided away from, params are the pair of both.
  """
  flow, model = run.experiment.flow, run.network.config
  if run.network.inverse is not None and method.guidance.scale != 1.0:
    raise errors.UserError(
      f"guidance.scale = {method.guidance.scale}: a normalizing flow has no "
      "field to guide; set 1.0."
    )
  origin = None
  if run.experiment.data.pair_source is not None:
    origin = sources.open(run.experiment.data, "held_out")
  skipped = method.guidance.skip_layers
  with errors.naming("config.sample"):
    sample = sampling.build(
      run.network,
      flow.predictor(run.network),
      method.method(flow),
      degraded=flow.prepared(models.without_layers(run.network, skipped))
      if skipped
      else None,
      worse=worse.experiment.flow.predictor(worse.network) if worse else None,
    )

  def draw(
    params: Any,
    labels: np.ndarray,
    *,
    seed: int,
    done: collections.abc.Callable[[int], None] = lambda count: None,
  ) -> np.ndarray:
    starts = None
    if origin is not None:
      chosen = [origin[i % len(origin)] for i in range(len(labels))]
      starts = np.stack([record["source"] for record in chosen])
    with meshes.use(run.mesh), loop.out_of_memory_advice():
      return sampling.draw(
        sample,
        params,
        labels,
        shape=(*model.image_size, model.channels),
        seed=seed,
        batch_size=meshes.padded(batch_size, run.mesh),
        put=loop.put_batch(run.mesh),
        done=done,
        starts_BHWC=starts,
      )

  return draw
