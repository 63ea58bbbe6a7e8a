"""Attention in which keys and values travel round a ring of devices.

Each device has its own queries, keys and values (arXiv:2310.01889). While it
computes with the keys at hand it sends them on and receives the next, so that
after as many steps as there are devices each query has met every key. What a
query heard so far is a sum over exp(s - m), of v and of 1, with the highest
score m so far; a higher one rescales both (arXiv:1805.02867).

For the gradient a device keeps its own q, k, v, y and the logarithm of each
query's sum, and the keys travel once more. Their gradient travels with them,
one step behind, and is home at the end. With P the weights,
D the row sums of dy y: dv = P^T dy, ds = P (dy v^T - D), dq = ds k,
dk = ds^T q (arXiv:2205.14135, appendix B.2).
"""

# Shape suffixes: B batch, T queries, S keys, N heads, H head size, all of one
# device; of blocks: C blocks of queries, J blocks of keys, whose T and S are
# their own.

import collections.abc
import functools
import math
import typing

import jax
import jax.ad_checkpoint
import jax.numpy as jnp

from flowjax.ops.attention import blockwise

_dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
_sum = functools.partial(jax.tree.map, jnp.add)


def attend(
  q_BTNH: jax.Array,
  k_BSNH: jax.Array,
  v_BSNH: jax.Array,
  mask_BS: jax.Array | None = None,
  *,
  ring: tuple[str, ...] = (),
) -> jax.Array:
  """Attends to the keys of all devices along the mesh axes `ring`.

  It is called inside of `jax.shard_map`. A ring of no axes is one device.
  """
  q_CBNTH = blockwise.cut(q_BTNH)
  keys = blockwise.cut_keys(k_BSNH, v_BSNH, mask_BS)
  y_CBNTH = _around(q_CBNTH, keys, ring)
  return blockwise.joined(y_CBNTH, q_BTNH.shape[1])


class _Heard(typing.NamedTuple):
  """What queries heard so far; the sums are to be scaled by exp(highest)."""

  y_CBNTH: jax.Array
  total_CBNT1: jax.Array
  highest_CBNT1: jax.Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _around(q_CBNTH, keys, ring):
  return _forward(q_CBNTH, keys, ring)[0]


def _forward(q_CBNTH, keys, ring):
  zeros_CBNT1 = jnp.zeros_like(q_CBNTH[..., :1], jnp.float32)
  # Finite where nothing is seen, so that exp(-inf - highest) is 0, not nan.
  lowest_CBNT1 = zeros_CBNT1 + jnp.finfo(jnp.float32).min
  heard = _Heard(
    jnp.zeros_like(q_CBNTH, jnp.float32), zeros_CBNT1, lowest_CBNT1
  )
  listen = functools.partial(_listen, q_CBNTH)

  def step(carry, _):
    heard, keys = carry
    # Sent first: the transfer needs nothing of what is computed meanwhile.
    arriving = _sent(keys, ring)
    return (listen(heard, keys), arriving), None

  steps = _size(ring) - 1
  (heard, keys), _ = jax.lax.scan(step, (heard, keys), length=steps)
  heard = listen(heard, keys)
  total_CBNT1 = jnp.where(heard.total_CBNT1 == 0.0, 1.0, heard.total_CBNT1)
  y_CBNTH = (heard.y_CBNTH / total_CBNT1).astype(q_CBNTH.dtype)
  return y_CBNTH, heard.highest_CBNT1 + jnp.log(total_CBNT1)


def _keep(q_CBNTH, keys, ring):
  # By its name a policy of remat may keep this, and spare the ring a turn.
  y_CBNTH, log_total_CBNT1 = (
    jax.ad_checkpoint.checkpoint_name(x, blockwise.NAME)
    for x in _forward(q_CBNTH, keys, ring)
  )
  return y_CBNTH, (q_CBNTH, keys, y_CBNTH, log_total_CBNT1)


