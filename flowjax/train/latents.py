"""Training on what was encoded: latents are sampled, and texts dropped.

Both happen on the devices, inside the loss, as pure functions of its rng: what
an example receives depends neither on the mesh nor on who reads the records.
"""

# Shape suffixes: B batch, L text tokens, E width of the text, P width of the
# pooled text.

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flowjax import errors
from flowjax.data import arrayrecord, embeddings
from flowjax.data import config as data_config
from flowjax.flow import losses
from flowjax.models import autoencoder

Batch = Mapping[str, Any]
Arrays = Mapping[str, Any]

# Keeps these draws apart from all that the loss makes of its own rng.
_LATENTS, _TEXTS = 0x1A7E, 0x7E87


@dataclasses.dataclass(frozen=True)
class EncodedConfig:
  """How a network is trained on `data.source = "arrayrecord:..."`.

  With `sample_latents` a latent is drawn anew each time that it is seen, from
  the normal distribution that the autoencoder gives, else it is its mean.
  `text_dropout` is with which probability the words of each text encoder are
  replaced by those that it has for the empty caption, each by itself, in the
  order of the index; one number is that of all. SD3 drops each of its three
  with 0.463 (arXiv:2403.03206, section 5.2.1), so that one text in ten is
  empty; `model.condition_dropout`, which drops all at once, is then 0.
  """

  sample_latents: bool = True
  text_dropout: tuple[float, ...] = ()

  def __post_init__(self):
    for rate in self.text_dropout:
      if not 0.0 <= rate < 1.0:
        raise ValueError(
          f"text_dropout = {self.text_dropout}: a probability is at least 0, "
          "and below 1, with which an encoder would never be heard."
        )

  def rates(self, texts: embeddings.Texts | None) -> tuple[float, ...]:
    """Returns the probability of each part of a text."""
    if not self.text_dropout:
      return ()
    names = [part.name for part in texts.parts] if texts else []
    if len(self.text_dropout) == 1 and names:
      return self.text_dropout * len(names)
    if len(self.text_dropout) != len(names):
      raise errors.UserError(
        f"config.encoded.text_dropout = {self.text_dropout} is of "
        f"{len(self.text_dropout)} text encoders, and the records have those "
        f"of {len(names)}: {', '.join(names) or 'they hold no embedded text'}."
      )
    return self.text_dropout


def training(
  config: EncodedConfig, data: data_config.DataConfig, loss: losses.Loss
) -> losses.Loss:
  """Returns a loss of encoded batches, from one of images and conditions.

  Of any other source the loss is as it was.
  """
  return _prepared(config, data, loss, training=True)


def evaluation(
  config: EncodedConfig, data: data_config.DataConfig, loss: losses.Loss
) -> losses.Loss:
  """Returns the same for an evaluation, in which no text is dropped."""
  return _prepared(config, data, loss, training=False)


def _prepared(config, data, loss, *, training: bool) -> losses.Loss:
  encoded = arrayrecord.of(data)
  if encoded is None or not (encoded.latents or encoded.texts):
    if config.text_dropout:
      config.rates(None)
    return loss
  empty, texts = encoded.empty, encoded.texts
  rates = config.rates(texts) if training else ()
  if rates and empty is None:
    raise errors.UserError(
      f"config.encoded.text_dropout = {rates}: {encoded.folder} has no empty "
      "caption, as its texts were embedded before: use "
      "config.model.condition_dropout."
    )

  def prepared(params, batch, rng):
    batch = dict(batch)
    if encoded.latents:
      key = jax.random.fold_in(rng, _LATENTS)
      batch = sampled(batch, key if config.sample_latents else None)
    batch = {key: _in_float32(value) for key, value in batch.items()}
    if empty is not None:
      batch["negative"] = negative(empty, batch)
    if any(rates):
      batch = dropped(texts, rates, batch, jax.random.fold_in(rng, _TEXTS))
    return loss(params, batch, rng)

  return prepared


