"""The autoencoder of latent diffusion, SDXL, SD3 and FLUX: AutoencoderKL.

It maps an image to a normal distribution over latents, f times coarser, and
latents to an image (arXiv:2112.10752, section 3.1). A diffusion model learns

  (z - shift_factor) scaling_factor,

whose variance is near 1.
"""

# Shape suffixes: B batch, H height, W width, C channels. Latents are coarser.

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from flowjax import schema
from flowjax.models import blocks, convolutions

# The logarithm of a variance is kept within, as published.
LOG_VARIANCE = (-30.0, 20.0)

# What was published: arXiv:2112.10752, 2307.01952, 2403.03206, and FLUX.1.
_SIXTEEN: dict[str, Any] = {
  "image_size": (1024, 1024),
  "latent_channels": 16,
  "use_quant_conv": False,
  "use_post_quant_conv": False,
}
SIZES: dict[str, dict[str, Any]] = {
  "sd": {"image_size": (512, 512), "scaling_factor": 0.18215},
  "sdxl": {"image_size": (1024, 1024), "scaling_factor": 0.13025},
  "sd3": {**_SIXTEEN, "scaling_factor": 1.5305, "shift_factor": 0.0609},
  "flux": {**_SIXTEEN, "scaling_factor": 0.3611, "shift_factor": 0.1159},
  # Small enough for a test.
  "tiny": {
    "image_size": (32, 32),
    "widths": (16, 32),
    "depth": 1,
    "groups": 8,
  },
}


@dataclasses.dataclass(frozen=True)
class AutoencoderConfig(convolutions.ConvolutionalConfig):
  """Encoder and decoder, and a 1x1 convolution on either side of the latents.

  `shift_factor` is None where nothing is shifted, as before SD3.
  """

  name: str = "autoencoder"
  shift_factor: float | None = None
  use_quant_conv: bool = True
  use_post_quant_conv: bool = True

  def __post_init__(self):
    super().__post_init__()
    if self.name != "autoencoder":
      raise ValueError(
        f"name={self.name!r}. {schema.closest(self.name, ['autoencoder'])}"
      )


def sized(size: str) -> AutoencoderConfig:
  """Returns the published config of a name in `SIZES`."""
  if size not in SIZES:
    raise ValueError(f"size {size!r}. {schema.closest(size, SIZES)}")
  return AutoencoderConfig(**SIZES[size])


def init(config: AutoencoderConfig, rng: jax.Array) -> dict[str, Any]:
  """Draws the parameters, float32."""
  keys = jax.random.split(rng, 4)
  features = 2 * config.latent_channels
  x_BHWC = jnp.zeros((1, config.factor, config.factor, config.channels))
  z_BHWC = jnp.zeros((1, 1, 1, config.latent_channels))
  moments_BHWC = jnp.zeros((1, 1, 1, features))
  parts = {
    "encoder": (_encoder(config), x_BHWC),
    "decoder": (convolutions.Decoder(config), z_BHWC),
  }
  if config.use_quant_conv:
    parts["quant_conv"] = (point(config, features), moments_BHWC)
  if config.use_post_quant_conv:
    parts["post_quant_conv"] = (point(config, config.latent_channels), z_BHWC)
  return {
    name: module.init(key, example)["params"]
    for key, (name, (module, example)) in zip(keys, parts.items(), strict=False)
  }