def _backward(ring, kept, dy_CBNTH):
  q_CBNTH, keys, y_CBNTH, log_total_CBNT1 = kept
  dot_CBNT1 = jnp.sum(
    dy_CBNTH.astype(jnp.float32) * y_CBNTH, axis=-1, keepdims=True
  )
  asked = q_CBNTH, dy_CBNTH, log_total_CBNT1, dot_CBNT1

  def step(carry, _):
    dq, dkv, keys = carry
    arriving, dkv = _sent((keys, dkv), ring)
    return (*_sum((dq, dkv), _gradients(asked, keys)), arriving), None

  steps = _size(ring) - 1
  if steps:
    arriving = _sent(keys, ring)
    carry = *_gradients(asked, keys), arriving
    (dq, dkv, keys), _ = jax.lax.scan(step, carry, length=steps - 1)
    dkv = _sent(dkv, ring)
    dq, dkv = _sum((dq, dkv), _gradients(asked, keys))
    dkv = _sent(dkv, ring)
  else:
    dq, dkv = _gradients(asked, keys)
  dq, dk, dv = (x.astype(q_CBNTH.dtype) for x in (dq, *dkv))
  return dq, blockwise.Keys(dk, dv, None)


_around.defvjp(_keep, _backward)


def _listen(q_CBNTH, heard: _Heard, keys: blockwise.Keys) -> _Heard:
  """Lets all queries of the device hear its present keys, block by block."""
  dtype, scale = q_CBNTH.dtype, 1.0 / math.sqrt(q_CBNTH.shape[-1])

  def column(q_BNTH, heard, block):
    y_BNTH, total_BNT1, before_BNT1 = heard
    score_BNTS = scale * blockwise.scores(q_BNTH, block, dtype)
    highest_BNT1 = jnp.max(score_BNTS, axis=-1, keepdims=True)
    highest_BNT1 = jnp.maximum(highest_BNT1, before_BNT1)
    weight_BNTS = jnp.exp(score_BNTS - highest_BNT1)
    y = _dot("bnts,bnsh->bnth", weight_BNTS.astype(dtype), block.v_JBNSH)
    total = jnp.sum(weight_BNTS, axis=-1, keepdims=True)
    less_BNT1 = jnp.exp(before_BNT1 - highest_BNT1)
    return _Heard(
      less_BNT1 * y_BNTH + y, less_BNT1 * total_BNT1 + total, highest_BNT1
    ), None

  def row(row):
    q_BNTH, heard = row
    return jax.lax.scan(functools.partial(column, q_BNTH), heard, keys)[0]

  return jax.lax.map(row, (q_CBNTH, heard))


def _gradients(asked, keys: blockwise.Keys):
  """Returns dq, (dk, dv) of the device's queries and its present keys."""
  dtype, scale = asked[0].dtype, 1.0 / math.sqrt(asked[0].shape[-1])

  def column(row, dq_BNTH, block):
    q_BNTH, dy_BNTH, log_total_BNT1, dot_BNT1 = row
    score_BNTS = scale * blockwise.scores(q_BNTH, block, dtype)
    weight_BNTS = jnp.exp(score_BNTS - log_total_BNT1)
    dweight_BNTS = _dot("bnth,bnsh->bnts", dy_BNTH, block.v_JBNSH)
    dscore_BNTS = scale * weight_BNTS * (dweight_BNTS - dot_BNT1)
    dscore_BNTS = dscore_BNTS.astype(dtype)
    dk_BNSH = _dot("bnts,bnth->bnsh", dscore_BNTS, q_BNTH)
    dv_BNSH = _dot("bnts,bnth->bnsh", weight_BNTS.astype(dtype), dy_BNTH)
    dq_BNTH += _dot("bnts,bnsh->bnth", dscore_BNTS, block.k_JBNSH)
    return dq_BNTH, (dk_BNSH, dv_BNSH)

  def row(dkv, row):
    dq_BNTH = jnp.zeros_like(row[0], jnp.float32)
    dq_BNTH, here = jax.lax.scan(functools.partial(column, row), dq_BNTH, keys)
    return _sum(dkv, here), dq_BNTH

  zeros = jnp.zeros_like(keys.k_JBNSH, jnp.float32)
  dkv, dq_CBNTH = jax.lax.scan(row, (zeros, zeros), asked)
  return dq_CBNTH, dkv


def _sent(blocks: typing.Any, ring: tuple[str, ...]) -> typing.Any:
  """Gives the blocks to the next device, and returns the previous one's."""
  size = _size(ring)
  route = [(i, (i + 1) % size) for i in range(size)]
  return jax.tree.map(lambda x: jax.lax.ppermute(x, ring, route), blocks)


def _size(ring: collections.abc.Iterable[str]) -> int:
  return math.prod(jax.lax.axis_size(axis) for axis in ring)
