"""Samples from a network: noise in, images out, the whole loop one program.

Shape suffixes: B batch, H height, W width, C channels.
"""

import collections.abc
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flowjax import models
from flowjax.flow import editing, guidance, losses, sampling


@dataclasses.dataclass(frozen=True, eq=False)
class Sampler:
  """Draws a batch of images, and says why where that failed.

  `sample(params, cond, start_BHWC, rng_B, scale_B=None, edit=None)` is jitted.
  It returns images_BHWC and, of a solver that chooses its own steps, its
  report, else None. With the report of a solve that did not reach its end,
  `reason(params, cond, scale_B, report, edit)` says at which time it stopped.
  """

  sample: collections.abc.Callable[..., tuple[jax.Array, Any]]
  reason: collections.abc.Callable[..., str]


def build(
  network: models.Network,
  predict: losses.Predictor,
  method: sampling.Method,
  *,
  pushes: collections.abc.Sequence[guidance.Push] = (),
  worse: losses.Predictor | None = None,
  together: collections.abc.Callable[[Any], Any] = lambda jitted: jitted,
) -> Sampler:
  """Returns the sampler of a network.

  `predict(params, x_BHWC, t_B, cond, rng)` is the network as its prediction
  wants it; the `pushes` are away from the same without some of its parts.
  `worse` is another network, guided away from (autoguidance); params are then
  the pair of both. `start` is standard normal noise, or the image at t = 1 of a
  flow between images; `rng_B` holds a key per example, for methods that draw
  noise; `scale_B` a scale of guidance, in place of the method's. Images are
  float32, near [-1, 1] and not clipped. Of a network that is invertible the
  method says only which way. `together` makes of a jitted function one that
  several processes call together.
  """

  def field(params, cond, scale_B):
    params, others = params if worse else (params, None)
    return method.field(
      _of(predict, params),
      cond,
      network.unconditional(cond),
      scale=scale_B,
      pushes=[
        dataclasses.replace(push, degraded=_of(push.degraded, params))
        for push in pushes
      ],
      worse=_of(worse, others) if worse else None,
    )

  def sample(params, cond, start_BHWC, rng_B, scale_B=None, edit=None):
    if edit is not None and network.inverse is not None:
      raise ValueError(
        "A normalizing flow maps noise to images at once: there is no way on "
        "which to start from an image, or to keep a part of it."
      )
    if network.forward is not None and method.rises:
      return network.forward(params, start_BHWC, cond)[0], None
    if network.inverse is not None:
      return network.inverse(params, start_BHWC, cond), None
    made = field(params, cond, scale_B)
    return method.reported(made, start_BHWC, rng_B, edit)

  @jax.jit
  def evaluated(params, cond, scale_B, x_BHWC, t):
    return field(params, cond, scale_B)(x_BHWC, t)

  def reason(params, cond, scale_B, report, edit=None):
    made = functools.partial(evaluated, params, cond, scale_B)
    return method.reason(made, report, edit)

  return Sampler(together(jax.jit(sample)), reason)


def _of(predict: losses.Predictor, params: Any) -> sampling.Predict:
  return lambda x_BHWC, t_B, cond: predict(params, x_BHWC, t_B, cond, None)


def noise(
  seed: int | jax.Array, indices_B: jax.Array, shape: tuple[int, ...]
) -> jax.Array:
  """Returns standard normal noise, image i from fold_in(seed, i).

  So image i is the same however many are drawn, and in whatever batches.
  """

  def one(index):
    key = jax.random.fold_in(jax.random.key(seed), index)
    return jax.random.normal(key, shape, jnp.float32)

  return jax.vmap(one)(indices_B)


def draw(
  sampler: Sampler,
  params: Any,
  cond: dict[str, Any],
  *,
  shape: tuple[int, int, int],
  seed: int,
  batch_size: int,
  put: collections.abc.Callable[[dict], dict],
  fetch: collections.abc.Callable[[Any], np.ndarray] = np.asarray,
  done: collections.abc.Callable[[int], None] = lambda count: None,
  stopped: collections.abc.Callable[[str], None] = lambda reason: None,
  starts: np.ndarray | None = None,
  scales: np.ndarray | None = None,
  images: np.ndarray | None = None,
  masks: np.ndarray | None = None,
  count: int | None = None,
) -> np.ndarray:
  """Draws one image [H, W, C] for each row of `cond`, or `count` without any.

  `put` places a batch on the devices and `fetch` brings images back, `done` is
  told how many images are drawn
  so far, and `stopped` why a solver did not reach the end of some. They start
  from noise, or from `starts`; `scales` are those of guidance, in place of the
  method's. A method that is begun starts from `images`, and of them keeps what
  `masks` [B, H, W, 1] do not have above 0.5.
  """
  if masks is not None and images is None:
    raise ValueError("A mask says what is kept of images: give them, too.")
  count = rows_of(cond, count)
  make_noise = jax.jit(noise, static_argnums=2)
  # One program serves all seeds; a signed number would not hold all of them.
  seed_bits = np.uint32(seed % 2**32)
  rows: dict[str, Any] = {
    "cond": cond,
    "index": np.arange(count, dtype=np.uint32),
  }
  if starts is not None:
    rows["start"] = starts
  if scales is not None:
    rows["scale"] = scales.astype(np.float32)
  if images is not None:
    rows["known"] = images
  if masks is not None:
    rows["mask"] = masks.astype(np.float32)

  def drawn(batch):
    cond, index_B = batch["cond"], batch["index"]
    start_BHWC = batch.get("start")
    if start_BHWC is None:
      start_BHWC = make_noise(seed_bits, index_B, shape)
    edit = None
    if "known" in batch:
      edit = editing.Edit(batch["known"], start_BHWC, batch.get("mask"))
    scale_B = batch.get("scale")
    images_BHWC, report = sampler.sample(
      params, cond, start_BHWC, _keys(seed_bits, index_B), scale_B, edit
    )
    if report is not None and not report.finished:
      stopped(sampler.reason(params, cond, scale_B, report, edit))
    return images_BHWC

  return by_batches(drawn, rows, batch_size, put, fetch, done)


def rows_of(cond: dict[str, Any], count: int | None) -> int:
  """Returns how many images are asked for: `count`, or a row of `cond` each."""
  leaves = jax.tree.leaves(cond)
  if count is None and not leaves:
    raise ValueError(
      "An empty condition says not how many images are to be drawn: give "
      "count=."
    )
  return len(leaves[0]) if count is None else count


def by_batches(
  compute: collections.abc.Callable[[dict], jax.Array],
  rows: dict[str, Any],
  batch_size: int,
  put: collections.abc.Callable[[dict], dict],
  fetch: collections.abc.Callable[[Any], np.ndarray] = np.asarray,
  done: collections.abc.Callable[[int], None] = lambda count: None,
) -> np.ndarray:
  """Returns what `compute` makes of a tree of rows, `batch_size` at a time.

  The last row fills up the last batch, so that one program serves all.
  """
  count = len(jax.tree.leaves(rows)[0])
  parts = []
  for start in range(0, count, batch_size):
    kept_B = np.minimum(np.arange(start, start + batch_size), count - 1)
    batch = put(jax.tree.map(lambda leaf, kept_B=kept_B: leaf[kept_B], rows))
    parts.append(fetch(compute(batch)))
    done(min(start + batch_size, count))
  return np.concatenate(parts)[:count]


@jax.jit
def _keys(seed, index_B):
  # Another stream than that of the noise that the samples start from.
  key = jax.random.fold_in(jax.random.key(seed), 2**31)
  return jax.vmap(lambda index: jax.random.fold_in(key, index))(index_B)
