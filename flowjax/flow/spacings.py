"""Ways to place `count` numbers from `first` down to `last`, in float64.

Each is written in the order of operations in which diffusers has it, so that
grids made of them can be the same to the bit.
"""

import math
from collections.abc import Callable

import numpy as np

# Far more than the continued fraction needs for exponents up to 1000.
_TERMS = 200
# At this logit float32 has nothing between t and 0.
LOGIT_END = 85.0

Spacing = Callable[[float, float, int], np.ndarray]


def karras(
  first: float, last: float, count: int, rho: float = 7.0
) -> np.ndarray:
  """Returns numbers whose rho-th roots are equidistant (arXiv:2206.00364)."""
  ramp = np.linspace(0.0, 1.0, count)
  start, end = first ** (1.0 / rho), last ** (1.0 / rho)
  return (start + ramp * (end - start)) ** rho


def exponential(first: float, last: float, count: int) -> np.ndarray:
  """Returns numbers whose logarithms are equidistant."""
  return np.exp(np.linspace(math.log(first), math.log(last), count))


def beta(
  first: float, last: float, count: int, a: float = 0.6, b: float = 0.6
) -> np.ndarray:
  """Returns the quantiles of a Beta law between them (arXiv:2407.12173)."""
  quantiles = beta_quantile(1.0 - np.linspace(0.0, 1.0, count), a, b)
  return last + quantiles * (first - last)


# Spacings by name, with their usual parameters.
SPACINGS: dict[str, Spacing] = {
  "karras": karras,
  "exponential": exponential,
  "beta": beta,
}


def beta_quantile(p: np.ndarray, a: float, b: float) -> np.ndarray:
  """Returns the quantiles of the law Beta(a, b)."""
  p = np.asarray(p, np.float64)
  quantile = _logistic(beta_quantile_logit(p, a, b))
  if a == b:
    # The median is 1/2. SciPy's at 0.6, and so diffusers', is one unit above,
    # which decides ties when sigmas are rounded to float32.
    quantile = np.where(p == 0.5, np.nextafter(0.5, 1.0), quantile)
  return np.where(p <= 0.0, 0.0, np.where(p >= 1.0, 1.0, quantile))


def beta_quantile_logit(p: np.ndarray, a: float, b: float) -> np.ndarray:
  """Returns the logits of the quantiles of Beta(a, b), by bisection."""
  low, high = np.full_like(p, -LOGIT_END), np.full_like(p, LOGIT_END)
  for _ in range(64):
    middle = 0.5 * (low + high)
    below = _incomplete_beta(middle, a, b) < p
    low, high = np.where(below, middle, low), np.where(below, high, middle)
  return 0.5 * (low + high)


def _logistic(logit: np.ndarray) -> np.ndarray:
  return 1.0 / (1.0 + np.exp(-logit))


def _incomplete_beta(logit: np.ndarray, a: float, b: float) -> np.ndarray:
  """Returns the probability of [0, x] under Beta(a, b), logit being x's.

  By the continued fraction of DLMF 8.17.22, on the side of the mean on which it
  converges fast; the convergents by Lentz's method.
  """
  swapped = _logistic(logit) > (a + 1.0) / (a + b + 2.0)
  signed = np.where(swapped, -logit, logit)
  x, rest = _logistic(signed), _logistic(-signed)
  near, far = np.where(swapped, b, a), np.where(swapped, a, b)
  log_norm = math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)
  scale = np.exp(near * np.log(x) + far * np.log(rest) - log_norm) / near

  fraction, top, bottom = np.ones_like(x), np.ones_like(x), np.zeros_like(x)
  for i in range(_TERMS):
    m = i // 2
    if i == 0:
      term = np.ones_like(x)
    elif i % 2:
      term = -(near + m) * (near + far + m) / (near + 2 * m + 1)
      term = term * x / (near + 2 * m)
    else:
      term = m * (far - m) * x / ((near + 2 * m - 1) * (near + 2 * m))
    bottom = 1.0 / (1.0 + term * bottom)
    top = 1.0 + term / top
    factor = top * bottom
    fraction = fraction * factor
    if np.all(np.abs(factor - 1.0) < 1e-15):
      break
  below = scale * (fraction - 1.0)
  return np.where(swapped, 1.0 - below, below)
