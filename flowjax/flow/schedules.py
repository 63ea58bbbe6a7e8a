"""Discrete noise schedules: the tables that diffusion models are trained with.

A table is alpha_bar_i = prod_{j <= i} (1 - beta_j), the squared alpha of a
variance-preserving path, from the least noise (i = 0) to the most. Computed on
the host in float64; `table` makes a path of it.
"""

# Shape suffixes: N entries of the table.

import math

import jax.numpy as jnp
import numpy as np

from flowjax.flow import affine


def linear_betas(steps: int, beta_start: float, beta_end: float) -> np.ndarray:
  """Returns betas that rise linearly (DDPM, arXiv:2006.11239, section 4)."""
  _check(steps, beta_start, beta_end)
  return np.linspace(beta_start, beta_end, steps)


def scaled_linear_betas(
  steps: int, beta_start: float, beta_end: float
) -> np.ndarray:
  """Returns betas whose square roots rise linearly (arXiv:2112.10752, LDM)."""
  _check(steps, beta_start, beta_end)
  return np.linspace(beta_start**0.5, beta_end**0.5, steps) ** 2


def cosine_betas(steps: int, s: float, max_beta: float = 0.999) -> np.ndarray:
  """Returns betas whose alpha_bar follows cos^2((t + s) / (1 + s) pi / 2).

  beta_i = 1 - alpha_bar((i + 1) / N) / alpha_bar(i / N), at most `max_beta`
  (iDDPM, arXiv:2102.09672, eq. 17).
  """
  _check(steps, 0.0, max_beta)
  t_N = np.arange(steps + 1) / steps
  alpha_bar_N = np.cos((t_N + s) / (1.0 + s) * np.pi / 2.0) ** 2
  return np.minimum(1.0 - alpha_bar_N[1:] / alpha_bar_N[:-1], max_beta)


def alpha_bar(
  beta_N: np.ndarray, *, zero_terminal_snr: bool = False
) -> np.ndarray:
  """Returns the table of the betas, its last entry moved to 0 if asked for.

  Zero terminal SNR (arXiv:2305.08891, algorithm 1): sqrt(alpha_bar) is shifted
  and scaled, so that its first entry stays and its last becomes exactly 0.
  """
  table_N = np.cumprod(1.0 - np.asarray(beta_N, np.float64))
  if not zero_terminal_snr:
    return table_N
  root_N = np.sqrt(table_N)
  scale = root_N[0] / (root_N[0] - root_N[-1])
  return np.square((root_N - root_N[-1]) * scale)


def ddpm(
  steps: int = 1000,
  beta_start: float = 1e-4,
  beta_end: float = 2e-2,
  zero_terminal_snr: bool = False,
) -> affine.Path:
  """Builds the table of DDPM, whose betas rise linearly (arXiv:2006.11239)."""
  beta_N = linear_betas(steps, beta_start, beta_end)
  alpha_bar_N = alpha_bar(beta_N, zero_terminal_snr=zero_terminal_snr)
  return table(alpha_bar_N, "ddpm")


def scaled_linear(
  steps: int = 1000,
  beta_start: float = 0.00085,
  beta_end: float = 0.012,
  zero_terminal_snr: bool = False,
) -> affine.Path:
  """Builds the table of latent diffusion and Stable Diffusion 1 and 2.

  The square roots of its betas rise linearly (arXiv:2112.10752).
  """
  beta_N = scaled_linear_betas(steps, beta_start, beta_end)
  alpha_bar_N = alpha_bar(beta_N, zero_terminal_snr=zero_terminal_snr)
  return table(alpha_bar_N, "scaled_linear")


