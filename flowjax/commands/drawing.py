"""Drawing samples of a run, while it trains or after."""

import collections.abc
import dataclasses
from typing import Any

import jax
import numpy as np

from flowjax import errors, models
from flowjax.data import sources
from flowjax.evaluate import sampling
from flowjax.parallel import mesh as meshes
from flowjax.parallel import placing
from flowjax.train import flows, loop, methods, parts

Draw = collections.abc.Callable[..., np.ndarray]


def build(
  run: parts.Parts,
  method: methods.SampleConfig,
  batch_size: int,
  worse: parts.Parts | None = None,
  *,
  inverse: bool = False,
) -> Draw:
  """Returns `draw(params, cond, *, seed, ...)` for a run's network.

  It gives one image [H, W, C] per row of `cond`, at most `batch_size` at a
  time, and is compiled once. A flow between images starts from those that are
  held out. With `worse`, a run to be guided away from, params are the pair of
  both. The `inverse` gives the noise from which its `starts`, images, are drawn
  without guidance. The other options are those of `sampling.draw`.
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
  with errors.naming("config.sample"):
    made = method.method(flow, flows.tokens_of(model))
    made = made.inverse() if inverse else made
    pushes = [] if inverse else method.guidance.pushes(run.network)
    sampler = sampling.build(
      run.network,
      flow.predictor(run.network, with_variance=made.learns_variance),
      made,
      pushes=[
        dataclasses.replace(push, degraded=flow.prepared(push.degraded))
        for push in pushes
      ],
      worse=worse.experiment.flow.predictor(worse.network) if worse else None,
    )

  def draw(
    params: Any,
    cond: dict[str, Any],
    *,
    seed: int,
    starts: np.ndarray | None = None,
    **options: Any,
  ) -> np.ndarray:
    if origin is not None and starts is None:
      count = len(jax.tree.leaves(cond)[0])
      chosen = [origin[i % len(origin)] for i in range(count)]
      starts = np.stack([record["source"] for record in chosen])
    with meshes.use(run.mesh), loop.out_of_memory_advice():
      return sampling.draw(
        sampler,
        params,
        cond,
        shape=(*model.image_size, model.channels),
        seed=seed,
        batch_size=meshes.padded(batch_size, run.mesh),
        put=placing.put_whole(run.mesh),
        fetch=placing.fetch,
        starts=starts,
        **options,
      )

  return draw


def conditions(
  run: parts.Parts, count: int, labels: np.ndarray | None = None
) -> dict[str, Any]:
  """Returns so many conditions: labels, all in turn, or texts held out."""
  if not reads_text(run.network):
    if labels is None:
      labels = np.arange(count) % run.network.config.num_classes
    return {"label": labels.astype(np.int32)}
  return held_out(run, count)[1]


def held_out(
  run: parts.Parts, count: int
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
  """Returns images that training never sees, over and over, and their cond."""
  source = sources.open(run.experiment.data, "held_out")
  records = [source[i % len(source)] for i in range(count)]
  told = jax.eval_shape(lambda: run.network.example(1)).keys()
  keys = [key for key in records[0] if key in (*told, "text_mask")]
  images = np.stack([record["image"] for record in records])
  return images, {
    key: np.stack([record[key] for record in records]) for key in keys
  }


def captions(run: parts.Parts, count: int) -> list[str]:
  """Returns the captions of what is `held_out`; none of a run without."""
  if not reads_captions(run.network):
    return []
  # Below the tokens are the words.
  source = sources.open(run.experiment.data, "held_out").source  # type: ignore[attr-defined]
  return [source[i % len(source)]["caption"] for i in range(count)]


def reads_captions(network: models.Network) -> bool:
  """Whether the network has an encoder of its own, and is told tokens."""
  return "token" in jax.eval_shape(lambda: network.example(1))


def reads_text(network: models.Network) -> bool:
  """Whether the network is told a text or its tokens, and not a label."""
  return "label" not in jax.eval_shape(lambda: network.example(1))
