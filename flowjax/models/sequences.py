"""Tokens in sequences that devices share evenly, of text and image together.

Attention does not care in which order keys come, and gives each query its own
answer. So where tokens are split, a device keeps its part of the text beside
its part of the image, and nothing moves when the two become one sequence.
"""

# Shape suffixes: B batch, L text tokens, T image tokens (or those of any
# sequence), S = L + T. Dims after them are free.

import functools
import logging
from typing import Any

import jax
import jax.numpy as jnp

from flowjax.ops import axes

Rope = tuple[jax.Array, jax.Array]  # cosines and sines [T, H], or [B, T, H]
Mask = jax.Array | None  # true where a token is real; None: everywhere


def even(x_BT: Any, dim: int = 1) -> jax.Array:
  """Returns x with zeros after its tokens, if devices cannot share them."""
  x_BT = jnp.asarray(x_BT)
  padded = axes.even(x_BT, "tokens", dim % x_BT.ndim)
  if padded.shape != x_BT.shape:
    _say(x_BT.shape[dim], padded.shape[dim], axes.parts("tokens"))
  return padded


def even_rope(rope: tuple[Any, Any]) -> Rope:
  """Returns cosines and sines for the tokens of an even sequence."""
  return even(rope[0], -2), even(rope[1], -2)


def woven_rope(text: Rope, image: Rope) -> Rope:
  """Returns cosines and sines for two even sequences as one.

  Those of the image may have a dim of the batch, where the text's have none.
  """
  lead = image[0].shape[:-2]
  cos, sin = (
    woven(jnp.broadcast_to(one, (*lead, *one.shape)), other, len(lead))
    for one, other in zip(text, image, strict=True)
  )
  return cos, sin


def seen(mask_BT: Mask, batch: int, tokens: int) -> Mask:
  """Returns the mask of a sequence that was made even."""
  if mask_BT is None and tokens % axes.parts("tokens"):
    mask_BT = jnp.ones((batch, tokens), bool)
  return None if mask_BT is None else axes.even(mask_BT.astype(bool), "tokens")


def woven(text_BL: jax.Array, image_BT: jax.Array, dim: int = 1) -> jax.Array:
  """Returns the even sequences as one: on each device text, then image."""
  parts = axes.parts("tokens")
  if parts == 1:
    return jnp.concatenate([text_BL, image_BT], axis=dim)
  pair = [_split(x, parts, dim) for x in (text_BL, image_BT)]
  return _merged(jnp.concatenate(pair, axis=dim + 1), dim)


def parted(x_BS: jax.Array, length: int) -> tuple[jax.Array, jax.Array]:
  """Undoes `woven`, of a text of `length` tokens."""
  parts = axes.parts("tokens")
  if parts == 1:
    return x_BS[:, :length], x_BS[:, length:]
  x_BPS, part = _split(x_BS, parts, 1), length // parts
  return _merged(x_BPS[:, :, :part], 1), _merged(x_BPS[:, :, part:], 1)


def woven_masks(
  text_BL: Mask, image_BT: Mask, batch: int, tokens: tuple[int, int]
) -> Mask:
  """Returns the mask of two sequences, of so many tokens, as one."""
  if text_BL is None and image_BT is None:
    return None
  length, image_tokens = tokens
  if text_BL is None:
    text_BL = jnp.ones((batch, length), bool)
  if image_BT is None:
    image_BT = jnp.ones((batch, image_tokens), bool)
  return woven(text_BL.astype(bool), image_BT)


def _split(x: jax.Array, parts: int, dim: int) -> jax.Array:
  return x.reshape(*x.shape[:dim], parts, -1, *x.shape[dim + 1 :])


def _merged(x: jax.Array, dim: int) -> jax.Array:
  return x.reshape(*x.shape[:dim], -1, *x.shape[dim + 2 :])


@functools.cache
def _say(tokens: int, padded: int, parts: int) -> None:
  logging.info(
    "%d tokens do not divide over %d devices: %d more, that nobody sees, make "
    "%d.",
    *(tokens, parts, padded - tokens, padded),
  )