def table(alpha_bar: np.ndarray, name: str = "table") -> affine.Path:
  """Builds the path through alpha_bar_i = alpha^2 at t = (i + 1) / N, i from 0.

  alpha^2 + sigma^2 = 1. Between the entries lambda is linear in t. Before the
  first sigma is, up from 0, and before a last entry of 0 (zero terminal SNR)
  alpha is: so both ends are reached, with finite derivatives.
  """
  alpha_bar_N = np.asarray(alpha_bar, np.float64)
  finite_N = alpha_bar_N[alpha_bar_N > 0.0]
  affine.check(
    alpha_bar_N.ndim == 1
    and len(finite_N) >= 2
    and bool(np.all(np.diff(alpha_bar_N) < 0.0))
    and alpha_bar_N[0] < 1.0
    and 0.0 <= alpha_bar_N[-1],
    "A table of alpha_bar holds at least 2 numbers that fall within (0, 1), "
    f"after which there may be one 0; not {alpha_bar!r}.",
  )
  count, last = len(alpha_bar_N), len(finite_N)
  lambda_N = np.log(finite_N) - np.log1p(-finite_N)
  # In float64 too: the entries are closer than float32 tells apart.
  slope_N = count * np.diff(lambda_N)
  # What is read of an entry at once: its place, lambda, and the slope after it.
  entry_3N = np.stack([np.arange(last - 1.0), lambda_N[:-1], slope_N])
  sigma_rise = count * math.sqrt(1.0 - finite_N[0])
  alpha_fall = count * math.sqrt(finite_N[-1])

  def choose(t, first, middle, rest):
    return jnp.where(
      t < 1.0 / count, first, jnp.where(t > last / count, rest, middle)
    )

  def linear(t):
    """Returns lambda between two entries, and its slope."""
    place = t * count - 1.0
    i = jnp.clip(place, 0.0, last - 2.0).astype(jnp.int32)
    # Not `place - i`: compiled twice, with and without a fused multiply-add,
    # the places would differ, and near an entry so would their whole parts.
    start, level, slope = jnp.asarray(entry_3N, t.dtype)[:, i]
    return level + (place - start) * slope / count, slope

  def first_sigma(t):
    return sigma_rise * jnp.where(t < 1.0 / count, t, 1.0 / count)

  def last_alpha(t):
    return alpha_fall * (1.0 - jnp.where(t > last / count, t, last / count))

  def alpha(t):
    middle, _ = affine.circle(linear(t)[0])
    return choose(t, affine.other_leg(first_sigma(t)), middle, last_alpha(t))

  def sigma(t):
    _, middle = affine.circle(linear(t)[0])
    return choose(t, first_sigma(t), middle, affine.other_leg(last_alpha(t)))

  def alpha_dot(t):
    level, slope = linear(t)
    alpha, sigma = affine.circle(level)
    small = first_sigma(t)
    return choose(
      t,
      -sigma_rise * small / affine.other_leg(small),
      0.5 * slope * alpha * sigma**2,
      -alpha_fall,
    )

  def sigma_dot(t):
    level, slope = linear(t)
    alpha, sigma = affine.circle(level)
    small = last_alpha(t)
    return choose(
      t,
      sigma_rise,
      -0.5 * slope * alpha**2 * sigma,
      alpha_fall * small / affine.other_leg(small),
    )

  def log_snr(t):
    small, rest = first_sigma(t), last_alpha(t)
    first = jnp.log1p(-(small**2)) - 2.0 * jnp.log(small)
    # Where the table ends in a finite lambda, `rest` is 0 and is not chosen.
    rest = jnp.where(t > last / count, rest, 0.5)
    ending = 2.0 * jnp.log(rest) - jnp.log1p(-(rest**2))
    return choose(t, first, linear(t)[0], ending)

  def inverse(log_snr):
    nodes_N = jnp.asarray(lambda_N, log_snr.dtype)
    t_N = jnp.asarray((np.arange(last) + 1.0) / count, log_snr.dtype)
    middle = jnp.interp(-log_snr, -nodes_N, t_N)
    alpha, sigma = affine.circle(log_snr)
    ending = 1.0 - alpha / alpha_fall if last < count else 1.0
    return jnp.where(
      log_snr > nodes_N[0],
      sigma / sigma_rise,
      jnp.where(log_snr < nodes_N[-1], ending, middle),
    )

  return affine.build(
    name,
    alpha=alpha,
    sigma=sigma,
    alpha_dot=alpha_dot,
    sigma_dot=sigma_dot,
    log_snr=log_snr,
    log_snr_inverse=inverse,
    steps=count,
  )


def _check(steps: int, beta_start: float, beta_end: float) -> None:
  if steps < 2:
    raise ValueError(
      f"A table of betas needs at least 2 steps, not {steps}; 1000 is usual."
    )
  if not 0.0 <= beta_start < beta_end < 1.0:
    raise ValueError(
      "Betas are the shares of variance that each step replaces: they must "
      f"rise within (0, 1), not from {beta_start} to {beta_end}; DDPM's rise "
      "from 1e-4 to 2e-2."
    )
