"""Attention by a fused kernel for TPUs, written in Pallas."""

# Shape suffixes: B batch, T queries, S keys, N heads, H head size.

import functools
import math

import jax
import jax.numpy as jnp

from flowjax.ops import axes
from flowjax.ops.attention import blockwise

# A tile is a multiple of the lanes of a vector unit, and fits its memory.
_LANES, _TILE = 128, 512


def attend(
  q_BTNH: jax.Array,
  k_BSNH: jax.Array,
  v_BSNH: jax.Array,
  mask_BS: jax.Array | None = None,
  *,
  interpret: bool = False,
) -> jax.Array:
  """Attends without ever holding the T x S matrix.

  Tokens are filled up to whole tiles. A key that is hidden, or fills, belongs
  to another segment than the queries, and the kernel passes it over.
  `interpret` runs the kernel on a CPU, slowly.
  """
  queries, keys = q_BTNH.shape[1], k_BSNH.shape[1]
  tile_q, tile_k = _tile(queries), _tile(keys)
  scale = 1.0 / math.sqrt(q_BTNH.shape[-1])
  scaled_BTNH = (scale * q_BTNH.astype(jnp.float32)).astype(q_BTNH.dtype)

  q_BNTH = _filled(scaled_BTNH, tile_q).transpose(0, 2, 1, 3)
  k_BNSH, v_BNSH = (
    _filled(x, tile_k).transpose(0, 2, 1, 3) for x in (k_BSNH, v_BSNH)
  )
  kernel = _kernel(
    q_BNTH.shape[1:3], k_BNSH.shape[2], tile_q, tile_k, interpret
  )
  if mask_BS is None and keys % tile_k == 0:
    y_BNTH = jax.vmap(kernel)(q_BNTH, k_BNSH, v_BNSH)
  else:
    if mask_BS is None:
      mask_BS = jnp.ones((k_BSNH.shape[0], keys), bool)
    seen_BS = _filled(mask_BS, tile_k).astype(jnp.int32)
    y_BNTH = jax.vmap(functools.partial(_among, kernel))(
      q_BNTH, k_BNSH, v_BNSH, seen_BS
    )
  return y_BNTH.transpose(0, 2, 1, 3)[:, :queries]


def obstacle(q_BTNH: jax.Array) -> str | None:
  """Says what keeps the kernel from taking these queries, if anything."""
  platform = axes.device().platform
  if platform != "tpu":
    return f"it needs a TPU, and JAX runs on {platform}."
  if q_BTNH.dtype not in (jnp.bfloat16, jnp.float32):
    return f"it takes bfloat16 or float32, not {q_BTNH.dtype}."
  return None


def _among(kernel, q_NTH, k_NSH, v_NSH, seen_S):
  from jax.experimental.pallas.ops.tpu import splash_attention

  ones_T = jnp.ones(q_NTH.shape[1], jnp.int32)
  ids = splash_attention.SegmentIds(q=ones_T, kv=seen_S)
  return kernel(q_NTH, k_NSH, v_NSH, segment_ids=ids)


def _kernel(heads_queries, keys, tile_q, tile_k, interpret):
  """Returns the kernel for such shapes; each device has its own tokens."""
  # Pallas takes a second to import, and only TPUs need it.
  from jax.experimental.pallas.ops.tpu import splash_attention

  heads, queries = heads_queries
  every = splash_attention.FullMask((queries, keys))
  sizes = splash_attention.BlockSizes(
    block_q=tile_q,
    block_kv=tile_k,
    block_q_dkv=tile_q,
    block_kv_dkv=tile_k,
    block_q_dq=tile_q,
    block_kv_dq=tile_k,
  )
  return splash_attention.make_splash_mha(
    splash_attention.MultiHeadMask([every] * heads),
    block_sizes=sizes,
    head_shards=1,
    q_seq_shards=1,
    residual_checkpoint_name=blockwise.NAME,
    interpret=interpret,
  )


def _tile(tokens: int) -> int:
  """Returns the tile, at most _TILE, that leaves the least to fill."""
  tiles = -(-tokens // _TILE)
  return -(-tokens // (tiles * _LANES)) * _LANES


def _filled(x: jax.Array, tile: int) -> jax.Array:
  padding = [(0, 0)] * x.ndim
  padding[1] = (0, -x.shape[1] % tile)
  return jnp.pad(x, padding)
