"""Samples from a network: noise in, images out, the whole loop one program.

Shape suffixes: B batch, H height, W width, C channels.
"""

import collections.abc
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flowjax import models
from flowjax.flow import losses, sampling

# sample(params, cond, start_BHWC, rng_B) -> images_BHWC
Sampler = collections.abc.Callable[
  [Any, dict[str, jax.Array], jax.Array, jax.Array], jax.Array
]


def build(
  network: models.Network,
  predict: losses.Predictor,
  method: sampling.Method,
  *,
  degraded: losses.Predictor | None = None,
  worse: losses.Predictor | None = None,
) -> Sampler:
  """Returns the jitted `sample(params, cond, start_BHWC, rng_B)`.

  `predict(params, x_BHWC, t_B, cond, rng)` is the network as its prediction
  wants it; `degraded` is the same without some of its parts, for skip-layer
  guidance. `worse` is another network, guided away from (autoguidance); params
  are then the pair of both. `start` is standard normal noise, or the image at
  t = 1 of a flow between images; `rng_B` holds a key per example, for methods
  that draw noise. Images are float32, near [-1, 1] and not clipped. A network
  that is invertible needs no method.
  """

  def sample(params, cond, start_BHWC, rng_B):
    if network.inverse is not None:
      return network.inverse(params, start_BHWC, cond)
    params, others = params if worse else (params, None)
    return method.sample(
      _of(predict, params),
      cond,
      network.unconditional(cond),
      start_BHWC,
      rng_B,
      degraded=_of(degraded, params) if degraded else None,
      worse=_of(worse, others) if worse else None,
    )

  return jax.jit(sample)


def _of(predict: losses.Predictor, params: Any) -> sampling.Predict:
  return lambda x_BHWC, t_B, cond: predict(params, x_BHWC, t_B, cond, None)


def noise(seed: int, indices_B: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """Returns standard normal noise, image i from fold_in(seed, i).

  So image i is the same however many are drawn, and in whatever batches.
  """

  def one(index):
    key = jax.random.fold_in(jax.random.key(seed), index)
    return jax.random.normal(key, shape, jnp.float32)

  return jax.vmap(one)(indices_B)


def draw(
  sample: Sampler,
  params: Any,
  labels_B: np.ndarray,
  *,
  shape: tuple[int, int, int],
  seed: int,
  batch_size: int,
  put: collections.abc.Callable[[dict], dict],
  done: collections.abc.Callable[[int], None] = lambda count: None,
  starts_BHWC: np.ndarray | None = None,
) -> np.ndarray:
  """Draws one image [H, W, C] for each label, `batch_size` at a time.

  `put` places a batch on the devices and `done` is told how many images are
  drawn so far. The last batch is padded, so that one program serves all. They
  start from noise, or from `starts`.
  """
  make_noise = jax.jit(noise, static_argnums=(0, 2))
  parts = []
  for start in range(0, len(labels_B), batch_size):
    indices_B = np.arange(start, start + batch_size)
    kept_B = np.minimum(indices_B, len(labels_B) - 1)
    starts = (
      np.asarray(make_noise(seed, indices_B, shape))
      if starts_BHWC is None
      else starts_BHWC[kept_B]
    )
    batch = put(
      {
        "label": labels_B[kept_B].astype(np.int32),
        "start": starts,
        "index": indices_B.astype(np.uint32),
      }
    )
    start_BHWC, index_B = batch.pop("start"), batch.pop("index")
    rng_B = _keys(seed, index_B)
    parts.append(np.asarray(sample(params, batch, start_BHWC, rng_B)))
    done(min(start + batch_size, len(labels_B)))
  return np.concatenate(parts)[: len(labels_B)]


@jax.jit
def _keys(seed, index_B):
  # Another stream than that of the noise that the samples start from.
  key = jax.random.fold_in(jax.random.key(seed), 2**31)
  return jax.vmap(lambda index: jax.random.fold_in(key, index))(index_B)