def sampled(batch: Batch, rng: jax.Array | None) -> dict[str, Any]:
  """Returns a batch with "image" = mean + exp(log_variance / 2) eps.

  The posterior of an autoencoder (arXiv:1312.6114, eq. 10). Without rng it is
  the mean.
  """
  rest = dict(batch)
  mean = rest.pop("mean").astype(jnp.float32)
  log_variance = rest.pop("log_variance").astype(jnp.float32)
  if rng is not None:
    mean = autoencoder.sample(mean, log_variance, rng)
  return {**rest, "image": mean}


def dropped(
  texts: embeddings.Texts,
  rates: tuple[float, ...],
  batch: Batch,
  rng: jax.Array,
) -> dict[str, Any]:
  """Returns a batch some of whose texts lost the words of some encoders.

  They become those of batch["negative"], the empty caption. Tokens that several
  encoders share keep their mask until all of these are dropped.
  """
  empty = batch["negative"]
  text_BLE, pooled_BP = batch["text"], batch["pooled"]
  kept_BL: dict[embeddings.Range, Any] = {}
  for i, (part, rate) in enumerate(zip(texts.parts, rates, strict=True)):
    key = jax.random.fold_in(rng, i)
    drop_B = jax.random.bernoulli(key, rate, text_BLE.shape[:1])
    if part.tokens and part.columns:
      inside_LE = _inside(texts.length, part.tokens)[:, None] & _inside(
        texts.width, part.columns
      )
      text_BLE = jnp.where(
        drop_B[:, None, None] & inside_LE[None], empty["text"], text_BLE
      )
      kept_B = ~drop_B | kept_BL.get(part.tokens, False)
      kept_BL[part.tokens] = kept_B
    if part.pooled:
      inside_P = _inside(texts.pooled_width, part.pooled)
      pooled_BP = jnp.where(
        drop_B[:, None] & inside_P[None], empty["pooled"], pooled_BP
      )
  found = {**batch, "text": text_BLE, "pooled": pooled_BP}
  if texts.masked:
    mask_BL = batch["text_mask"]
    for tokens, kept_B in kept_BL.items():
      gone_BL = ~kept_B[:, None] & _inside(texts.length, tokens)[None]
      mask_BL = jnp.where(gone_BL, empty["text_mask"], mask_BL)
    found["text_mask"] = mask_BL
  return found


def negative(empty: Arrays, cond: Arrays) -> dict[str, Any]:
  """Returns the empty caption for each text of a condition.

  It is what a network is told in place of a text, in training and in guidance.
  """
  count, length = cond["text"].shape[:2]
  if length != len(empty["text"]):
    raise errors.UserError(
      f"The texts are of {length} tokens, and the empty caption of "
      f"{len(empty['text'])}: give texts of as many, or a negative text too."
    )
  library = jnp if isinstance(cond["text"], jax.Array) else np
  keys = [key for key in ("text", "pooled", "text_mask") if key in cond]
  told = {"text_mask": np.ones(length, bool), **empty}
  return {
    key: library.broadcast_to(
      library.asarray(told[key]).astype(cond[key].dtype),
      (count, *told[key].shape),
    )
    for key in keys
  }


def with_negative(
  data: data_config.DataConfig, cond: dict[str, Any]
) -> dict[str, Any]:
  """Returns a condition with the empty caption of the records it came from."""
  if "text" not in cond or "negative" in cond:
    return cond
  encoded = arrayrecord.of(data)
  if encoded is None or encoded.empty is None:
    return cond
  return {**cond, "negative": negative(encoded.empty, cond)}


def shapes(
  data: data_config.DataConfig, count: int
) -> dict[str, jax.ShapeDtypeStruct] | None:
  """Returns a batch of an encoded source in the abstract, else None."""
  encoded = arrayrecord.of(data)
  if encoded is None or not (encoded.latents or encoded.texts):
    return None
  return {
    key: jax.ShapeDtypeStruct((count, *np.shape(value)), value.dtype)
    for key, value in encoded.blank().items()
  }


def _in_float32(value: Any) -> Any:
  return value.astype(jnp.float32) if _is_float(value) else value


def _is_float(value: Any) -> bool:
  return jnp.issubdtype(value.dtype, jnp.floating)


def _inside(size: int, found: embeddings.Range) -> np.ndarray:
  """Marks which of so many places lie in a range."""
  place = np.arange(size)
  return (found[0] <= place) & (place < found[1])
