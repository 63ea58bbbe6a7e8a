"""Weights of the squared error, each in the space of what the network predicts.

Papers state a weight for the error in data, in noise or in velocity. Given x_t
these errors are one and the same: an error d in the pair moves x by sigma d and
eps by -alpha d, which leaves x_t = alpha x + sigma eps where it is, and so
moves every prediction p by its response r_p times d:

  data      sigma
  noise     alpha
  velocity  |alpha' sigma - sigma' alpha|
  v         alpha^2 + sigma^2
  score     alpha / sigma
  edm       sqrt(sigma^2 + s^2 alpha^2) / s,  s the standard deviation of data

So the weight w_p that makes |w_p error_p^2| the w_q error_q^2 of another space
is w_p = w_q (r_q / r_p)^2.

**At the ends** a weight may be infinite: the data at t = 0 says nothing of the
noise. Responses and coefficients that are divided by are kept above 1e-6, as
in `prediction.py`, so that every weight is finite everywhere.

A law of t is a weight too: `exchange` turns one into the other.
"""

# Times have any shape; t = 0 is data and t = 1 is noise.

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from flowjax.flow import names, paths, times

Weight = Callable[[jax.Array], jax.Array]

FLOOR = 1e-6
# Below this a density is none, and its reciprocal would overflow.
_DENSITY_FLOOR = 1e-20


def build(
  name: str,
  path: paths.Path,
  prediction: str,
  *,
  sigma_data: float = 0.5,
  **options: Any,
) -> Weight:
  """Builds the weight `name` for errors in the space of `prediction`.

  Raises ValueError for an unknown name or option, or a value out of range.
  """
  given = ("path", "prediction", "sigma_data")
  factory = names.choose("loss weight", WEIGHTS, name, options, given)
  return factory(path, prediction, sigma_data=sigma_data, **options)


def unit(
  path: paths.Path, prediction: str, *, sigma_data: float = 0.5
) -> Weight:
  """Builds the weight 1 for whatever the network predicts."""
  return converted(path, jnp.ones_like, prediction, prediction, sigma_data)


def snr(
  path: paths.Path, prediction: str, *, sigma_data: float = 0.5
) -> Weight:
  """Builds SNR = (alpha / sigma)^2 for data, which is 1 for noise.

  The simple loss of DDPM, whatever is predicted (arXiv:2202.00512, section 4).
  """
  return converted(path, _snr(path), "data", prediction, sigma_data)


def truncated_snr(
  path: paths.Path, prediction: str, *, sigma_data: float = 0.5
) -> Weight:
  """Builds max(SNR, 1) for data (arXiv:2202.00512, section 4)."""
  ratio = _snr(path)

  def weight(t):
    return jnp.maximum(ratio(t), 1.0)

  return converted(path, weight, "data", prediction, sigma_data)


def min_snr(
  path: paths.Path,
  prediction: str,
  *,
  gamma: float = 5.0,
  sigma_data: float = 0.5,
) -> Weight:
  """Builds min(SNR, gamma) for data (arXiv:2303.09556).

  That is min(SNR, gamma) / SNR for noise, and over SNR + 1 for the v of a
  variance-preserving path.
  """
  _check_above_zero("gamma", gamma, "5 is the paper's")
  ratio = _snr(path)

  def weight(t):
    return jnp.minimum(ratio(t), gamma)

  return converted(path, weight, "data", prediction, sigma_data)


def p2(
  path: paths.Path,
  prediction: str,
  *,
  gamma: float = 1.0,
  k: float = 1.0,
  sigma_data: float = 0.5,
) -> Weight:
  """Builds 1 / (k + SNR)^gamma for noise (P2, arXiv:2204.00227)."""
  _check_above_zero("k", k, "1 is the paper's")
  if not gamma >= 0.0:
    raise ValueError(
      f"gamma must not be below 0, but is {gamma}; 1 is the paper's, 0 is none."
    )
  ratio = _snr(path)

  def weight(t):
    # Huge at t = 0, where its power would overflow.
    return jnp.exp(-gamma * jnp.log(k + ratio(t)))

  return converted(path, weight, "noise", prediction, sigma_data)


def inverse_sigma_squared(
  path: paths.Path, prediction: str, *, sigma_data: float = 0.5
) -> Weight:
  """Builds 1 / sigma(t)^2 for data, which is 1 for a straight path's velocity.

  What diffusers calls "sigma_sqrt", in the space in which its scripts use it.
  """

  def weight(t):
    return jnp.maximum(path.sigma(t), FLOOR) ** -2

  return converted(path, weight, "data", prediction, sigma_data)


