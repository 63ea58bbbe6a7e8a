"""Paths from data to noise: x_t = alpha(t) x + sigma(t) eps.

t = 0 is data and t = 1 is noise, here and everywhere. A new path is a new
`Path`: a few functions of t, and nothing else has to learn of it.
"""

# Shape suffixes: B batch, N entries of a table.

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from flowjax.flow import affine, names, schedules

Path = affine.Path
Coefficients = affine.Coefficients
over = affine.over
wide = affine.wide
narrowed = affine.narrowed
table = schedules.table
ddpm = schedules.ddpm
scaled_linear = schedules.scaled_linear


def build(
  name: str,
  *,
  low: float | None = None,
  high: float | None = None,
  **options: Any,
) -> Path:
  """Builds the path `name` of `PATHS` with the options that it takes.

  `low` and `high` keep training and sampling further from its ends. Raises
  ValueError for an unknown name or option, or a value out of range.
  """
  factory = names.choose("path", PATHS, name, options)
  return narrowed(factory(**options), low=low, high=high)


def straight(sigma_min: float = 0.0) -> Path:
  """Builds x_t = (1 - t) x + t eps, whose velocity eps - x is constant in t.

  Rectified flow (arXiv:2209.03003), in the direction of SD3 (arXiv:2403.03206,
  section 3). With `sigma_min`, sigma = sigma_min + (1 - sigma_min) t: the
  optimal-transport path of flow matching (arXiv:2210.02747, eq. 20), which ends
  in data that keeps a little noise.
  """
  affine.check(
    0.0 <= sigma_min < 1.0,
    f"sigma_min is the noise left in the data: in [0, 1), not {sigma_min}; "
    "0 is rectified flow's.",
  )
  rise = 1.0 - sigma_min

  def inverse(log_snr):
    # sigma / alpha = exp(-log_snr / 2), solved for t by whichever of it and its
    # inverse cannot overflow.
    small = jnp.exp(0.5 * jnp.where(log_snr > 0.0, -log_snr, log_snr))
    of_data = (small - sigma_min) / (small + rise)
    of_noise = (1.0 - sigma_min * small) / (1.0 + rise * small)
    return jnp.where(log_snr > 0.0, of_data, of_noise)

  return affine.build(
    "straight",
    alpha=lambda t: 1.0 - t,
    sigma=lambda t: sigma_min + rise * t,
    alpha_dot=lambda t: -jnp.ones_like(t),
    sigma_dot=lambda t: jnp.full_like(t, rise),
    log_snr=lambda t: 2.0 * (jnp.log1p(-t) - jnp.log(sigma_min + rise * t)),
    log_snr_inverse=inverse,
  )


def polynomial(power: float = 2.0) -> Path:
  """Builds alpha = (1 - t)^n, sigma = 1 - alpha, which stops softly in noise.

  The convex polynomial schedule of arXiv:2412.06264; n = 1 is the straight
  path. For n > 1 its velocity at t = 1 is 0.
  """
  affine.check(
    1.0 <= power < math.inf,
    f"The power of a polynomial path must be at least 1, not {power}: below, "
    "its velocity at t = 1 is infinite. 1 is the straight path.",
  )

  def sigma(t):
    # The logarithm never meets 0, so that the derivative at t = 1 is finite.
    rest = jnp.where(t < 1.0, t, 0.0)
    return jnp.where(t < 1.0, -jnp.expm1(power * jnp.log1p(-rest)), 1.0)

  def slope(t):
    # Nor does the base of the power, whose own derivative may be infinite.
    rest = jnp.where(t < 1.0, 1.0 - t, 1.0)
    end = 1.0 if power == 1.0 else 0.0
    return jnp.where(t < 1.0, power * rest ** (power - 1.0), end)

  return affine.build(
    "polynomial",
    alpha=lambda t: (1.0 - t) ** power,
    sigma=sigma,
    alpha_dot=lambda t: -slope(t),
    sigma_dot=slope,
    log_snr=lambda t: 2.0 * (power * jnp.log1p(-t) - jnp.log(sigma(t))),
    log_snr_inverse=lambda log_snr: (
      -jnp.expm1(jax.nn.log_sigmoid(0.5 * log_snr) / power)
    ),
  )


