"""Softmax attention, with several bodies behind one signature."""

# Shape suffixes: B batch, T queries, S keys, N heads, H head size.

import math

import jax
import jax.numpy as jnp

BODIES = ("auto", "xla", "cudnn")


def attention(
  q_BTNH: jax.Array,
  k_BSNH: jax.Array,
  v_BSNH: jax.Array,
  *,
  body: str = "auto",
  mask_BTS: jax.Array | None = None,
) -> jax.Array:
  """Returns softmax(q k^T / sqrt(H)) v for every head.

  `mask_BTS` is true where query t may see key s.
  """
  if body in ("auto", "xla"):
    return _xla(q_BTNH, k_BSNH, v_BSNH, mask_BTS)
  raise ValueError(body)


def _xla(q_BTNH, k_BSNH, v_BSNH, mask_BTS):
  scale = 1.0 / math.sqrt(q_BTNH.shape[-1])
  q = q_BTNH.transpose(0, 2, 1, 3)
  k = k_BSNH.transpose(0, 2, 1, 3)
  v = v_BSNH.transpose(0, 2, 1, 3)
  logits = jnp.einsum(
    "bnth,bnsh->bnts", q, k, preferred_element_type=jnp.float32
  )
  logits = logits * scale
  if mask_BTS is not None:
    logits = jnp.where(mask_BTS[:, None], logits, -1e30)
  p = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
  return jnp.einsum("bnts,bnsh->bnth", p, v).transpose(0, 2, 1, 3)