def cosmap(
  path: paths.Path, prediction: str, *, sigma_data: float = 0.5
) -> Weight:
  """Builds 2 / (pi - 2 pi t + 2 pi t^2) for velocity.

  The density of the law of that name (arXiv:2403.03206, section 3.1): with
  uniform times it is what that law is with weight 1.
  """
  density = times.cosmap_density
  return converted(path, density, "velocity", prediction, sigma_data)


def edm(
  path: paths.Path, prediction: str, *, sigma_data: float = 0.5
) -> Weight:
  """Builds (s^2 + s_data^2) / (s s_data)^2 for data, s = sigma / alpha.

  It is 1 for EDM's own F (arXiv:2206.00364, table 1).
  """
  return converted(path, jnp.ones_like, "edm", prediction, sigma_data)


def likelihood(
  path: paths.Path, prediction: str, *, sigma_data: float = 0.5
) -> Weight:
  """Builds -lambda' / 2 = g^2 / (2 sigma^2) for noise, g the diffusion's rate.

  With uniform times the loss bounds the negative log-likelihood of an example,
  in nats per dimension, but for what does not depend on the network
  (arXiv:2107.00630; g^2 / 2 on the score, arXiv:2101.09258, theorem 1).
  -lambda' / 2 = |alpha' sigma - sigma' alpha| / (alpha sigma).
  """

  def weight(t):
    c = _coefficients(path, t)
    area = jnp.abs(c.alpha_dot * c.sigma - c.sigma_dot * c.alpha)
    return area / (jnp.maximum(c.alpha, FLOOR) * jnp.maximum(c.sigma, FLOOR))

  return converted(path, weight, "noise", prediction, sigma_data)


# Factories of weights, factory(path, prediction, **options), by the name in a
# config.
WEIGHTS: dict[str, Callable[..., Weight]] = {
  "unit": unit,
  "snr": snr,
  "truncated_snr": truncated_snr,
  "min_snr": min_snr,
  "p2": p2,
  "inverse_sigma_squared": inverse_sigma_squared,
  "cosmap": cosmap,
  "edm": edm,
  "likelihood": likelihood,
}


def converted(
  path: paths.Path,
  weight: Weight,
  source: str,
  target: str,
  sigma_data: float = 0.5,
) -> Weight:
  """Turns a weight for errors of `source` into the same one for `target`."""
  _check_above_zero("sigma_data", sigma_data, "0.5 is EDM's")
  before, after = _response(source), _response(target)

  def in_target(t):
    t = paths.wide(jnp.asarray(t))
    if source == target:
      return weight(t)
    c = _coefficients(path, t)
    moved = before(c, sigma_data) / jnp.maximum(after(c, sigma_data), FLOOR)
    return weight(t) * moved**2

  return in_target


def exchange(
  law: times.TimeLaw, weight: Weight, other: times.TimeLaw
) -> Weight:
  """Returns the weight that `other` needs to be `law` with `weight`.

  pi(t) w(t) = pi'(t) w'(t)  (arXiv:2403.03206, section 3.1): the expected loss
  is the same, and so is what is learned; the noise of its gradient is not.
  """

  def other_weight(t):
    ratio = law.density(t) / jnp.maximum(other.density(t), _DENSITY_FLOOR)
    return weight(t) * ratio

  return other_weight


def learned_uncertainty(loss: jax.Array, u: jax.Array) -> jax.Array:
  """Returns loss / exp(u) + u, u the network's guess of the log of the loss.

  Its minimum over u is at u = log E[loss]: every noise level then contributes
  as much to the gradient (EDM2, arXiv:2312.02696).
  """
  return loss * jnp.exp(-u) + u


def _coefficients(path: paths.Path, t: jax.Array) -> paths.Coefficients:
  return path.at(t, t)


def _snr(path: paths.Path) -> Weight:
  def ratio(t):
    return (path.alpha(t) / jnp.maximum(path.sigma(t), FLOOR)) ** 2

  return ratio


_RESPONSES: dict[str, Callable[[paths.Coefficients, float], jax.Array]] = {
  "data": lambda c, _: c.sigma,
  "noise": lambda c, _: c.alpha,
  "velocity": lambda c, _: jnp.abs(
    c.alpha_dot * c.sigma - c.sigma_dot * c.alpha
  ),
  "v": lambda c, _: c.alpha**2 + c.sigma**2,
  "score": lambda c, _: c.alpha / jnp.maximum(c.sigma, FLOOR),
  "edm": lambda c, s: jnp.sqrt(c.sigma**2 + (s * c.alpha) ** 2) / s,
}


def _response(prediction: str):
  return names.choose("prediction", _RESPONSES, prediction, ())


def _check_above_zero(name: str, value: float, usual: str) -> None:
  if not value > 0.0:
    raise ValueError(f"{name} must be above 0, not {value}; {usual}.")
