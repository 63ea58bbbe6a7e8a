"""The pieces of which the transformers here are made."""

# Shape suffixes: B batch, T tokens, D width, F frequencies.

import collections.abc
import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from flowjax.ops import axes

# init(key, shape, fan_in) -> float32 array
Init = collections.abc.Callable[[jax.Array, tuple[int, ...], int], jax.Array]

TIME_FREQUENCIES = 256

# Of a cheap function only the inputs are kept for the gradient. In float32
# the insides of norms and activations would be two thirds of what is saved.
recomputed = functools.partial(jax.checkpoint, prevent_cse=False)


def xavier(key: jax.Array, shape: tuple[int, ...], fan_in: int) -> jax.Array:
  """Draws U(-a, a), a^2 = 6 / (fan_in + fan_out), of the flattened matrix."""
  limit = math.sqrt(6.0 / (fan_in + math.prod(shape) // fan_in))
  return jax.random.uniform(key, shape, jnp.float32, -limit, limit)


def normal(
  key: jax.Array, shape: tuple[int, ...], fan_in: int = 1
) -> jax.Array:
  """Draws N(0, 0.02^2)."""
  del fan_in
  return 0.02 * jax.random.normal(key, shape, jnp.float32)


def zeros(key: jax.Array, shape: tuple[int, ...], fan_in: int = 1) -> jax.Array:
  """Returns zeros: for a branch that starts by doing nothing."""
  del key, fan_in
  return jnp.zeros(shape, jnp.float32)


class Dense(nn.Module):
  """Maps the last `contract` dims of x linearly onto `features` dims.

  A kernel keeps its parts on dims of their own, as in [D, 3, N, H], so that
  splitting it over devices never cuts across a part.
  """

  features: tuple[int, ...]
  contract: int = 1
  dtype: jnp.dtype = jnp.float32
  init_kernel: Init = xavier

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    lead, inner = x.shape[: -self.contract], x.shape[-self.contract :]
    kernel = self.param(
      "kernel", self.init_kernel, (*inner, *self.features), math.prod(inner)
    )
    bias = self.param("bias", zeros, self.features)
    # One row per token makes the gradient of the kernel a plain matmul, which
    # a CPU does twice as fast. Merging split tokens would move them, though.
    if len(lead) > 1 and not axes.is_split("tokens"):
      x = x.reshape(-1, *inner)
    y = jnp.tensordot(
      x.astype(self.dtype), kernel.astype(self.dtype), axes=self.contract
    )
    y = y + jnp.broadcast_to(bias.astype(self.dtype), y.shape)
    return y.reshape(*lead, *self.features)


class RMSNorm(nn.Module):
  """Divides by the root mean square of the last dim, and scales."""

  epsilon: float = 1e-6

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    scale = self.param("scale", nn.initializers.ones, x.shape[-1:])

    @recomputed
    def normed(x, scale):
      x32 = x.astype(jnp.float32)
      mean_square = jnp.mean(jnp.square(x32), axis=-1, keepdims=True)
      y = x32 * jax.lax.rsqrt(mean_square + self.epsilon)
      return (y * jnp.broadcast_to(scale, y.shape)).astype(x.dtype)

    return normed(x, scale)


@recomputed
def modulated_norm(
  x_BTD: jax.Array, shift_BD: jax.Array, scale_BD: jax.Array
) -> jax.Array:
  """Returns (1 + scale) LayerNorm(x) + shift, computed in float32.

  The norm has no parameters of its own, and epsilon 1e-6
  (arXiv:2212.09748, section 3.2).
  """
  x = x_BTD.astype(jnp.float32)
  centred = x - jnp.mean(x, axis=-1, keepdims=True)
  variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
  normed = centred * jax.lax.rsqrt(variance + 1e-6)
  shift_B1D = shift_BD.astype(jnp.float32)[:, None]
  scale_B1D = scale_BD.astype(jnp.float32)[:, None]
  return (normed * (1.0 + scale_B1D) + shift_B1D).astype(x_BTD.dtype)


@recomputed
def add_gated(
  x_BTD: jax.Array, gate_BD: jax.Array, y_BTD: jax.Array
) -> jax.Array:
  """Returns x + gate y, computed in float32."""
  gate_B1D = gate_BD.astype(jnp.float32)[:, None]
  sum_BTD = x_BTD.astype(jnp.float32) + gate_B1D * y_BTD.astype(jnp.float32)
  return sum_BTD.astype(x_BTD.dtype)


def sinusoid(t_B: jax.Array, size: int) -> jax.Array:
  """Returns [cos(t w), sin(t w)], w_i = 10000^(-i / (size/2)), in float32."""
  half = size // 2
  # Constants, rounded where PyTorch's float32 rounds them: at t = 1000 another
  # last bit of a frequency is a thousandfold in the output.
  exponent_F = np.float32(-math.log(10000.0)) * np.arange(half, dtype="f4")
  exponent_F = (exponent_F / np.float32(half)).astype(np.float64)
  frequency_F = np.exp(exponent_F).astype(np.float32)
  angle_BF = t_B.astype(jnp.float32)[:, None] * frequency_F[None]
  return jnp.concatenate([jnp.cos(angle_BF), jnp.sin(angle_BF)], axis=-1)


class TimeEmbed(nn.Module):
  """Embeds a time by an MLP over its sinusoid, in float32."""

  width: int

  @nn.compact
  def __call__(self, t_B: jax.Array) -> jax.Array:
    dense = functools.partial(Dense, (self.width,), init_kernel=normal)
    hidden_BD = dense(name="in")(sinusoid(t_B, TIME_FREQUENCIES))
    return dense(name="out")(nn.silu(hidden_BD))


class Table(nn.Module):
  """Holds one learned row of the given width for each of `rows` things."""

  rows: int
  width: int

  @nn.compact
  def __call__(self) -> jax.Array:
    return self.param("embedding", normal, (self.rows, self.width))
