"""Attention in which devices exchange tokens for heads (arXiv:2309.14509).

Before attention a device has some tokens of all heads; then all tokens of some
heads, among which it attends like a device that is alone; and after it again
some tokens of all heads.
"""

# Shape suffixes: B batch, T queries, S keys, N heads, H head size.

import collections.abc

import jax

Attend = collections.abc.Callable[..., jax.Array]


def attend(
  q_BTNH: jax.Array,
  k_BSNH: jax.Array,
  v_BSNH: jax.Array,
  mask_BS: jax.Array | None = None,
  *,
  inner: Attend,
  exchange: tuple[str, ...],
) -> jax.Array:
  """Calls `inner` with the tokens of all devices along `exchange`.

  It is called inside of `jax.shard_map`, with the part of the mask that is for
  those tokens. The axes must divide the heads.
  """
  if not exchange:
    return inner(q_BTNH, k_BSNH, v_BSNH, mask_BS)
  y_BTNH = inner(
    *(
      jax.lax.all_to_all(x, exchange, 2, 1, tiled=True)
      for x in (q_BTNH, k_BSNH, v_BSNH)
    ),
    mask_BS,
  )
  return jax.lax.all_to_all(y_BTNH, exchange, 1, 2, tiled=True)
