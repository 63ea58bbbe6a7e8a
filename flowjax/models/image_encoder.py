"""An image that a network is told: an embedding, and a text that is made of it.

The embedding comes with the data, made by a frozen encoder (unCLIP,
arXiv:2204.06125, section 2.1), or is that of a small transformer which is
trained with the network (diffusion autoencoders, arXiv:2111.15640). The fewer
numbers it has, the less of an image it can hold: the network draws the rest
anew, and so varies the image.
"""

# Shape suffixes: B batch, H height, W width, C channels, T patches, P numbers
# of an embedding, K tokens of text that are made of it, E width of the text, Q
# width of the pooled text.

import dataclasses
import math
import typing
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from flowjax.models import blocks, layers, patches, positions, text

GROUP = "image_encoder"


@dataclasses.dataclass(frozen=True)
class EmbeddingConfig:
  """An embedding of `size` numbers, read as `tokens` of text; 0: there is none.

  With a `depth` above 0 it is learned, by so many blocks of `width` on patches
  of `patch_size`. With 0 it comes with the data.
  """

  size: int = 0
  tokens: int = 4
  depth: int = 2
  patch_size: int = 2
  width: int = 64
  heads: int = 4
  mlp_ratio: float = 4.0
  attention: str = "auto"
  dtype: str = "float32"

  def __post_init__(self):
    text.check_sizes(self, "tokens", "patch_size", least_depth=0)
    if self.size < 0:
      raise ValueError(f"size = {self.size} is below 0; 0: no embedding.")
    if self.width % 4:
      raise ValueError(
        f"width = {self.width} must be divisible by 4, as it is split into "
        "waves of rows and columns."
      )

  @property
  def mlp_width(self) -> int:
    return int(self.mlp_ratio * self.width)


class Vision(nn.Module):
  """From an image to its embedding: what patches say of it together."""

  config: EmbeddingConfig

  @nn.compact
  def __call__(self, x_BHWC: jax.Array) -> jax.Array:
    config = self.config
    rows, columns = (side // config.patch_size for side in x_BHWC.shape[1:3])
    x_BTE = layers.Dense((config.width,), name="patch_embed")(
      patches.patchify(x_BHWC, config.patch_size)
    )
    table_TE = positions.sincos2d(rows, columns, config.width)
    mask_BT = jnp.ones(x_BTE.shape[:2], bool)
    _, said_BE = text.understood(
      config, positions.added(x_BTE, table_TE), mask_BT
    )
    return layers.Dense((config.size,), name="embedding")(said_BE)


class ImageEncoder(nn.Module):
  """From an image, or its embedding, to the text and the pooled text."""

  config: EmbeddingConfig
  text_width: int
  pooled_width: int

  @nn.compact
  def __call__(self, told: jax.Array, mask_B: jax.Array):
    config = self.config
    embedding_BP = told.astype(jnp.float32)
    if config.depth:
      embedding_BP = Vision(config, name="vision")(embedding_BP)
    # Of one length, as embeddings are compared; nothing has none.
    embedding_BP = jnp.where(mask_B[:, None], unit(embedding_BP), 0.0)
    text_BKE = layers.Dense((config.tokens, self.text_width), name="text")(
      embedding_BP
    )
    pooled_BQ = layers.Dense((self.pooled_width,), name="pooled")(embedding_BP)
    return text_BKE, math.sqrt(text.POOLED / self.pooled_width) * pooled_BQ


def unit(embedding_BP: jax.Array) -> jax.Array:
  """Returns embeddings whose mean square is 1."""
  square_B1 = jnp.mean(jnp.square(embedding_BP), axis=-1, keepdims=True)
  return embedding_BP * jax.lax.rsqrt(square_B1 + 1e-12)


def told(config: EmbeddingConfig, model: Any) -> tuple[str, tuple[int, ...]]:
  """Returns what the encoder reads, its key in a condition, and its shape."""
  if config.depth:
    return "original", (*model.image_size, model.channels)
  return "embedding", (config.size,)


def init(config: EmbeddingConfig, model: Any, rng: jax.Array) -> dict[str, Any]:
  """Draws the parameters, float32, of an encoder for a model's config."""
  _, shape = told(config, model)
  module = _module(blocks.anywhere(config), model)
  return module.init(rng, jnp.zeros((1, *shape)), jnp.ones(1, bool))["params"]


def apply(
  config: EmbeddingConfig,
  model: Any,
  params: dict[str, Any],
  told_B: jax.Array,
  mask_B: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """Returns text_BKE and pooled_BQ of images, or of embeddings.

  Where the mask is false, nothing is told.
  """
  key, shape = told(config, model)
  # An image may have any size.
  found, wanted = (
    each[-1:] if config.depth else each for each in (told_B.shape[1:], shape)
  )
  dims = told_B.ndim == 1 + len(shape)
  if not dims or found != wanted or mask_B.shape != told_B.shape[:1]:
    raise ValueError(
      f"The encoder takes {key!r} [B, {', '.join(map(str, shape))}] and its "
      f"mask [B], not {told_B.shape} and {mask_B.shape}."
    )
  module = _module(config, model)
  says = module.apply({"params": params}, told_B, mask_B)
  return typing.cast(tuple[jax.Array, jax.Array], says)


def flops(config: EmbeddingConfig, model: Any) -> int:
  """Counts the arithmetic of an image; a multiply-add is two."""
  wide = config.tokens * model.text_width + model.pooled_width
  counted = 2 * config.size * wide
  if not config.depth:
    return counted
  height, width = model.image_size
  tokens = height * width // config.patch_size**2
  patch = config.patch_size**2 * model.channels
  ends = 2 * config.width * (tokens * patch + config.size)
  return counted + ends + text.flops_of_blocks(config, tokens)


def _module(config: EmbeddingConfig, model: Any) -> ImageEncoder:
  return ImageEncoder(config, model.text_width, model.pooled_width)
