"""The pieces of which every transformer here is made."""

# Shape suffixes: B batch, T tokens, D width, F frequencies.

import collections.abc
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from flowjax.ops import axes

# init(key, shape, fan_in) -> float32 array
Init = collections.abc.Callable[[jax.Array, tuple[int, ...], int], jax.Array]


def xavier(key: jax.Array, shape: tuple[int, ...], fan_in: int) -> jax.Array:
  """Draws U(-a, a), a^2 = 6 / (fan_in + fan_out), of the flattened matrix."""
  limit = math.sqrt(6.0 / (fan_in + math.prod(shape) // fan_in))
  return jax.random.uniform(key, shape, jnp.float32, -limit, limit)


def normal(key: jax.Array, shape: tuple[int, ...], fan_in: int) -> jax.Array:
  """Draws N(0, 0.02^2)."""
  del fan_in
  return 0.02 * jax.random.normal(key, shape, jnp.float32)


def zeros(key: jax.Array, shape: tuple[int, ...], fan_in: int) -> jax.Array:
  """Returns zeros: a branch that starts by doing nothing."""
  del key, fan_in
  return jnp.zeros(shape, jnp.float32)


class Dense(nn.Module):
  """Multiplies the last `contract` dims of x into `features` dims.

  The kernel keeps parts on dims of their own, as [D, 3, N, H], so that
  splitting it over devices never cuts across a part.
  """

  features: tuple[int, ...]
  contract: int = 1
  dtype: Any = jnp.float32
  init_kernel: Init = xavier

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    lead, inner = x.shape[: -self.contract], x.shape[-self.contract :]
    fan_in = math.prod(inner)
    kernel = self.param(
      "kernel", self.init_kernel, (*inner, *self.features), fan_in
    )
    bias = self.param("bias", nn.initializers.zeros, self.features)
    # One row per token: the gradient of the kernel is then a plain matmul,
    # which a CPU does twice as fast. Merging split tokens would reshard.
    if len(lead) > 1 and not axes.is_split("tokens"):
      x = x.reshape(-1, *inner)
    y = jax.lax.dot_general(
      x.astype(self.dtype),
      kernel.astype(self.dtype),
      (
        (
          tuple(range(x.ndim - self.contract, x.ndim)),
          tuple(range(self.contract)),
        ),
        ((), ()),
      ),
    )
    y = y + jnp.broadcast_to(bias.astype(self.dtype), y.shape)
    return y.reshape(*lead, *self.features)


class RMSNorm(nn.Module):
  """Divides by the root mean square of the last dim, then scales (float32)."""

  epsilon: float = 1e-6

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
    x32 = x.astype(jnp.float32)
    mean_square = jnp.mean(jnp.square(x32), axis=-1, keepdims=True)
    y = x32 * jax.lax.rsqrt(mean_square + self.epsilon)
    return (y * jnp.broadcast_to(scale, y.shape)).astype(x.dtype)


def modulated_norm(
  x_BTD: jax.Array, shift_BD: jax.Array, scale_BD: jax.Array
) -> jax.Array:
  """Returns (1 + scale) LayerNorm(x) + shift, in float32.

  The norm has no parameters of its own and epsilon 1e-6.
  """
  x = x_BTD.astype(jnp.float32)
  centred = x - jnp.mean(x, axis=-1, keepdims=True)
  variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
  normed = centred * jax.lax.rsqrt(variance + 1e-6)
  scale_B1D, shift_B1D = (
    y.astype(jnp.float32)[:, None] for y in (scale_BD, shift_BD)
  )
  return (normed * (1.0 + scale_B1D) + shift_B1D).astype(x_BTD.dtype)


def sinusoid(t_B: jax.Array, size: int) -> jax.Array:
  """Returns [cos(t w), sin(t w)], w_i = 10000^(-i / (size/2)), in float32."""
  half = size // 2
  frequency_F = jnp.exp(-math.log(10000.0) / half * jnp.arange(half))
  angle_BF = t_B.astype(jnp.float32)[:, None] * frequency_F[None]
  return jnp.concatenate([jnp.cos(angle_BF), jnp.sin(angle_BF)], axis=-1)


class TimeEmbed(nn.Module):
  """Embeds a time by an MLP over its 256-wide sinusoid, in float32."""

  width: int

  @nn.compact
  def __call__(self, t_B: jax.Array) -> jax.Array:
    hidden_BD = Dense((self.width,), init_kernel=normal, name="in")(
      sinusoid(t_B, 256)
    )
    return Dense((self.width,), init_kernel=normal, name="out")(
      nn.silu(hidden_BD)
    )
