"""The mean and the spread of an autoencoder's latents, as measured."""

# Shape suffixes: B batch, H height, W width, C channels.

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from flowjax.commands import restored
from flowjax.data import buckets, sources
from flowjax.evaluate import sampling
from flowjax.models import vq
from flowjax.parallel import mesh as meshes
from flowjax.parallel import placing
from flowjax.train import loop

COUNT = 1024


@dataclasses.dataclass(frozen=True)
class Seen:
  """Mean and standard deviation of all latents of so many images."""

  images: int
  mean: float
  spread: float


def measure(found: restored.Restored) -> Seen:
  """Measures the latents of the first training images, at most `COUNT`.

  One mean and one variance for all channels and positions (arXiv:2112.10752,
  appendix G): of latents that are drawn, var(mean) + E[variance]; with a
  codebook, of those before it.
  """
  run, config = found.run, found.config
  params = found.network_params()
  source = buckets.reference(sources.open(config.data, "train"))
  count = min(COUNT, len(source))
  images = np.stack([source[i]["image"] for i in range(count)])

  @jax.jit
  def moments(batch):
    x_BHWC = batch["image"]
    if config.model.name == "vq":
      z_BHWC = vq.latents(config.model, params, x_BHWC)
      variance = jnp.zeros(())
    else:
      z_BHWC, log_variance = run.network.encode(found.params, x_BHWC)
      variance = jnp.exp(log_variance)
    square_BHWC = jnp.square(z_BHWC) + variance
    each = [jnp.mean(x, axis=(1, 2, 3)) for x in (z_BHWC, square_BHWC)]
    return jnp.stack(each, axis=-1)

  with meshes.use(run.mesh), loop.out_of_memory_advice():
    found_B2 = sampling.by_batches(
      moments,
      {"image": images},
      meshes.padded(min(count, config.data.batch_size), run.mesh),
      placing.put_whole(run.mesh),
      placing.fetch,
    )
  mean, square = found_B2.mean(axis=0).tolist()
  return Seen(count, mean, math.sqrt(square - mean**2))
