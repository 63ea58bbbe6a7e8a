"""The vector-quantised autoencoder of latent diffusion (VQGAN, VQ-VAE).

Each latent is replaced by the nearest of K vectors, a codebook
(arXiv:1711.00937, eq. 1 and 2; arXiv:2012.09841). A diffusion model learns the
latents before that, times `scaling_factor`: the codebook belongs to decoding
(arXiv:2112.10752, section 3.1).
"""

# Shape suffixes: B batch, H height, W width, C channels; N latents in a row,
# K vectors of the codebook, D their width.

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from flowjax import schema
from flowjax.models import autoencoder, convolutions

SMOOTHING = 1e-5


@dataclasses.dataclass(frozen=True)
class VQConfig(convolutions.ConvolutionalConfig):
  """Encoder, a codebook of `codes` vectors of `code_width`, and decoder.

  `code_width` is `latent_channels` unless given.
  """

  name: str = "vq"
  latent_channels: int = 3
  widths: tuple[int, ...] = (128, 256, 512)
  codes: int = 8192
  code_width: int | None = None
  scaling_factor: float = 1.0
  force_upcast: bool = False

  def __post_init__(self):
    super().__post_init__()
    if self.name != "vq":
      raise ValueError(
        f"name={self.name!r}. {schema.closest(self.name, ['vq'])}"
      )
    if self.codes < 2:
      raise ValueError(
        f"codes={self.codes}: a codebook has at least 2 vectors."
      )
    if self.code_width is not None and self.code_width < 1:
      raise ValueError(f"code_width={self.code_width} must be positive.")

  @property
  def vector_width(self) -> int:
    """The width of a vector of the codebook."""
    return self.code_width or self.latent_channels


def init(config: VQConfig, rng: jax.Array) -> dict[str, Any]:
  """Draws the parameters, float32; the codebook from U(-1 / K, 1 / K)."""
  keys = jax.random.split(rng, 5)
  x_BHWC = jnp.zeros((1, config.factor, config.factor, config.channels))
  h_BHWC = jnp.zeros((1, 1, 1, config.latent_channels))
  z_BHWC = jnp.zeros((1, 1, 1, config.vector_width))
  before, after = _points(config)
  parts = {
    "encoder": (_encoder(config), x_BHWC),
    "decoder": (convolutions.Decoder(config), h_BHWC),
    "quant_conv": (before, h_BHWC),
    "post_quant_conv": (after, z_BHWC),
  }
  params = {
    name: module.init(key, example)["params"]
    for key, (name, (module, example)) in zip(keys, parts.items(), strict=False)
  }
  shape, limit = (config.codes, config.vector_width), 1.0 / config.codes
  code_KD = jax.random.uniform(keys[-1], shape, jnp.float32, -limit, limit)
  return {**params, "codebook": {"embedding": code_KD}}


def latents(
  config: VQConfig, params: dict[str, Any], x_BHWC: jax.Array
) -> jax.Array:
  """Returns the latents of images in [-1, 1], not quantised and not scaled."""
  convolutions.check_image(config, x_BHWC)
  h_BHWC = convolutions.applied(_encoder(config), params["encoder"], x_BHWC)
  before, _ = _points(config)
  z_BHWC = convolutions.applied(before, params["quant_conv"], h_BHWC)
  return z_BHWC.astype(jnp.float32)


