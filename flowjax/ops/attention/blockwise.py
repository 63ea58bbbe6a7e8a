"""Attention in blocks: memory linear in the tokens, derivatives of any kind.

softmax(s) v is a ratio of two sums over the keys, of exp(s - m) v and of
exp(s - m), whatever m is. A sum may be taken block by block, and passes its
tangents and cotangents on without remembering where it stood; so forward and
reverse mode, and one on top of the other, are exact and hold no T x S matrix.
That m is the highest score, as softmax needs it, takes a pass of its own
before the sums, which no derivative enters.
"""

# Shape suffixes: B batch, T queries, S keys, N heads, H head size; of blocks:
# C blocks of queries, J blocks of keys. The T and S of a block are its own.

import functools
import math
import typing

import jax
import jax.numpy as jnp

BLOCK = 512
# What policies of remat call that which attention returns.
NAME = "attention"

_dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


class Keys(typing.NamedTuple):
  """Blocks of keys, their values, and which of them are seen (None: all)."""

  k_JBNSH: jax.Array
  v_JBNSH: jax.Array
  seen_JBS: jax.Array | None


def attend(
  q_BTNH: jax.Array,
  k_BSNH: jax.Array,
  v_BSNH: jax.Array,
  mask_BS: jax.Array | None = None,
) -> jax.Array:
  """Attends to one block of keys after the other, for a block of queries.

  No more than BLOCK x BLOCK scores of each head are held at a time.
  """
  dtype = q_BTNH.dtype
  # Blocks add up what they say of q, k and v, and that in float32.
  q_BTNH, k_BSNH, v_BSNH = (
    x.astype(jnp.float32) for x in (q_BTNH, k_BSNH, v_BSNH)
  )
  keys = cut_keys(k_BSNH, v_BSNH, mask_BS)
  rows = functools.partial(_rows, keys, dtype)
  y_CBNTH = jax.lax.map(rows, cut(q_BTNH))
  return joined(y_CBNTH, q_BTNH.shape[1])


def _rows(keys: Keys, dtype: jnp.dtype, q_BNTH: jax.Array) -> jax.Array:
  """Returns what a block of queries hears from all keys."""
  scale = 1.0 / math.sqrt(q_BNTH.shape[-1])
  zeros_BNT1 = jnp.zeros_like(q_BNTH[..., :1])
  # Finite where nothing is seen, so that exp(-inf - highest) is 0, not nan.
  lowest_BNT1 = zeros_BNT1 + jnp.finfo(jnp.float32).min

  def highest(highest_BNT1, block):
    score_BNTS = jax.lax.stop_gradient(scores(q_BNTH, block, dtype))
    score_BNT1 = jnp.max(score_BNTS, axis=-1, keepdims=True)
    return jnp.maximum(highest_BNT1, score_BNT1), None

  # Of a block only q, k and v are kept for the gradient.
  @functools.partial(jax.checkpoint, prevent_cse=False)
  def part(q_BNTH, block, highest_BNT1):
    score_BNTS = scores(q_BNTH, block, dtype)
    weight_BNTS = jnp.exp(scale * (score_BNTS - highest_BNT1))
    y_BNTH = _dot(
      "bnts,bnsh->bnth", weight_BNTS.astype(dtype), block.v_JBNSH.astype(dtype)
    )
    return y_BNTH, jnp.sum(weight_BNTS, axis=-1, keepdims=True)

  def add(sums, block):
    return jax.tree.map(jnp.add, sums, part(q_BNTH, block, highest_BNT1)), None

  highest_BNT1, _ = jax.lax.scan(highest, lowest_BNT1, keys)
  highest_BNT1 = jax.lax.stop_gradient(highest_BNT1)
  sums = jnp.zeros_like(q_BNTH), zeros_BNT1
  (y_BNTH, total_BNT1), _ = jax.lax.scan(add, sums, keys)
  total_BNT1 = jnp.where(total_BNT1 == 0.0, 1.0, total_BNT1)
  return (y_BNTH / total_BNT1).astype(dtype)


def scores(q_BNTH: jax.Array, block: Keys, dtype: jnp.dtype) -> jax.Array:
  """Returns q k^T for one block of keys, -inf where a key is hidden."""
  score_BNTS = _dot(
    "bnth,bnsh->bnts", q_BNTH.astype(dtype), block.k_JBNSH.astype(dtype)
  )
  if block.seen_JBS is None:
    return score_BNTS
  return jnp.where(block.seen_JBS[:, None, None], score_BNTS, -jnp.inf)


def cut_keys(
  k_BSNH: jax.Array, v_BSNH: jax.Array, mask_BS: jax.Array | None
) -> Keys:
  """Returns keys and values in blocks; what fills the last is not seen."""
  batch, tokens = k_BSNH.shape[:2]
  k_JBNSH, v_JBNSH = cut(k_BSNH), cut(v_BSNH)
  blocks, size = k_JBNSH.shape[0], k_JBNSH.shape[3]
  if mask_BS is None and blocks * size == tokens:
    return Keys(k_JBNSH, v_JBNSH, None)
  if mask_BS is None:
    mask_BS = jnp.ones((batch, tokens), bool)
  padded_BS = jnp.pad(mask_BS, ((0, 0), (0, blocks * size - tokens)))
  seen_BJS = padded_BS.reshape(batch, blocks, size)
  return Keys(k_JBNSH, v_JBNSH, seen_BJS.transpose(1, 0, 2))


def cut(x_BTNH: jax.Array) -> jax.Array:
  """Returns the tokens in equal blocks [C, B, N, T, H], filled with zeros."""
  batch, tokens, heads, size = x_BTNH.shape
  blocks = max(1, -(-tokens // BLOCK))
  each = -(-tokens // blocks)
  padding = (0, 0), (0, blocks * each - tokens), (0, 0), (0, 0)
  x = jnp.pad(x_BTNH, padding).reshape(batch, blocks, each, heads, size)
  return x.transpose(1, 0, 3, 2, 4)


def joined(x_CBNTH: jax.Array, tokens: int) -> jax.Array:
  """Undoes `cut` for so many tokens."""
  blocks, batch, heads, each, size = x_CBNTH.shape
  x_BCTNH = x_CBNTH.transpose(1, 0, 3, 2, 4)
  return x_BCTNH.reshape(batch, blocks * each, heads, size)[:, :tokens]
