"""Drawing samples of a run, while it trains or after."""

import collections.abc
import dataclasses
import functools
from typing import Any

import jax
import numpy as np

from flowjax import errors, models
from flowjax.data import buckets, sources
from flowjax.evaluate import sampling
from flowjax.parallel import distributed, placing
from flowjax.parallel import mesh as meshes
from flowjax.train import aspects, flows, latents, loop, methods, parts, tasks

Draw = collections.abc.Callable[..., np.ndarray]


def build(
  run: parts.Parts,
  method: methods.SampleConfig,
  batch_size: int,
  worse: parts.Parts | None = None,
  *,
  inverse: bool = False,
  strength: float = 1.0,
) -> Draw:
  """Returns `draw(params, cond, *, seed, ...)` for a run's network.

  It gives one image [H, W, C] per row of `cond`, at most `batch_size` at a
  time, and is compiled once. A flow between images starts from those that are
  held out. With `worse`, a run to be guided away from, params are the pair of
  both. The `inverse` gives the noise from which its `starts`, images, are drawn
  without guidance. Below a `strength` of 1 samples start from images that are
  so far on the way to noise. The other options are those of `sampling.draw`.
  """
  flow, model = run.experiment.flow, run.network.config
  if run.network.inverse is not None and method.guidance.scale != 1.0:
    raise errors.UserError(
      f"guidance.scale = {method.guidance.scale}: a normalizing flow has no "
      "field to guide; set 1.0."
    )
  origin = None
  if run.experiment.data.pair_source is not None:
    origin = held_out_source(run)
  with errors.naming("config.sample"):
    made = method.method(flow, flows.tokens_of(model))
    made = made.inverse() if inverse else made.from_images(strength)
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
      together=distributed.together,
    )

  def draw(
    params: Any,
    cond: dict[str, Any],
    *,
    seed: int,
    starts: np.ndarray | None = None,
    count: int | None = None,
    **options: Any,
  ) -> np.ndarray:
    count = sampling.rows_of(cond, count)
    if origin is not None and starts is None:
      chosen = [origin[i % len(origin)] for i in range(count)]
      starts = np.stack([record["source"] for record in chosen])
    cond = latents.with_negative(run.experiment.data, cond)
    if aspects.is_told_sizes(model) and "size_crop" not in cond:
      cond = {**cond, "size_crop": aspects.whole(drawn_size(run), count)}
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
        count=count,
        **options,
      )

  return draw


def drawn_size(run: parts.Parts) -> tuple[int, int]:
  """Returns height and width of the images that are drawn, in pixels."""
  height, width = run.experiment.model.image_size
  scale = aspects.pixels(run.experiment.data)
  return scale * height, scale * width


def reconstructor(
  run: parts.Parts, count: int
) -> collections.abc.Callable[[Any], tuple[np.ndarray, np.ndarray]]:
  """Returns `(params) -> (images, reconstructions)` of held-out images.

  Latents are at their mean.
  """
  network = run.network
  images, _ = held_out(run, count)
  size = meshes.padded(min(count, run.experiment.data.batch_size), run.mesh)

  @jax.jit
  def reconstruct(params, x_BHWC):
    return network.decode(params, network.encode(params, x_BHWC)[0])

  def draw(params: Any) -> tuple[np.ndarray, np.ndarray]:
    with meshes.use(run.mesh), loop.out_of_memory_advice():
      found = sampling.by_batches(
        lambda batch: reconstruct(params, batch["image"]),
        {"image": images},
        size,
        placing.put_whole(run.mesh),
        placing.fetch,
      )
    return images, found

  return draw


def conditions(
  run: parts.Parts, count: int, labels: np.ndarray | None = None
) -> dict[str, Any]:
  """Returns so many conditions: labels, all in turn, or texts held out.

  With a task they are those of held-out images, of which it is told; `labels`
  stand in for theirs. Of a network that is told nothing they are empty.
  """
  if models.told(run.network.config) == "nothing":
    return context(run, count)
  if reads_text(run.network):
    return held_out(run, count)[1]
  told = {}
  if reads_context(run.network):
    told = held_out(run, count)[1]
  elif labels is None:
    labels = np.arange(count) % run.network.config.num_classes
  return told if labels is None else {**told, "label": labels.astype(np.int32)}


def context(run: parts.Parts, count: int) -> dict[str, Any]:
  """Returns what a task tells of held-out images beside labels or texts."""
  if not reads_context(run.network):
    return {}
  return {"context": held_out(run, count)[1]["context"]}


def beside(run: parts.Parts, cond: dict[str, Any]) -> list[np.ndarray]:
  """Returns what stands beside a picture of a task: the image, what is told.

  `cond` is that of `conditions`.
  """
  if "original" in cond:
    return [np.asarray(cond["original"])]
  if not reads_context(run.network):
    return []
  task, told = run.experiment.task, np.asarray(cond["context"])
  images, _ = held_out(run, len(told))
  return [images, task.shown(told, images.shape[-1])]


def held_out(
  run: parts.Parts, count: int
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
  """Returns images that training never sees, over and over, and their cond."""
  source = held_out_source(run)
  records = [source[i % len(source)] for i in range(count)]
  told = jax.eval_shape(lambda: run.network.example(1)).keys()
  keys = [key for key in records[0] if key in (*told, "text_mask")]
  # The mean is what an autoencoder takes for the latents of an image.
  image = "mean" if "mean" in records[0] else "image"
  images = np.stack([record[image] for record in records])
  cond = {key: np.stack([record[key] for record in records]) for key in keys}
  # Embeddings can be stored in half the bytes; a network reads float32.
  batch = {
    key: value if value.dtype.kind in "biu" else value.astype(np.float32)
    for key, value in {**cond, "image": images}.items()
  }
  return batch["image"], told_of(run, batch)


def told_of(
  run: parts.Parts, batch: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
  """Returns what a network is told of images, by its task or by their source.

  It is the same of an image in its place whenever it is looked at.
  """
  run.experiment.require_context()
  key = jax.random.key(run.experiment.seed)
  made = _told(run.experiment.task, batch, key)
  told = jax.eval_shape(lambda: run.network.example(1)).keys()
  keys = [key for key in (*told, "text_mask") if key in made]
  return {key: np.asarray(made[key]) for key in keys}


@functools.partial(jax.jit, static_argnums=0)
def _told(task: tasks.TaskConfig, batch: dict[str, Any], key: jax.Array):
  return task.drawn().add(batch, key)


def captions(run: parts.Parts, count: int) -> list[str]:
  """Returns the captions of what is `held_out`; none of a run without."""
  if not reads_captions(run.network):
    return []
  # Below the tokens are the words.
  source = held_out_source(run).source
  return [source[i % len(source)]["caption"] for i in range(count)]


def held_out_source(run: parts.Parts) -> Any:
  """Returns the held-out split; of aspect buckets that of the reference."""
  return buckets.reference(sources.open(run.experiment.data, "held_out"))


def reads_captions(network: models.Network) -> bool:
  """Whether the network has an encoder of its own, and is told tokens."""
  return "token" in jax.eval_shape(lambda: network.example(1))


def reads_context(network: models.Network) -> bool:
  """Whether the network is told an image beside the one that it draws."""
  return "context" in jax.eval_shape(lambda: network.example(1))


def reads_text(network: models.Network) -> bool:
  """Whether the network is told a text or its tokens, and not a label."""
  return models.told(network.config) == "texts"
