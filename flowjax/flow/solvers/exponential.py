"""What the methods that integrate in log-SNR share.

In the clock l = log(alpha / sigma), half the log-SNR, the flow of a path is
linear but for the data prediction D (arXiv:2211.01095, proposition 4.1):

  x_t = sigma_t / sigma_s x_s + alpha_t int_{l_s}^{l_t} e^{l - l_t} D(l) dl

With h = l_t - l_s, the term (l - l_s)^k / k! of D contributes the factor
alpha_t h^{k+1} phi_{k+1}(-h), where

  phi_0(z) = e^z,   phi_{k+1}(z) = (phi_k(z) - 1 / k!) / z.

**At the ends.** l is infinite where alpha = 0 or sigma = 0, and a polynomial
in l has no meaning there. The first term has: alpha_t h phi_1(-h) is
alpha_t - alpha_s sigma_t / sigma_s. So a step to or from an end takes that term
alone, and later steps leave a prediction made at an end out of their
polynomials. A step up from sigma = 0, where x = alpha D and the noise expected
is 0, gives alpha_t D.

**Near the ends.** Where a path stops just short of one, as vp at t = 1e-5, the
last of equal steps in t is many times as long in l as the one before. A
polynomial through predictions close together says nothing that far away, so
such a step is of order 1 as well. With finer steps their lengths become alike,
and the order is what it was.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from flowjax.flow import paths
from flowjax.flow.solvers import linear

# The step to the path's end is of order 1 if it is longer, in l, than FAR, in
# which the noise falls by e, and than LEAP times the one before. Equal steps
# grow by less than 2 on the straight path, the last one to t = 1e-5 on vp or
# cosine by 7 or 8, and to t = 1e-3 by 4.
LEAP = 3.0
FAR = 1.0
# Times are float32.
ROUNDING = 1e-6


class Interval(NamedTuple):
  """A step from s to t: x_t = keep x_s + gain D where D is constant."""

  keep: jax.Array  # sigma_t / sigma_s
  gain: jax.Array  # alpha_t - alpha_s sigma_t / sigma_s
  decay: jax.Array  # e^{-h}
  alpha: jax.Array  # alpha_t
  sigma: jax.Array  # sigma_t
  clock: jax.Array  # l_s
  h: jax.Array  # l_t - l_s
  ends: jax.Array  # Whether t is the path's end at data.


def interval(
  path: paths.Path, t: jax.Array, t_next: jax.Array, dtype: Any
) -> Interval:
  """Returns what a step from t to t_next needs to know of the path."""
  s, t = jnp.asarray(t, dtype), jnp.asarray(t_next, dtype)
  alpha, sigma, sigma_s = path.alpha(t), path.sigma(t), path.sigma(s)
  keep = _ratio(sigma, sigma_s)
  kept = path.alpha(s) * keep
  clock = 0.5 * path.log_snr(s)
  h = 0.5 * path.log_snr(t) - clock
  gain, decay = alpha - kept, _ratio(kept, alpha)
  ends = t <= path.low + ROUNDING
  return Interval(keep, gain, decay, alpha, sigma, clock, h, ends)


def phis(z: jax.Array, count: int) -> list[jax.Array]:
  """Returns phi_1(z) ... phi_count(z), each to the last digits at every z.

  By the recursion in the module's docstring where |z| > 1. Below, where that
  would cancel, by the series of the last one, phi_k(z) = sum_i z^i / (k + i)!,
  and the recursion backwards.
  """
  small = jnp.abs(z) <= 1.0
  far, near = jnp.where(small, 2.0, z), jnp.where(small, z, 0.0)
  up = [jnp.expm1(far) / far]
  for k in range(1, count):
    up.append((up[-1] - 1.0 / math.factorial(k)) / far)
  series = jnp.zeros_like(near)
  for i in reversed(range(18)):
    series = series * near + 1.0 / math.factorial(count + i)
  down = [series]
  for k in reversed(range(1, count)):
    down.append(near * down[-1] + 1.0 / math.factorial(k))
  pairs = zip(reversed(down), up, strict=True)
  return [jnp.where(small, *pair) for pair in pairs]


def _ratio(a: jax.Array, b: jax.Array) -> jax.Array:
  """Returns a / b, and 0 where b is 0."""
  return jnp.where(b == 0.0, 0.0, a / jnp.where(b == 0.0, 1.0, b))


class History(NamedTuple):
  """Data predictions and the clocks at which they were made, newest first."""

  values: tuple[Any, ...]
  clocks: tuple[jax.Array, ...]

  def push(self, value: Any, clock: jax.Array) -> "History":
    """Returns the history with one more, and the oldest forgotten."""
    length = len(self.values)
    return History(
      (value, *self.values)[:length], (clock, *self.clocks)[:length]
    )

  def usable(self) -> jax.Array:
    """Returns how many of the newest have a finite clock."""
    finite = jnp.stack([jnp.isfinite(clock) for clock in self.clocks])
    return jnp.sum(jnp.cumprod(finite.astype(jnp.int32)))


def no_history(x: Any, length: int) -> History:
  """Returns a history of which nothing is usable."""
  nothing = jax.tree.map(jnp.zeros_like, x)
  never = jnp.full((), jnp.inf, linear.dtype(x))
  return History((nothing,) * length, (never,) * length)


def order(most: Any, over: Interval, history: History) -> jax.Array:
  """Returns the order of this step: `most`, or what ends and history allow."""
  behind = over.clock - history.clocks[0]
  leaps = jnp.abs(over.h) > jnp.maximum(FAR, LEAP * jnp.abs(behind))
  known = jnp.isfinite(over.h) & ~(over.ends & leaps)
  return jnp.where(known, jnp.minimum(most, 1 + history.usable()), 1)