def quantise(
  params: dict[str, Any], z_BHWC: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Returns the nearest vector of each latent, and its index [B, H, W].

  arg min |z - e|^2 over the codebook, in float32.
  """
  code_KD = params["codebook"]["embedding"].astype(jnp.float32)
  z_ND = z_BHWC.reshape(-1, code_KD.shape[-1]).astype(jnp.float32)
  inner_NK = jnp.einsum("nd,kd->nk", z_ND, code_KD, precision="highest")
  square_K = jnp.sum(jnp.square(code_KD), axis=-1)
  index_N = jnp.argmin(square_K[None] - 2.0 * inner_NK, axis=-1)
  chosen_BHWC = jnp.take(code_KD, index_N, axis=0).reshape(z_BHWC.shape)
  return chosen_BHWC, index_N.reshape(z_BHWC.shape[:-1])


def straight_through(z_BHWC: jax.Array, chosen_BHWC: jax.Array) -> jax.Array:
  """Returns what was chosen, with the gradient of what it was chosen for.

  The gradient passes a quantisation as if it were the identity
  (arXiv:1711.00937, section 3.2).
  """
  return z_BHWC + jax.lax.stop_gradient(chosen_BHWC - z_BHWC)


def encode(
  config: VQConfig, params: dict[str, Any], x_BHWC: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Returns the quantised latents of images, and their indices [B, H, W]."""
  return quantise(params, latents(config, params, x_BHWC))


def decode(
  config: VQConfig, params: dict[str, Any], z_BHWC: jax.Array
) -> jax.Array:
  """Returns the images of latents that are not scaled; quantises them first."""
  convolutions.check_latents(config.vector_width, z_BHWC)
  chosen_BHWC, _ = quantise(params, z_BHWC)
  h_BHWC = after_latents(config, params, chosen_BHWC)
  decoder = convolutions.Decoder(config)
  return convolutions.applied(decoder, params["decoder"], h_BHWC)


def after_latents(
  config: VQConfig, params: dict[str, Any], z_BHWC: jax.Array
) -> jax.Array:
  """Returns what the decoder is given of quantised latents."""
  _, after = _points(config)
  return convolutions.applied(after, params["post_quant_conv"], z_BHWC)


def reconstruct(
  config: VQConfig,
  params: dict[str, Any],
  x_BHWC: jax.Array,
  rng: jax.Array | None,
) -> convolutions.Reconstruction:
  """Encodes, quantises and begins to decode; nothing in it is random.

  The penalties "codebook", |sg(z) - e|^2, and "commitment", |z - sg(e)|^2, draw
  vector and latent to each other (arXiv:1711.00937, eq. 3). The statistics
  "count" [K] and "sum" [K, D] are how often each vector was chosen and the sum
  of the latents that chose it, both times K / N, so that the mean of "count" is
  1; "index" [B, H, W] says which.
  """
  del rng
  z_BHWC = latents(config, params, x_BHWC)
  chosen_BHWC, index_BHW = quantise(params, z_BHWC)
  passed_BHWC = straight_through(z_BHWC, chosen_BHWC)
  h_BHWC = after_latents(config, params, passed_BHWC)

  def apart(a_BHWC, b_BHWC):
    return jnp.mean(jnp.square(a_BHWC - b_BHWC), axis=(1, 2, 3))

  still_z, still_e = jax.lax.stop_gradient((z_BHWC, chosen_BHWC))
  index_N, z_ND = (
    index_BHW.reshape(-1),
    still_z.reshape(-1, config.vector_width),
  )
  weight = config.codes / len(index_N)
  sums_KD = jnp.zeros((config.codes, config.vector_width)).at[index_N].add(z_ND)
  counts_K = jnp.zeros(config.codes).at[index_N].add(1.0)
  return convolutions.Reconstruction(
    convolutions.features(config, params, h_BHWC),
    {
      "codebook": apart(still_z, chosen_BHWC),
      "commitment": apart(z_BHWC, still_e),
    },
    {
      "count": weight * counts_K,
      "sum": weight * sums_KD,
      "index": index_BHW,
    },
  )


def running(code_KD: jax.Array) -> dict[str, jax.Array]:
  """Returns the averages of which a codebook is to be the quotient.

  Each vector counts as chosen once.
  """
  return {"count": jnp.ones(len(code_KD)), "sum": code_KD}


def quotient(averages: dict[str, jax.Array]) -> jax.Array:
  """Returns the codebook of running averages: sum / count.

  Counts are smoothed as Laplace did, so that a vector that is never chosen goes
  to zero (arXiv:1711.00937, appendix A.1).
  """
  count_K, codes = averages["count"], len(averages["count"])
  total = jnp.sum(count_K)
  smooth_K = (count_K + SMOOTHING) / (total + codes * SMOOTHING) * total
  return averages["sum"] / smooth_K[:, None]


def perplexity(
  codes: int, index_BHW: jax.Array, weight_B: jax.Array
) -> jax.Array:
  """Returns exp of the entropy of what was chosen: how many are in use."""
  weight_BHW = jnp.broadcast_to(weight_B[:, None, None], index_BHW.shape)
  count_K = jnp.zeros(codes).at[index_BHW].add(weight_BHW)
  share_K = count_K / jnp.maximum(jnp.sum(count_K), 1.0)
  return jnp.exp(-jnp.sum(jax.scipy.special.xlogy(share_K, share_K)))


def flops(config: VQConfig) -> int:
  """Counts the arithmetic of encoding and decoding, per example."""
  area = config.latent_size[0] * config.latent_size[1]
  maps = 2 * config.latent_channels + config.codes
  total = convolutions.flops(config, config.latent_channels)
  return total + 2 * area * config.vector_width * maps


def _encoder(config: VQConfig) -> convolutions.Encoder:
  return convolutions.Encoder(config, config.latent_channels)


def _points(config: VQConfig) -> tuple[convolutions.Conv, convolutions.Conv]:
  """Returns the maps to vectors of the codebook, and from them."""
  into = autoencoder.point(config, config.vector_width)
  return into, autoencoder.point(config, config.latent_channels)
