"""The pieces of which the transformers here are made."""

# Shape suffixes: B batch, T tokens, D width, F frequencies.

import collections.abc
import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from flowjax.ops import axes, products

# init(key, shape, fan_in) -> float32 array
Init = collections.abc.Callable[[jax.Array, tuple[int, ...], int], jax.Array]

TIME_FREQUENCIES = 256
# What an adapter adds to a `Dense`, beside its kernel (models/lora.py).
FACTORS = ("lora_a", "lora_b")
NORMS = ("layernorm", "rmsnorm")

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
  splitting it over devices never cuts across a part. `tokens` names the second
  dim of x, where it is one of tokens. `split` names the first contracted dim:
  devices that have a range of it each sum what they found. Unless `summed`, the
  result has these terms along a first dim; `beside` are terms to sum with them.
  """

  features: tuple[int, ...]
  contract: int = 1
  dtype: jnp.dtype = jnp.float32
  init_kernel: Init = xavier
  bias: bool = True
  tokens: str | None = None
  split: str | None = None
  summed: bool = True

  @nn.compact
  def __call__(
    self, x: jax.Array, beside: jax.Array | None = None
  ) -> jax.Array:
    inner = x.shape[-self.contract :]
    kernel = self.param(
      "kernel", self.init_kernel, (*inner, *self.features), math.prod(inner)
    )
    x = x.astype(self.dtype)
    names = ("batch", self.tokens)
    joined = beside is not None or not self.summed
    terms = axes.parts(self.split) if joined else 1
    multiply = functools.partial(
      products.product, x, names=names, contract=self.contract, terms=terms
    )
    y = multiply(kernel, called="/".join((*self.path, "kernel")))
    if self.has_variable("params", FACTORS[0]):
      a: jax.Array = self.get_variable("params", FACTORS[0])
      b: jax.Array = self.get_variable("params", FACTORS[1])
      y = y + _low_rank(multiply, a, b, names, inner)
    if beside is not None:
      y = y + beside
    if not self.summed:
      return y
    y = products.total(y)
    if self.bias:
      bias = self.param("bias", zeros, self.features)
      # Its gradient is summed over tokens before it is rounded.
      y = y + jnp.broadcast_to(bias, y.shape).astype(self.dtype)
    return y


def _low_rank(
  multiply: collections.abc.Callable[[jax.Array], jax.Array],
  a: jax.Array,
  b: jax.Array,
  names: tuple[str | None, ...],
  inner: tuple[int, ...],
) -> jax.Array:
  """Returns x a b; where a leads with parts, the product with each of them."""

  def through(a, b):
    terms = multiply(a)
    each = [products.product(u, b, names=names)[0] for u in terms]
    return jnp.stack(each)

  if a.ndim == len(inner) + 1:
    return through(a, b)
  lead = multiply(a[0]).ndim - 1
  return jax.vmap(through, out_axes=lead)(a, b)


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


class ModulatedNorm(nn.Module):
  """Normalises tokens, by `kind`, and then scales and shifts them by c.

  "layernorm" has no parameters of its own; "rmsnorm" has a scale, which comes
  before the modulation (LightningDiT, arXiv:2501.01423).
  """

  kind: str = "layernorm"
  epsilon: float = 1e-6

  @nn.compact
  def __call__(
    self, x_BTD: jax.Array, shift_BD: jax.Array, scale_BD: jax.Array
  ) -> jax.Array:
    if self.kind == "layernorm":
      return modulated_norm(x_BTD, shift_BD, scale_BD, self.epsilon)
    weight_D = self.param("scale", nn.initializers.ones, x_BTD.shape[-1:])
    return _modulated_rms_norm(
      x_BTD, weight_D, shift_BD, scale_BD, self.epsilon
    )


def modulated_norm(
  x_BTD: jax.Array,
  shift_BD: jax.Array,
  scale_BD: jax.Array,
  epsilon: float = 1e-6,
) -> jax.Array:
  """Returns (1 + scale) LayerNorm(x) + shift, computed in float32.

  The norm has no parameters of its own, and epsilon 1e-6
  (arXiv:2212.09748, section 3.2).
  """
  return _modulated_layer_norm(x_BTD, shift_BD, scale_BD, epsilon)


@functools.partial(recomputed, static_argnums=3)
def _modulated_layer_norm(x_BTD, shift_BD, scale_BD, epsilon):
  x = x_BTD.astype(jnp.float32)
  centred = x - jnp.mean(x, axis=-1, keepdims=True)
  variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
  normed = centred * jax.lax.rsqrt(variance + epsilon)
  return _modulated(normed, shift_BD, scale_BD).astype(x_BTD.dtype)


@functools.partial(recomputed, static_argnums=4)
def _modulated_rms_norm(x_BTD, weight_D, shift_BD, scale_BD, epsilon):
  x = x_BTD.astype(jnp.float32)
  mean_square = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
  normed = x * jax.lax.rsqrt(mean_square + epsilon)
  normed = normed * jnp.broadcast_to(weight_D, x.shape)
  return _modulated(normed, shift_BD, scale_BD).astype(x_BTD.dtype)


def _modulated(x_BTD, shift_BD, scale_BD):
  shift_B1D = shift_BD.astype(jnp.float32)[:, None]
  scale_B1D = scale_BD.astype(jnp.float32)[:, None]
  return x_BTD * (1.0 + scale_B1D) + shift_B1D


@recomputed
def add_gated(
  x_BTD: jax.Array, gate_BD: jax.Array, y_BTD: jax.Array
) -> jax.Array:
  """Returns x + gate y, computed in float32."""
  gate_B1D = gate_BD.astype(jnp.float32)[:, None]
  sum_BTD = x_BTD.astype(jnp.float32) + gate_B1D * y_BTD.astype(jnp.float32)
  return sum_BTD.astype(x_BTD.dtype)


def sinusoid(
  t_B: jax.Array, size: int, frequency_shift: float = 0.0
) -> jax.Array:
  """Returns [cos(t w), sin(t w)], in float32.

  w_i = 10000^(-i / (size/2 - frequency_shift)). Without the shift these are
  the frequencies of the original DiT; with 1 the last is 1 / 10000, as in
  diffusers' DiT.
  """
  half = size // 2
  # Constants, rounded where PyTorch's float32 rounds them: at t = 1000 another
  # last bit of a frequency is a thousandfold in the output.
  exponent_F = np.float32(-math.log(10000.0)) * np.arange(half, dtype="f4")
  exponent_F = (exponent_F / np.float32(half - frequency_shift)).astype(
    np.float64
  )
  frequency_F = np.exp(exponent_F).astype(np.float32)
  angle_BF = t_B.astype(jnp.float32)[:, None] * frequency_F[None]
  return jnp.concatenate([jnp.cos(angle_BF), jnp.sin(angle_BF)], axis=-1)


class TimeEmbed(nn.Module):
  """Embeds a time by an MLP over its sinusoid, in float32."""

  width: int
  frequency_shift: float = 0.0

  @nn.compact
  def __call__(self, t_B: jax.Array) -> jax.Array:
    dense = functools.partial(Dense, (self.width,), init_kernel=normal)
    waves_BF = sinusoid(t_B, TIME_FREQUENCIES, self.frequency_shift)
    hidden_BD = dense(name="in")(waves_BF)
    return dense(name="out")(nn.silu(hidden_BD))


class Table(nn.Module):
  """Holds one learned row of the given width for each of `rows` things."""

  rows: int
  width: int

  @nn.compact
  def __call__(self) -> jax.Array:
    return self.param("embedding", normal, (self.rows, self.width))