def encode(
  config: AutoencoderConfig, params: dict[str, Any], x_BHWC: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Returns mean and log-variance of the latents of images in [-1, 1].

  They are not scaled; `scaled` does that.
  """
  convolutions.check_image(config, x_BHWC)
  h_BHWC = convolutions.applied(_encoder(config), params["encoder"], x_BHWC)
  if config.use_quant_conv:
    map_moments = point(config, 2 * config.latent_channels)
    h_BHWC = convolutions.applied(map_moments, params["quant_conv"], h_BHWC)
  mean_BHWC, log_variance_BHWC = jnp.split(
    h_BHWC.astype(jnp.float32), 2, axis=-1
  )
  return mean_BHWC, jnp.clip(log_variance_BHWC, *LOG_VARIANCE)


def decode(
  config: AutoencoderConfig, params: dict[str, Any], z_BHWC: jax.Array
) -> jax.Array:
  """Returns the images of latents that are not scaled, in float32."""
  z_BHWC = after_latents(config, params, z_BHWC)
  decoder = convolutions.Decoder(config)
  return convolutions.applied(decoder, params["decoder"], z_BHWC)


def after_latents(
  config: AutoencoderConfig, params: dict[str, Any], z_BHWC: jax.Array
) -> jax.Array:
  """Returns what the decoder is given of latents."""
  convolutions.check_latents(config.latent_channels, z_BHWC)
  if not config.use_post_quant_conv:
    return z_BHWC
  map_latents = point(config, config.latent_channels)
  return convolutions.applied(map_latents, params["post_quant_conv"], z_BHWC)


def reconstruct(
  config: AutoencoderConfig,
  params: dict[str, Any],
  x_BHWC: jax.Array,
  rng: jax.Array | None,
) -> convolutions.Reconstruction:
  """Encodes, draws latents (without an rng, their mean) and begins to decode.

  The penalty "divergence" is that of the latents, per value of an image.
  """
  mean_BHWC, log_variance_BHWC = encode(config, params, x_BHWC)
  z_BHWC = mean_BHWC
  if rng is not None:
    z_BHWC = sample(mean_BHWC, log_variance_BHWC, rng)
  h_BHWC = after_latents(config, params, z_BHWC)
  values = math.prod(x_BHWC.shape[1:])
  divergence_B = divergence(mean_BHWC, log_variance_BHWC) / values
  return convolutions.Reconstruction(
    convolutions.features(config, params, h_BHWC),
    {"divergence": divergence_B},
    {},
  )


def sample(
  mean_BHWC: jax.Array, log_variance_BHWC: jax.Array, rng: jax.Array
) -> jax.Array:
  """Draws latents: mean + exp(log_variance / 2) eps."""
  eps_BHWC = jax.random.normal(rng, mean_BHWC.shape, mean_BHWC.dtype)
  return mean_BHWC + jnp.exp(0.5 * log_variance_BHWC) * eps_BHWC


def divergence(mean_BHWC: jax.Array, log_variance_BHWC: jax.Array) -> jax.Array:
  """Returns KL(N(mean, variance) | N(0, 1)) of each example, [B].

  The sum over all latents of (mean^2 + variance - 1 - log variance) / 2
  (arXiv:1312.6114, appendix B).
  """
  terms_BHWC = (
    jnp.square(mean_BHWC) + jnp.exp(log_variance_BHWC) - 1.0 - log_variance_BHWC
  )
  return 0.5 * jnp.sum(terms_BHWC, axis=(1, 2, 3))


def scaled(config: Any, z_BHWC: jax.Array) -> jax.Array:
  """Returns latents as a diffusion model learns them."""
  return (z_BHWC - _shift(config)) * config.scaling_factor


def unscaled(config: Any, z_BHWC: jax.Array) -> jax.Array:
  """Returns latents as the decoder takes them; the inverse of `scaled`."""
  return z_BHWC / config.scaling_factor + _shift(config)


def flops(config: AutoencoderConfig) -> int:
  """Counts the arithmetic of encoding and decoding, per example."""
  features, height_width = 2 * config.latent_channels, config.latent_size
  area = height_width[0] * height_width[1]
  total = convolutions.flops(config, features)
  if config.use_quant_conv:
    total += 2 * area * features**2
  if config.use_post_quant_conv:
    total += 2 * area * config.latent_channels**2
  return total


def point(config: Any, features: int) -> convolutions.Conv:
  """Returns a convolution of one pixel: a linear map of channels."""
  return convolutions.Conv(
    features, size=1, padding=(0, 0), dtype=blocks.DTYPES[config.dtype]
  )


def _encoder(config: AutoencoderConfig) -> convolutions.Encoder:
  return convolutions.Encoder(config, 2 * config.latent_channels)


def _shift(config: Any) -> float:
  return getattr(config, "shift_factor", None) or 0.0