def gvp() -> Path:
  """Builds alpha = cos(pi t / 2), sigma = sin(pi t / 2).

  The generalised variance-preserving path of SiT (arXiv:2401.08740): a quarter
  circle at constant speed.
  """
  turn = math.pi / 2.0

  def alpha(t):
    return jnp.sin(turn * (1.0 - t))  # Exactly 0 at t = 1, as cos is not.

  def sigma(t):
    return jnp.sin(turn * t)

  def inverse(log_snr):
    cosine, sine = affine.circle(log_snr)
    return jnp.arctan2(sine, cosine) / turn

  return affine.build(
    "gvp",
    alpha=alpha,
    sigma=sigma,
    alpha_dot=lambda t: -turn * sigma(t),
    sigma_dot=lambda t: turn * alpha(t),
    log_snr=lambda t: 2.0 * (jnp.log(alpha(t)) - jnp.log(sigma(t))),
    log_snr_inverse=inverse,
  )


def vp(beta_min: float = 0.1, beta_max: float = 20.0) -> Path:
  """Builds alpha = exp(-B / 2), sigma^2 = 1 - exp(-B), B the integral of beta.

  beta(t) = beta_min + t (beta_max - beta_min): the variance-preserving SDE
  (arXiv:2011.13456, eq. 33). sigma grows as sqrt(t), so its derivative at 0 is
  infinite: `low` is 1e-5, the paper's, where sigma is 1e-3.
  """
  beta, total, total_inverse = _linear_beta(beta_min, beta_max)

  def alpha(t):
    return jnp.exp(-0.5 * total(t))

  def sigma(t):
    return affine.root(-jnp.expm1(-total(t)))

  return affine.build(
    "vp",
    alpha=alpha,
    sigma=sigma,
    alpha_dot=lambda t: -0.5 * beta(t) * alpha(t),
    sigma_dot=lambda t: 0.5 * beta(t) * jnp.exp(-total(t)) / sigma(t),
    log_snr=lambda t: -jnp.log(jnp.expm1(total(t))),
    log_snr_inverse=lambda log_snr: total_inverse(jax.nn.softplus(-log_snr)),
    low=1e-5,
  )


def sub_vp(beta_min: float = 0.1, beta_max: float = 20.0) -> Path:
  """Builds alpha = exp(-B / 2), sigma = 1 - exp(-B), B the integral of beta.

  The sub-VP SDE (arXiv:2011.13456, eq. 29): less noise than `vp` at every t.
  """
  beta, total, total_inverse = _linear_beta(beta_min, beta_max)

  def alpha(t):
    return jnp.exp(-0.5 * total(t))

  def sigma(t):
    return -jnp.expm1(-total(t))

  def inverse(log_snr):
    # (1 - sigma) / sigma^2 = exp(log_snr), solved for sigma, then for B by
    # whichever of sigma and 1 - sigma is small.
    sigma = 2.0 / (1.0 + jnp.sqrt(1.0 + 4.0 * jnp.exp(log_snr)))
    of_data = -jnp.log1p(-jnp.where(log_snr > 0.0, sigma, 0.5))
    of_noise = -(log_snr + 2.0 * jnp.log(jnp.where(log_snr > 0.0, 0.5, sigma)))
    return total_inverse(jnp.where(log_snr > 0.0, of_data, of_noise))

  return affine.build(
    "sub_vp",
    alpha=alpha,
    sigma=sigma,
    alpha_dot=lambda t: -0.5 * beta(t) * alpha(t),
    sigma_dot=lambda t: beta(t) * jnp.exp(-total(t)),
    log_snr=lambda t: -total(t) - 2.0 * jnp.log(sigma(t)),
    log_snr_inverse=inverse,
  )


def cosine(s: float = 0.008, steps: int | None = None) -> Path:
  """Builds alpha proportional to cos((t + s) / (1 + s) pi / 2), sigma to match.

  iDDPM's schedule (arXiv:2102.09672, eq. 17), alpha^2 + sigma^2 = 1: continuous
  down to alpha = 0 at t = 1, or with `steps` the table of its betas, which are
  capped at 0.999. sigma grows as sqrt(t) at 0, so `low` is 1e-5 as for `vp`.
  """
  affine.check(
    s > 0.0, f"The offset s must be above 0, not {s}; 0.008 is iDDPM's."
  )
  if steps is not None:
    beta_N = schedules.cosine_betas(steps, s)
    return table(schedules.alpha_bar(beta_N), "cosine")
  turn = math.pi / 2.0 / (1.0 + s)
  start = turn * s
  # With theta = start + turn t, the cosine is written as the sine of the rest
  # of the right angle, exactly 0 at t = 1, and sigma^2 by
  # sin^2 a - sin^2 b = sin(a - b) sin(a + b), which loses nothing at t = 0.
  first = math.cos(start)

  def alpha(t):
    return jnp.sin(turn * (1.0 - t)) / first

  def square(t):
    return jnp.sin(turn * t) * jnp.sin(turn * t + 2.0 * start) / first**2

  def sine(t):
    return jnp.sin(turn * t + start) / first

  def inverse(log_snr):
    # tan((a - b) / 2) = (sin a - sin b) / (cos a + cos b).
    cosine, sine = affine.circle(log_snr)
    square = (first * sine) ** 2
    top = jnp.sqrt(square + math.sin(start) ** 2) + math.sin(start)
    return 2.0 * jnp.arctan2(square, top * first * (cosine + 1.0)) / turn

  return affine.build(
    "cosine",
    alpha=alpha,
    sigma=lambda t: affine.root(square(t)),
    alpha_dot=lambda t: -turn * sine(t),
    sigma_dot=lambda t: turn * sine(t) * alpha(t) / affine.root(square(t)),
    log_snr=lambda t: 2.0 * jnp.log(alpha(t)) - jnp.log(square(t)),
    log_snr_inverse=inverse,
    low=1e-5,
  )


