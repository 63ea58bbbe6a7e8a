"""What a network may predict, each from each, along any path.

A prediction is one linear combination of data x and noise eps; x_t is another.
The two together give x and eps, and these give every other prediction:

  data      x
  noise     eps
  velocity  v = alpha' x + sigma' eps
  score     -eps / sigma, the score of q(x_t | x)

All four are linear, so what holds for one x and eps holds for the expectations
given x_t, which is what a network learns.

**At the ends.** x_t holds no noise at t = 0 and no data at t = 1. A velocity
determines both at every t, and no division takes place where it could fail:
alpha sigma' - sigma alpha' stays positive. Data at t = 0 says nothing about the
noise, nor noise (or score) at t = 1 about the data. There the difference is
taken first, (x_t - alpha x) / sigma, and the divisor is kept above 1e-6, below
which rounding in float32 has left nothing of the quotient. So every conversion
is finite everywhere; and as x_t - alpha x vanishes with sigma, the noise at
t = 0 becomes its own mean, 0. The coefficients are at least float32, and so is
what they multiply: half precision is widened before anything is subtracted.
"""

# x, eps, x_t, v and score share one shape, which starts with the shape of t.

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from flowjax.flow import paths

FLOOR = 1e-6

Pair = tuple[jax.Array, jax.Array]


@dataclasses.dataclass(frozen=True)
class Prediction:
  """A linear combination of data and noise, and the way back to both.

  `form(c, x, eps)` makes it; `solve(c, value, x_t)` returns (x, eps).
  """

  form: Callable[[paths.Coefficients, jax.Array, jax.Array], jax.Array]
  solve: Callable[[paths.Coefficients, jax.Array, jax.Array], Pair]


def convert(
  path: paths.Path,
  source: str,
  target: str,
  value: jax.Array,
  x_t: jax.Array,
  t: jax.Array,
) -> jax.Array:
  """Turns the prediction `source` of `value` at x_t, t into `target`."""
  to_pair, to_target = _named(source), _named(target)
  if source == target:
    return value
  c = path.at(t, x_t)
  x, eps = to_pair.solve(c, value, x_t)
  return to_target.form(c, x, eps)


def _named(name: str) -> Prediction:
  if name not in _PREDICTIONS:
    raise ValueError(
      f"There is no prediction {name!r}; it must be one of "
      f"{', '.join(PREDICTIONS)}."
    )
  return _PREDICTIONS[name]


def _from_data(c, x, x_t) -> Pair:
  return x, (x_t - c.alpha * x) / jnp.maximum(c.sigma, FLOOR)


def _from_noise(c, eps, x_t) -> Pair:
  return (x_t - c.sigma * eps) / jnp.maximum(c.alpha, FLOOR), eps


def _from_velocity(c, v, x_t) -> Pair:
  determinant = c.alpha * c.sigma_dot - c.sigma * c.alpha_dot
  x = (c.sigma_dot * x_t - c.sigma * v) / determinant
  eps = (c.alpha * v - c.alpha_dot * x_t) / determinant
  return x, eps


def _from_score(c, score, x_t) -> Pair:
  return _from_noise(c, -c.sigma * score, x_t)


_PREDICTIONS = {
  "data": Prediction(lambda c, x, eps: x, _from_data),
  "noise": Prediction(lambda c, x, eps: eps, _from_noise),
  "velocity": Prediction(
    lambda c, x, eps: c.alpha_dot * x + c.sigma_dot * eps, _from_velocity
  ),
  "score": Prediction(
    lambda c, x, eps: -eps / jnp.maximum(c.sigma, FLOOR), _from_score
  ),
}

PREDICTIONS = tuple(_PREDICTIONS)
