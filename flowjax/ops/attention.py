"""Softmax attention, with several bodies behind one signature.

xla    plain JAX, on any device, differentiable to any order
cudnn  the fused kernel of NVIDIA GPUs; never holds the T x S matrix
auto   cudnn where it can run, else xla
"""

# Shape suffixes: B batch, T queries, S keys, N heads, H head size.

import functools
import math

import jax
import jax.numpy as jnp

from flowjax.ops import axes

BODIES = ("auto", "xla", "cudnn")

# The fused kernel takes larger heads from this compute capability (Hopper) on.
_HOPPER = 9.0


def attention(
  q_BTNH: jax.Array,
  k_BSNH: jax.Array,
  v_BSNH: jax.Array,
  *,
  body: str = "auto",
  mask_BTS: jax.Array | None = None,
) -> jax.Array:
  """Returns softmax(q k^T / sqrt(H)) v for each head (arXiv:1706.03762, eq. 1).

  `mask_BTS` is true where query t may see key s; a query that may see none
  gets zeros from "xla".
  """
  if body not in BODIES:
    raise ValueError(
      f"Unknown attention body {body!r}. There are: {', '.join(BODIES)}."
    )
  obstacle = None if body == "xla" else cudnn_obstacle(q_BTNH)
  if body == "cudnn" and obstacle:
    raise ValueError(
      f"attention='cudnn' cannot run: {obstacle} Use 'auto' or 'xla', or "
      "change that."
    )
  if body == "xla" or obstacle:
    return _xla(q_BTNH, k_BSNH, v_BSNH, mask_BTS)
  mask_B1TS = None if mask_BTS is None else mask_BTS[:, None]
  return jax.nn.dot_product_attention(
    q_BTNH, k_BSNH, v_BSNH, mask=mask_B1TS, implementation="cudnn"
  )


def cudnn_obstacle(q_BTNH: jax.Array) -> str | None:
  """Says what keeps the fused kernel from taking these queries, if anything."""
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
  return None


# Only q, k and v are kept for the gradient; the T x S matrix is made again.
@functools.partial(jax.checkpoint, prevent_cse=False)
def _xla(q_BTNH, k_BSNH, v_BSNH, mask_BTS):
  """Attends with heads before tokens: on a CPU four times as fast.

  The sum of the exponentials divides the result, not the T x S matrix, so
  that one pass over it is spared.
  """
  q_BNTH, k_BNSH, v_BNSH = (
    x.transpose(0, 2, 1, 3) for x in (q_BTNH, k_BSNH, v_BSNH)
  )
  dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
  score_BNTS = dot("bnth,bnsh->bnts", q_BNTH, k_BNSH)
  if mask_BTS is not None:
    score_BNTS = jnp.where(mask_BTS[:, None], score_BNTS, -jnp.inf)

  highest_BNT1 = jnp.max(score_BNTS, axis=-1, keepdims=True)
  # Finite where nothing is seen, so that exp(-inf - highest) is 0, not nan.
  highest_BNT1 = jnp.maximum(highest_BNT1, jnp.finfo(jnp.float32).min)
  highest_BNT1 = jax.lax.stop_gradient(highest_BNT1)
  scale = 1.0 / math.sqrt(q_BTNH.shape[-1])
  weight_BNTS = jnp.exp(scale * (score_BNTS - highest_BNT1))
  total_BNT1 = jnp.sum(weight_BNTS, axis=-1, keepdims=True)
  total_BNT1 = jnp.where(total_BNT1 == 0.0, 1.0, total_BNT1)

  y_BNTH = dot("bnts,bnsh->bnth", weight_BNTS.astype(v_BNSH.dtype), v_BNSH)
  return (y_BNTH / total_BNT1).astype(q_BTNH.dtype).transpose(0, 2, 1, 3)
