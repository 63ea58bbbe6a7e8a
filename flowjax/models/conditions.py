"""What a network that reads text is told: the text, and one vector of it.

Where a dataset has labels and no text, each label has a text of its own, which
is learned; so such a network trains on labelled images as it is. Any network
may be told an image beside the one that flows: its context.
"""

# Shape suffixes: B batch, L text tokens, E width of the text, P width of the
# pooled text, D width, K labels and the one that stands for none; H height, W
# width, C channels of an image and of its context; S numbers of a size.

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from flowjax.models import layers
from flowjax.ops import products

Cond = dict[str, Any]

# The keys in which a condition differs from its unconditional one.
_TEXT = ("text", "pooled", "text_mask")
CONTEXT = "context"
# Of an image: height and width of its original, how far from the top and from
# the left it was cut, and height and width that it has, all in pixels.
SIZES = 6


class LabelEmbed(nn.Module):
  """Holds a text and a pooled text for each label, the last for none."""

  labels: int
  tokens: int
  text_width: int
  pooled_width: int

  @nn.compact
  def __call__(self, label_B: jax.Array) -> tuple[jax.Array, jax.Array]:
    rows = self.labels + 1
    text_KLE = self.param(
      "text", layers.normal, (rows, self.tokens, self.text_width)
    )
    pooled_KP = self.param("pooled", layers.normal, (rows, self.pooled_width))
    name = "/".join(self.path)
    return (
      products.rows(text_KLE, label_B, called=f"{name}/text"),
      products.rows(pooled_KP, label_B, called=f"{name}/pooled"),
    )


class PooledEmbed(nn.Module):
  """Embeds the pooled text by an MLP, in float32."""

  width: int

  @nn.compact
  def __call__(self, pooled_BP: jax.Array) -> jax.Array:
    hidden_BD = layers.Dense(
      (self.width,), init_kernel=layers.normal, name="in"
    )(pooled_BP)
    return layers.Dense((self.width,), init_kernel=layers.normal, name="out")(
      nn.silu(hidden_BD)
    )


def size_waves(size_crop_BS: jax.Array) -> jax.Array:
  """Returns the sinusoids of sizes and crops, one after the other [B, S F].

  SDXL tells its network so of images that were small, and of what was cut off
  (arXiv:2307.01952, section 2.2); drawn with no crop, objects are centred.
  """
  waves = layers.sinusoid(size_crop_BS.reshape(-1), layers.TIME_FREQUENCIES)
  return waves.reshape(size_crop_BS.shape[0], -1)


def told_width(config: Any) -> int:
  """Returns how wide that is which is told beside the text, as one vector."""
  return config.pooled_width + size_width(config)


def size_width(config: Any) -> int:
  """Returns how many sinusoids of sizes a network is told."""
  return SIZES * layers.TIME_FREQUENCIES if config.size_conditioning else 0


