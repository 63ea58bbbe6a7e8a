"""Samples from a network: noise in, images out, the whole loop one program.

Shape suffixes: B batch, H height, W width, C channels.
"""

import collections.abc
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flowjax import models
from flowjax.flow import guidance, paths, solvers, times

Sampler = collections.abc.Callable[
  [Any, dict[str, jax.Array], jax.Array], jax.Array
]


def build(
  network: models.Network,
  *,
  solver: str,
  steps: int,
  scale: float = 1.0,
  interval: tuple[float, float] = (0.0, 1.0),
  shift: float = 1.0,
) -> Sampler:
  """Returns the jitted `sample(params, cond, noise_BHWC) -> images_BHWC`.

  Images are float32, near [-1, 1] and not clipped. Guidance of `scale` acts
  for t in `interval`; 1 is the plain conditional field.
  """
  grid = times.uniform_grid(steps, shift)
  method = solvers.build(solver, paths.straight())

  def sample(params, cond, noise_BHWC):
    def velocity(x_BHWC, t_B, cond):
      return network.apply(params, x_BHWC, t_B, cond)

    field = guidance.classifier_free(
      velocity,
      cond,
      network.unconditional(cond),
      scale=scale,
      interval=interval,
    )
    return solvers.solve(method, field, noise_BHWC, grid)

  return jax.jit(sample)


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
) -> np.ndarray:
  """Draws one image [H, W, C] for each label, `batch_size` at a time.

  `put` places a batch on the devices and `done` is told how many images are
  drawn so far. The last batch is padded, so that one program serves all.
  """
  make_noise = jax.jit(noise, static_argnums=(0, 2))
  parts = []
  for start in range(0, len(labels_B), batch_size):
    indices_B = np.arange(start, start + batch_size)
    chosen_B = labels_B[np.minimum(indices_B, len(labels_B) - 1)]
    batch = put(
      {
        "label": chosen_B.astype(np.int32),
        "image": np.asarray(make_noise(seed, indices_B, shape)),
      }
    )
    noise_BHWC = batch.pop("image")
    parts.append(np.asarray(sample(params, batch, noise_BHWC)))
    done(min(start + batch_size, len(labels_B)))
  return np.concatenate(parts)[: len(labels_B)]
