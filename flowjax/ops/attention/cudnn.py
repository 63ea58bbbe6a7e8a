"""Attention by the fused kernel of NVIDIA GPUs."""

# Shape suffixes: B batch, T queries, S keys, N heads, H head size.

import functools

import jax
import jax.numpy as jnp

from flowjax.ops import axes

# What the kernel is called where policies of remat are asked about it.
PRIMITIVE = "dot_product_attention_fwd_wrapper"
# The kernel takes larger heads from this compute capability (Hopper) on.
_HOPPER = 9.0


def attend(
  q_BTNH: jax.Array,
  k_BSNH: jax.Array,
  v_BSNH: jax.Array,
  mask_BS: jax.Array | None = None,
) -> jax.Array:
  """Attends without ever holding the T x S matrix.

  A mask would have to be read for every score, and the kernel is several times
  slower with one. It takes lengths instead: so the keys that are seen come
  first, which changes nothing, as attention is a sum over keys.
  """
  lengths_B = None
  if mask_BS is not None:
    lengths_B = jnp.sum(mask_BS, axis=1, dtype=jnp.int32)
    order_BS = jnp.argsort(~mask_BS, axis=1, stable=True)
    k_BSNH, v_BSNH = (_ordered(x, order_BS) for x in (k_BSNH, v_BSNH))
  return jax.nn.dot_product_attention(
    q_BTNH,
    k_BSNH,
    v_BSNH,
    key_value_seq_lengths=lengths_B,
    implementation="cudnn",
  )


@jax.vmap
def _ordered(x_SNH: jax.Array, order_S: jax.Array) -> jax.Array:
  # Each token is taken once: the gradient is a plain scatter as well.
  return x_SNH.at[order_S].get(unique_indices=True, mode="promise_in_bounds")


def obstacle(q_BTNH: jax.Array) -> str | None:
  """Says what keeps the kernel from taking these queries, if anything."""
  device = axes.device()
  if device.platform not in ("gpu", "cuda"):
    return f"it needs an NVIDIA GPU, and JAX runs on {device.platform}."
  if q_BTNH.dtype not in (jnp.bfloat16, jnp.float16):
    return f"it takes bfloat16 or float16, not {q_BTNH.dtype}."
  capability = float(getattr(device, "compute_capability", 0))
  largest = 256 if capability >= _HOPPER else 128
  head_size = q_BTNH.shape[-1]
  if head_size % 8 or head_size > largest:
    return (
      f"it takes head sizes that are multiples of 8 up to {largest} on this "
      f"GPU, not {head_size}."
    )
  return _missing()


def _missing() -> str | None:
  """Says what of the kernel's library is not on this machine.

  What is compiled for a GPU that is elsewhere needs it here as well.
  """
  x = jax.ShapeDtypeStruct((1, 8, 1, 8), jnp.bfloat16)
  kernel = functools.partial(
    jax.nn.dot_product_attention, implementation="cudnn"
  )
  try:
    jax.eval_shape(kernel, x, x, x)
  except RuntimeError as error:
    return f"its library is not on this machine ({error})."
  return None
