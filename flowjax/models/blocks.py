"""The two halves of a transformer block, attention and the MLP; and the end.

What is worth saving for the gradient has a name here ("qkv", "attention_out",
"mlp", "mlp_out") or in `ops.attention` ("attention"), by which `REMAT` chooses.
"""

# Shape suffixes: B batch, T tokens, D width, K parts of a fused map, N heads,
# H head size, F hidden width of the MLP.

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.ad_checkpoint
import jax.numpy as jnp

from flowjax.models import layers, positions
from flowjax.ops import attention, axes

MLPS = ("gelu", "swiglu")
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}

# What of a block is kept for the gradient; the rest is computed again. Down
# the table less is kept and more is computed:
#   none             everything that the gradient reads
#   matmuls          results of matmuls and attention; norms, rotations and
#                    activations are made again
#   dots             results of matmuls with parameters; attention is redone
#   save_attention   queries, keys, values and what attention returned
#   full             the inputs of blocks: about a third more arithmetic
# Two keep it in the memory of the host, over whose bus it goes and comes:
#   offload_matmuls  as "matmuls"
#   offload          as "save_attention"
_MATMULS = ("modulation", "qkv", "attention_out", "mlp", "mlp_out")
_ATTENTION = ("qkv", "attention")


def _save(*names: str):
  return attention.kept(jax.checkpoint_policies.save_only_these_names(*names))


def _offload(*names: str):
  return attention.kept(
    jax.checkpoint_policies.save_and_offload_only_these_names(
      names_which_can_be_saved=(),
      names_which_can_be_offloaded=names,
      offload_src="device",
      offload_dst="pinned_host",
    )
  )


REMAT = {
  "none": None,
  "matmuls": _save(*_MATMULS, "attention"),
  "dots": _save(*_MATMULS),
  "save_attention": _save(*_ATTENTION),
  "full": jax.checkpoint_policies.nothing_saveable,
  "offload_matmuls": _offload(*_MATMULS, "attention"),
  "offload": _offload(*_ATTENTION),
}
OFFLOADING = ("offload_matmuls", "offload")
saved = jax.ad_checkpoint.checkpoint_name


def anywhere(config: Any) -> Any:
  """Returns a config of the same parameters, which any device can draw."""
  return dataclasses.replace(config, attention="xla")


class Attention(nn.Module):
  """Lets tokens see those of the mask; `rope` turns queries and keys.

  Where `identity` is true, a token sees itself alone: the weights of attention
  are the identity, and its own values go through the last map.
  """

  heads: int
  head_size: int
  qk_norm: bool
  body: str
  dtype: jnp.dtype

  @nn.compact
  def __call__(
    self,
    x_BTD: jax.Array,
    rope: tuple[jax.Array, jax.Array] | None,
    identity: jax.Array | None = None,
    mask_BT: jax.Array | None = None,
  ) -> jax.Array:
    qkv_BTKNH = layers.Dense(
      (3, self.heads, self.head_size),
      dtype=self.dtype,
      tokens="tokens",
      name="qkv",
    )(x_BTD)
    qkv_BTKNH = axes.name(qkv_BTKNH, "batch", "tokens", None, "heads", None)
    q_BTNH, k_BTNH, v_BTNH = jnp.unstack(saved(qkv_BTKNH, "qkv"), axis=2)
    if self.qk_norm:
      q_BTNH = layers.RMSNorm(name="query_norm")(q_BTNH)
      k_BTNH = layers.RMSNorm(name="key_norm")(k_BTNH)
    if rope is not None:
      q_BTNH = positions.rotate(q_BTNH, *rope)
      k_BTNH = positions.rotate(k_BTNH, *rope)
    attend = functools.partial(
      attention.attention, body=self.body, mask_BS=mask_BT
    )
    if identity is None:
      y_BTNH = attend(q_BTNH, k_BTNH, v_BTNH)
    else:
      y_BTNH = jax.lax.cond(
        identity,
        lambda q_BTNH, k_BTNH, v_BTNH: v_BTNH,
        attend,
        *(q_BTNH, k_BTNH, v_BTNH),
      )
    y_BTNH = axes.name(y_BTNH, "batch", "tokens", "heads", None)
    y_BTD = layers.Dense(
      x_BTD.shape[-1:],
      contract=2,
      dtype=self.dtype,
      tokens="tokens",
      name="out",
    )(y_BTNH)
    return saved(y_BTD, "attention_out")


class Mlp(nn.Module):
  """Two maps with tanh-GELU between them, or three with SwiGLU.

  SwiGLU is silu(part 0) part 1 (arXiv:2002.05202, eq. 5). `beside` is summed
  with the result: see `layers.Dense`.
  """

  kind: str
  hidden: int
  dtype: jnp.dtype

  @nn.compact
  def __call__(
    self, x_BTD: jax.Array, beside: jax.Array | None = None
  ) -> jax.Array:
    dense = functools.partial(layers.Dense, dtype=self.dtype, tokens="tokens")
    parts = (2,) if self.kind == "swiglu" else ()
    hidden = dense((*parts, self.hidden), name="in")(x_BTD)
    hidden_BTF = _activate(saved(hidden, "mlp"))
    hidden_BTF = axes.name(hidden_BTF, "batch", "tokens", "mlp")
    y_BTD = dense(x_BTD.shape[-1:], split="mlp", name="out")(hidden_BTF, beside)
    return saved(y_BTD, "mlp_out")


@layers.recomputed
def _activate(hidden: jax.Array) -> jax.Array:
  if hidden.ndim == 3:
    return nn.gelu(hidden, approximate=True)
  return nn.silu(hidden[:, :, 0]) * hidden[:, :, 1]


class Final(nn.Module):
  """The last modulated norm and the map to patches, in float32."""

  features: int
  norm: str

  @nn.compact
  def __call__(self, x_BTD, c_BD):
    modulation_BKD = layers.Dense(
      (2, x_BTD.shape[-1]), init_kernel=layers.zeros, name="modulation"
    )(c_BD)
    shift_BD, scale_BD = jnp.unstack(modulation_BKD, axis=1)
    y_BTD = layers.ModulatedNorm(self.norm, name="norm")(
      x_BTD.astype(jnp.float32), shift_BD, scale_BD
    )
    return layers.Dense(
      (self.features,), init_kernel=layers.zeros, tokens="tokens", name="out"
    )(y_BTD)
