"""Attention of the text encoders: with a bias on its scores.

Texts are short, and the matrix of scores is held. Tokens stay together: a mesh
that splits them in the image's network computes a text on each device.
"""

# Shape suffixes: B batch, T queries, S keys, N heads, H head size; 1
# broadcasts.

import functools

import jax
import jax.numpy as jnp

# Where nobody looks. Finite, so that a query that sees nothing is no nan.
UNSEEN = float(jnp.finfo(jnp.float32).min)


def attend(
  q_BTNH: jax.Array,
  k_BSNH: jax.Array,
  v_BSNH: jax.Array,
  *,
  scale: float,
  bias_NTS: jax.Array | None = None,
  seen_TS: jax.Array | None = None,
  mask_BS: jax.Array | None = None,
) -> jax.Array:
  """Returns softmax(scale q k^T + bias) v for each head.

  A query sees a key where both `seen_TS` and `mask_BS` are true. Scores and
  softmax are float32.
  """
  dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
  score_BNTS = scale * dot("btnh,bsnh->bnts", q_BTNH, k_BSNH)
  if bias_NTS is not None:
    score_BNTS = score_BNTS + bias_NTS[None].astype(jnp.float32)
  if seen_TS is not None:
    score_BNTS = jnp.where(seen_TS[None, None], score_BNTS, UNSEEN)
  if mask_BS is not None:
    seen_B11S = mask_BS.astype(bool)[:, None, None]
    score_BNTS = jnp.where(seen_B11S, score_BNTS, UNSEEN)
  weight_BNTS = jax.nn.softmax(score_BNTS, axis=-1).astype(v_BSNH.dtype)
  return dot("bnts,bsnh->btnh", weight_BNTS, v_BSNH).astype(v_BSNH.dtype)
