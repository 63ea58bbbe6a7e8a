"""The variance of a step back, learned, and the bound that teaches it.

On a table of N steps the network learns p(x_{i-1} | x_i) to be like the step
that leads back to a known x, the normal distribution

  q(x_{i-1} | x_i, x) = N(a_i x + b_i x_i, beta~_i)    (arXiv:2006.11239, eq. 6)

with the mean at its own estimate of x, and a variance between beta~_i and
beta_i, the two that are right for data without and with all entropy:

  log variance = f log beta_i + (1 - f) log beta~_i,   f = (v + 1) / 2

(arXiv:2102.09672, eq. 15). Everything here is in float32, from tables that are
computed in float64. That is for training; `solvers.ancestral` takes the steps,
which may be longer than those of the table.
"""

# Shape suffixes: B batch, N steps of the table; the first, i = 0, leads to
# data. Images have any shape that starts with B.

import dataclasses
import math

import jax
import jax.numpy as jnp
import jax.scipy.special
import numpy as np

from flowjax.flow import paths


@dataclasses.dataclass(frozen=True)
class Posterior:
  """q(x_{i-1} | x_i, x) for every i, as numpy constants."""

  data_N: np.ndarray  # a_i
  noisy_N: np.ndarray  # b_i
  log_large_N: np.ndarray  # log beta_i
  log_small_N: np.ndarray  # log beta~_i; that of i = 1 for i = 0, where it is 0

  @property
  def steps(self) -> int:
    """The number of steps, N."""
    return len(self.data_N)

  def index(self, t: jax.Array) -> jax.Array:
    """Returns the step at `t`, rounded up to an entry of the table."""
    # The small number undoes the rounding of (i + 1) / N itself.
    i = jnp.ceil(t * self.steps - 1e-3).astype(jnp.int32) - 1
    return jnp.clip(i, 0, self.steps - 1)

  def time(self, i: jax.Array) -> jax.Array:
    """Returns t of step i."""
    return (i + 1).astype(jnp.float32) / self.steps

  def mean(self, x: jax.Array, x_t: jax.Array, i: jax.Array) -> jax.Array:
    """Returns the mean of x_{i-1} given x_t = x_i and x."""
    return _of(self.data_N, i, x) * x + _of(self.noisy_N, i, x) * x_t

  def log_variance(self, v: jax.Array, i: jax.Array) -> jax.Array:
    """Returns the logarithm of the variance that v in [-1, 1] chooses."""
    v = paths.wide(v)
    return between(v, _of(self.log_small_N, i, v), _of(self.log_large_N, i, v))

  def bits(
    self,
    x: jax.Array,
    x_t: jax.Array,
    i_B: jax.Array,
    data: jax.Array,
    v: jax.Array,
  ) -> jax.Array:
    """Returns L_i of each example in bits per dimension, `data` estimating x.

    KL(q(x_{i-1} | x_i, x) || p), and for i = 0 -log p(x | x_0) of 8-bit numbers
    in [-1, 1] (arXiv:2006.11239, eqs. 5 and 13).
    """
    mean, log_variance = self.mean(data, x_t, i_B), self.log_variance(v, i_B)
    kl = _divergence(
      self.mean(x, x_t, i_B), _of(self.log_small_N, i_B, x), mean, log_variance
    )
    nats = jnp.where(
      paths.over(i_B == 0, x), -log_likelihood(x, mean, log_variance), kl
    )
    return jnp.mean(nats, axis=tuple(range(1, x.ndim))) / math.log(2.0)


def posterior(path: paths.Path) -> Posterior:
  """Computes the tables of a path that was made of one."""
  if path.steps is None:
    raise ValueError(
      f"A learned variance is that of discrete steps, which the path "
      f"{path.name!r} does not have; 'ddpm', 'scaled_linear' and 'cosine' with "
      "steps=... do."
    )
  with jax.ensure_compile_time_eval(), jax.enable_x64(True):
    t_N = np.arange(1, path.steps + 1) / path.steps
    log_snr_N = np.asarray(path.log_snr(jnp.asarray(t_N)))
  after_N = 1.0 / (1.0 + np.exp(-log_snr_N))  # alpha_bar_i
  before_N = np.concatenate([[1.0], after_N[:-1]])
  beta_N = 1.0 - after_N / before_N
  small_N = beta_N * (1.0 - before_N) / (1.0 - after_N)
  small_N[0] = small_N[1]
  tables = (
    beta_N * np.sqrt(before_N) / (1.0 - after_N),
    (1.0 - before_N) * np.sqrt(1.0 - beta_N) / (1.0 - after_N),
    np.log(beta_N),
    np.log(small_N),
  )
  return Posterior(*(table_N.astype(np.float32) for table_N in tables))


def between(
  v: jax.Array, log_small: jax.Array, log_large: jax.Array
) -> jax.Array:
  """Returns the logarithm of a variance, from that for v = -1 to v = 1."""
  return log_small + 0.5 * (v + 1.0) * (log_large - log_small)


def split(both: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Splits a network's channels into its prediction and v."""
  if both.shape != (*x.shape[:-1], 2 * x.shape[-1]):
    raise ValueError(
      f"A network that learns its variance returns twice the channels of "
      f"{x.shape}, not {both.shape}: the prediction, then the variance."
    )
  value, v = jnp.split(both, 2, axis=-1)
  return value, v


def apart(predict):
  """Returns `predict` as (prediction, v), which are halves of its channels."""

  def both(params, x_t, t_B, cond, rng):
    return split(predict(params, x_t, t_B, cond, rng), x_t)

  return both


def predicted(predict):
  """Returns `predict` without the variance: the first half of its channels."""

  def first(*inputs):
    value, _ = apart(predict)(*inputs)
    return value

  return first


def log_likelihood(
  x: jax.Array, mean: jax.Array, log_variance: jax.Array
) -> jax.Array:
  """Returns log P of 8-bit numbers x in [-1, 1] under a normal distribution.

  The mass within 1/255 of x; the darkest and the brightest have all beyond.
  """
  inverse_std = jnp.exp(-0.5 * log_variance)
  low = jnp.where(x < -0.999, -jnp.inf, (x - mean - 1.0 / 255.0) * inverse_std)
  high = jnp.where(x > 0.999, jnp.inf, (x - mean + 1.0 / 255.0) * inverse_std)
  return _log_mass(low, high)


def _log_mass(low: jax.Array, high: jax.Array) -> jax.Array:
  """Returns log(Phi(high) - Phi(low)), also far out in either tail."""
  # By symmetry in the lower tail, where the logarithms of both are exact.
  flip = low + high > 0.0
  low, high = jnp.where(flip, -high, low), jnp.where(flip, -low, high)
  log_high = jax.scipy.special.log_ndtr(high)
  # -inf is kept from what is differentiated.
  ends = jnp.isinf(low)
  log_low = jax.scipy.special.log_ndtr(jnp.where(ends, high - 1.0, low))
  ratio = jnp.exp(jnp.minimum(log_low - log_high, -1e-6))
  return log_high + jnp.log1p(-jnp.where(ends, 0.0, ratio))


def _divergence(mean_q, log_q, mean_p, log_p) -> jax.Array:
  """Returns KL(q || p) of normals, in nats; logarithms of their variances."""
  gap = jnp.square(mean_q - mean_p) * jnp.exp(-log_p)
  return 0.5 * (log_p - log_q + jnp.exp(log_q - log_p) + gap - 1.0)


def _of(table_N: np.ndarray, i: jax.Array, x: jax.Array) -> jax.Array:
  return paths.over(jnp.asarray(table_N)[i], x)