def read(
  config: Any, cond: Cond
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
  """Returns text_BLE, pooled_BP and the mask [B, L] of real tokens, if any.

  With `size_conditioning` the waves of sizes follow upon the pooled text.
  Called inside a network, which gets the parameters "label_embed" where its
  config has classes.
  """
  text_BLE, pooled_BP, mask_BL = _read(config, cond)
  if config.size_conditioning:
    waves = size_waves(cond["size_crop"])
    pooled_BP = jnp.concatenate([pooled_BP.astype(waves.dtype), waves], axis=-1)
  return text_BLE, pooled_BP, mask_BL


def _read(config, cond):
  if not config.num_classes:
    return cond["text"], cond["pooled"], cond.get("text_mask")
  text_BLE, pooled_BP = LabelEmbed(
    config.num_classes,
    config.label_tokens,
    config.text_width,
    config.pooled_width,
    name="label_embed",
  )(cond["label"])
  return text_BLE, pooled_BP, None


def reads_text(config: Any) -> bool:
  """Says whether a network of no classes reads a text, or is told nothing."""
  return hasattr(config, "text_width")


def text_length(config: Any) -> int:
  """Returns how many tokens of text the network is counted with."""
  return config.label_tokens if config.num_classes else config.text_tokens


def example(config: Any, batch: int = 1) -> Cond:
  """Returns a condition of zeros, of the shapes that the network takes."""
  told: Cond = {}
  if config.num_classes:
    told = {"label": jnp.zeros(batch, jnp.int32)}
  elif reads_text(config):
    told = {
      "text": jnp.zeros((batch, config.text_tokens, config.text_width)),
      "pooled": jnp.zeros((batch, config.pooled_width)),
    }
  if config.context_channels:
    size = (batch, *config.image_size, config.context_channels)
    told[CONTEXT] = jnp.zeros(size)
  if config.size_conditioning:
    told["size_crop"] = jnp.zeros((batch, SIZES))
  return told


def with_context(config: Any, x_BHWC: jax.Array, cond: Cond) -> jax.Array:
  """Returns the channels that a network reads: of the image, then its context.

  The way of latent diffusion for inpainting and super-resolution
  (arXiv:2112.10752, section 3.3). Only what else the network is told is ever
  dropped, and guidance is away from the same context without that.
  """
  _check_context(config, x_BHWC, cond)
  if not config.context_channels:
    return x_BHWC
  context_BHWC = cond[CONTEXT].astype(x_BHWC.dtype)
  return jnp.concatenate([x_BHWC, context_BHWC], axis=-1)


def unconditional(config: Any, cond: Cond) -> Cond:
  """Returns `cond` with what stands for no condition; other keys stay.

  That is the last label; or the text of cond["negative"], where there is one;
  or else a text of zeros, all seen, so that nothing of the text is left, not
  even its length. A network that is told nothing gets `cond` as it is.
  """
  if config.num_classes:
    return {**cond, "label": jnp.full_like(cond["label"], config.num_classes)}
  if not reads_text(config):
    return cond
  if "negative" in cond:
    return {**cond, **cond["negative"]}
  empty = {key: jnp.zeros_like(cond[key]) for key in ("text", "pooled")}
  if "text_mask" in cond:
    empty["text_mask"] = jnp.ones_like(cond["text_mask"])
  return {**cond, **empty}


def dropped(config: Any, cond: Cond, rng: jax.Array) -> Cond:
  """Returns `cond`, of which some examples lost their condition.

  Each by itself, with probability `condition_dropout`.
  """
  keys = ("label",) if config.num_classes else _TEXT
  without = unconditional(config, cond)
  return exchanged(cond, without, keys, config.condition_dropout, rng)


def exchanged(
  cond: Cond, other: Cond, keys: Sequence[str], rate: float, rng: jax.Array
) -> Cond:
  """Returns `cond`, of which some examples have the `keys` of another.

  Each by itself, with probability `rate`; keys that `cond` lacks are left out.
  """
  drop_B = jax.random.bernoulli(rng, rate, cond[keys[0]].shape[:1])

  def choose(other, value):
    drop = drop_B.reshape(-1, *(1,) * (value.ndim - 1))
    return jnp.where(drop, other, value)

  return {**cond, **{k: choose(other[k], cond[k]) for k in keys if k in cond}}


def check_config(config: Any) -> None:
  """Raises ValueError for sizes of a condition that cannot be."""
  for field in ("text_width", "pooled_width", "text_tokens", "label_tokens"):
    if getattr(config, field) <= 0:
      raise ValueError(f"{field}={getattr(config, field)} must be positive.")
  if config.num_classes < 0:
    raise ValueError(
      f"num_classes={config.num_classes} must be positive, or 0 for a network "
      "that reads text."
    )
  if not 0.0 <= config.condition_dropout < 1.0:
    raise ValueError(
      f"condition_dropout={config.condition_dropout} must be at least 0 and "
      "below 1: with 1 no condition is ever seen. 0.1 is usual."
    )


def check_sizes(config: Any, cond: Cond, batch: int) -> None:
  """Raises ValueError unless a network is told sizes that is to be."""
  if not config.size_conditioning:
    return
  if "size_crop" not in cond:
    raise ValueError(
      "The network is told sizes (size_conditioning=True), cond={'size_crop': "
      "[B, 6]}: (height, width) of the original, (top, left) of the crop, "
      f"(height, width) of the image; got the keys {sorted(cond)}."
    )
  _check_shape("size_crop", cond["size_crop"], (batch, SIZES))


def check(config: Any, cond: Cond, batch: int) -> None:
  """Raises ValueError unless `cond` has the keys and shapes of the config."""
  check_sizes(config, cond, batch)
  keys = ("label",) if config.num_classes else ("text", "pooled")
  if any(key not in cond for key in keys):
    takes = (
      f"{{'label': [B] integers}} (num_classes={config.num_classes})"
      if config.num_classes
      else "{'text': [B, L, E], 'pooled': [B, P]} (num_classes=0; with more, "
      "the network learns a text for each label)"
    )
    raise ValueError(
      f"The network takes cond={takes}, got the keys {sorted(cond)}."
    )
  if config.num_classes:
    return _check_shape("label", cond["label"], (batch,))
  _check_text("", config, cond, batch, cond["text"].shape[1:2])
  if "negative" in cond:
    negative = cond["negative"]
    wanted = sorted(key for key in _TEXT if key in cond)
    if sorted(negative) != wanted:
      raise ValueError(
        f"cond['negative'] has the keys {sorted(negative)}; it stands in for "
        f"those of cond, {wanted}, and must have the same."
      )
    _check_text("negative ", config, negative, batch, cond["text"].shape[1:2])


def _check_context(config: Any, x_BHWC: jax.Array, cond: Cond) -> None:
  channels = config.context_channels
  if (CONTEXT in cond) != bool(channels):
    raise ValueError(
      f"The network has context_channels={channels}, and cond the keys "
      f"{sorted(cond)}: 'context' [B, H, W, {channels or 'K'}] goes with a "
      "network that was made for it, as config.task makes both."
    )
  if channels:
    _check_shape(CONTEXT, cond[CONTEXT], (*x_BHWC.shape[:3], channels))


def _check_text(prefix, config, cond, batch, length) -> None:
  _check_shape(
    f"{prefix}text", cond["text"], (batch, *length, config.text_width)
  )
  _check_shape(f"{prefix}pooled", cond["pooled"], (batch, config.pooled_width))
  if "text_mask" in cond:
    _check_shape(f"{prefix}text_mask", cond["text_mask"], (batch, *length))


def _check_shape(name, value, shape) -> None:
  if value.shape != shape:
    raise ValueError(
      f"{name} has shape {value.shape}; for {shape[0]} images and this config "
      f"it is {shape}."
    )