def ve(sigma_min: float = 0.01, sigma_max: float = 50.0) -> Path:
  """Builds alpha = 1, sigma = sigma_min (sigma_max / sigma_min)^t.

  The variance-exploding SDE (arXiv:2011.13456, eq. 31). Its data, at t = 0,
  keeps noise of sigma_min.
  """
  _check_sigmas(sigma_min, sigma_max)
  first, rise = math.log(sigma_min), math.log(sigma_max / sigma_min)

  def sigma(t):
    return jnp.exp(first + rise * t)

  return affine.build(
    "ve",
    alpha=jnp.ones_like,
    sigma=sigma,
    alpha_dot=jnp.zeros_like,
    sigma_dot=lambda t: rise * sigma(t),
    log_snr=lambda t: -2.0 * (first + rise * t),
    log_snr_inverse=lambda log_snr: (-0.5 * log_snr - first) / rise,
  )


def edm(
  sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0
) -> Path:
  """Builds alpha = 1, sigma^(1 / rho) linear from sigma_min to sigma_max.

  EDM (arXiv:2206.00364): equidistant t are the sigmas of its eq. 5. Its data,
  at t = 0, keeps noise of sigma_min.
  """
  _check_sigmas(sigma_min, sigma_max)
  affine.check(
    1.0 <= rho < math.inf, f"rho must be at least 1, not {rho}; 7 is EDM's."
  )
  first = sigma_min ** (1.0 / rho)
  rise = sigma_max ** (1.0 / rho) - first

  def log_sigma(t):
    return rho * jnp.log(first + rise * t)

  return affine.build(
    "edm",
    alpha=jnp.ones_like,
    sigma=lambda t: jnp.exp(log_sigma(t)),
    alpha_dot=jnp.zeros_like,
    sigma_dot=lambda t: rho * rise * jnp.exp(log_sigma(t)) / (first + rise * t),
    log_snr=lambda t: -2.0 * log_sigma(t),
    log_snr_inverse=lambda log_snr: (
      (jnp.exp(-0.5 * log_snr / rho) - first) / rise
    ),
  )


# Factories of paths, by the name that a config gives them.
PATHS: dict[str, Callable[..., Path]] = {
  "straight": straight,
  "polynomial": polynomial,
  "gvp": gvp,
  "vp": vp,
  "sub_vp": sub_vp,
  "cosine": cosine,
  "ddpm": ddpm,
  "scaled_linear": scaled_linear,
  "ve": ve,
  "edm": edm,
}


def _linear_beta(
  beta_min: float, beta_max: float
) -> tuple[affine.Schedule, affine.Schedule, affine.Schedule]:
  """Returns beta(t), its integral B from 0 to t, and t of B."""
  affine.check(
    0.0 < beta_min <= beta_max < math.inf,
    "The rate beta of a diffusion must be above 0 and not fall: not from "
    f"{beta_min} to {beta_max}; 0.1 and 20 are usual.",
  )
  rise = beta_max - beta_min
  end = beta_min + 0.5 * rise

  def inverse(total):
    total = affine.clip(total, 0.0, end)
    root = jnp.sqrt(beta_min**2 + 2.0 * rise * total)
    return 2.0 * total / (beta_min + root)

  return (
    lambda t: beta_min + rise * t,
    lambda t: t * (beta_min + 0.5 * rise * t),
    inverse,
  )


def _check_sigmas(sigma_min: float, sigma_max: float) -> None:
  affine.check(
    0.0 < sigma_min < sigma_max < math.inf,
    "Noise must grow from above 0: not from sigma_min = "
    f"{sigma_min} to sigma_max = {sigma_max}.",
  )
