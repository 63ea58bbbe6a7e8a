"""Attention on a mesh: each device with its own part of the arrays."""

# Shape suffixes: B batch, T queries, S keys, N heads, H head size.

import collections.abc
import functools

import jax
import jax.numpy as jnp

from flowjax.ops import axes

Attend = collections.abc.Callable[..., jax.Array]


def attend(
  each: Attend,
  q_BTNH: jax.Array,
  k_BSNH: jax.Array,
  v_BSNH: jax.Array,
  mask_BS: jax.Array | None,
  *,
  keys: tuple[str, ...] = (),
  mask: tuple[str, ...] = (),
) -> jax.Array:
  """Calls `each` on every device, with its examples, heads and queries.

  `keys` and `mask` are the axes of the mesh over which keys and what is known
  of them are split; where tokens are split and these are not, they are
  gathered. Tokens that do not divide evenly are filled up, and what fills is
  hidden.
  """
  # A fused kernel must know each device's part even where no dim here is split:
  # that of shares of the batch is not among these dims.
  if not axes.is_shared():
    return each(q_BTNH, k_BSNH, v_BSNH, mask_BS)
  batch, tokens, heads = map(axes.carriers, ("batch", "tokens", "heads"))
  queries = q_BTNH.shape[1]
  even = functools.partial(axes.even, dim_name="tokens")
  q_BTNH = axes.name(even(q_BTNH), "batch", "tokens", "heads", None)
  if keys and k_BSNH.shape[1] % axes.parts("tokens"):
    if mask_BS is None:
      mask_BS = jnp.ones(k_BSNH.shape[:2], bool)
    k_BSNH, v_BSNH, mask_BS = map(even, (k_BSNH, v_BSNH, mask_BS))

  spec = jax.sharding.PartitionSpec
  of_queries = spec(batch, tokens, heads)
  of_keys = spec(batch, keys, heads)
  arrays = [q_BTNH, k_BSNH, v_BSNH]
  specs = [of_queries, of_keys, of_keys]
  if mask_BS is not None:
    arrays.append(mask_BS)
    specs.append(spec(batch, mask))
  # What the devices hold is the business of `each`, and not checked.
  y_BTNH = jax.shard_map(
    each, in_specs=tuple(specs), out_specs=of_queries, check_vma=False
  )(*arrays)
  return y_BTNH[:, :queries]
