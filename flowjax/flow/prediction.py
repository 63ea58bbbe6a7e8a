"""What a network may predict, each from each, along any path.

A prediction is one linear combination of data x and noise eps; x_t is another.
The two together give x and eps, and these give every other prediction:

  data      x
  noise     eps
  velocity  alpha' x + sigma' eps, the velocity of the path
  v         alpha eps - sigma x (arXiv:2202.00512, Salimans and Ho)
  score     -eps / sigma, the score of q(x_t | x)
  edm       (sigma x / s - s alpha eps) / n,  n^2 = sigma^2 + s^2 alpha^2

The last is the F of EDM (arXiv:2206.00364, eq. 7): with sigma / alpha for its
noise level, x_t / alpha for its input and s = `sigma_data`, its D = c_skip x +
c_out F is x. Where alpha^2 + sigma^2 = 1, F at s = 1 is -v.

All are linear, so what holds for one x and eps holds for the expectations given
x_t, which is what a network learns.

**At the ends.** x_t holds no noise at t = 0 and no data at t = 1. A velocity
determines both at every t, and no division takes place where it could fail:
alpha sigma' - sigma alpha' stays positive (but where a path stands still, as
the polynomial one at t = 1). So do v and F, which divide by alpha^2 + sigma^2
and n^2. Data at t = 0 says nothing about the noise, nor noise (or score) at
t = 1 about the data. There the difference is taken first, (x_t - alpha x) /
sigma, and the divisor is kept above 1e-6, below which rounding in float32 has
left nothing of the quotient. So every conversion is finite everywhere; and as
x_t - alpha x vanishes with sigma, the noise at t = 0 becomes its own mean, 0.
The coefficients are at least float32, and so is what they multiply: half
precision is widened before anything is subtracted.
"""

# x, eps, x_t and every prediction share one shape, which starts with the shape
# of t.

import dataclasses
import difflib
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from flowjax.flow import paths

FLOOR = 1e-6
# An error that is multiplied by this drowns the data.
_HOPELESS = 1e5
# EDM's range of noise levels, which `noise_time` maps to [0, 1].
_EDM_RANGE = (0.002, 80.0)

Pair = tuple[jax.Array, jax.Array]
# field(x, t) -> a prediction, where t is one number or one per example.
Field = Callable[[jax.Array, jax.Array], jax.Array]


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
  *,
  sigma_data: float = 0.5,
) -> jax.Array:
  """Turns the prediction `source` of `value` at x_t, t into `target`."""
  to_pair, to_target = _named(source, sigma_data), _named(target, sigma_data)
  if source == target:
    return value
  c = path.at(t, x_t)
  x, eps = to_pair.solve(c, value, x_t)
  return to_target.form(c, x, eps)


def field(
  predict: Callable[..., jax.Array],
  path: paths.Path,
  source: str,
  target: str,
  sigma_data: float = 0.5,
) -> Callable[..., jax.Array]:
  """Makes of `predict(x, t, ...)`, which predicts `source`, one of `target`."""

  def converted(x, t, *args, **options):
    value = predict(x, t, *args, **options)
    return convert(path, source, target, value, x, t, sigma_data=sigma_data)

  return converted


def preconditioned(
  predict: Callable[..., jax.Array],
  path: paths.Path,
  prediction: str,
  *,
  sigma_data: float = 0.5,
) -> Callable[..., jax.Array]:
  """Gives a network `predict(params, x_t, t_B, cond, rng)` the inputs it wants.

  One that predicts "edm" receives x_t / n, of unit variance if the data has
  variance sigma_data^2 (EDM's c_in), and `noise_time` for t_B. All others
  receive x_t and t_B, and `predict` is returned itself. Either way what comes
  back predicts `prediction` at (x_t, t_B).
  """
  _named(prediction, sigma_data)
  if prediction != "edm":
    return predict

  def scaled(params, x_t, t_B, *args, **options):
    c = path.at(t_B, x_t)
    x = x_t / jnp.sqrt(_edm_square(c, sigma_data))
    return predict(params, x, noise_time(path, t_B), *args, **options)

  return scaled


def noise_time(path: paths.Path, t: jax.Array) -> jax.Array:
  """Returns EDM's c_noise = log(sigma / alpha) / 4 in units of its own range.

  0 is a noise level of 0.002 and 1 is one of 80, EDM's ends. So an embedder
  that is made for t in [0, 1], and multiplies it by 1000, resolves the noise
  levels as finely as times. Finite everywhere, if outside of [0, 1] at the ends
  of a path that goes further.
  """
  t = paths.wide(jnp.asarray(t))
  log_sigma = jnp.log(jnp.maximum(path.sigma(t), FLOOR))
  log_alpha = jnp.log(jnp.maximum(path.alpha(t), FLOOR))
  low, high = map(math.log, _EDM_RANGE)
  return (log_sigma - log_alpha - low) / (high - low)


def rescheduled(
  path: paths.Path,
  field: Field,
  on: paths.Path,
  prediction: str = "velocity",
  *,
  sigma_data: float = 0.5,
) -> Field:
  """Makes of a field trained on `path` the field of the path `on`.

  At equal log-SNR, lambda_on(r) = lambda(t), the one x_r is the other x_t times
  s = alpha_on(r) / alpha(t) = sigma_on(r) / sigma(t), and so

    u_on(x, r) = (s' / s) x + s t' u(x / s, t)

  (arXiv:2310.19075; arXiv:2412.06264). The same without
  derivatives, which are infinite at the ends: data and noise predicted at
  (x / s, t) are those of (x, r), and there become `on`'s prediction. Where `on`
  has more or less noise than `path` ever has, these are those of the nearest t
  of `path`; where it has more, only the data, whose error would grow with it,
  and the noise is the rest of x.
  """
  named = _named(prediction, sigma_data)

  def on_schedule(x, r):
    r = jnp.asarray(r, paths.wide(x).dtype)
    log_snr = on.log_snr(r)
    t = path.log_snr_inverse(log_snr)
    t = jnp.clip(t, path.low, path.high)
    beyond = log_snr < path.log_snr(jnp.asarray(path.high, r.dtype))
    old, new = path.at(t, x), on.at(r, x)
    # By the larger coefficient: the other one may be 0.
    inverse_scale = jnp.where(
      old.alpha > old.sigma,
      old.alpha / jnp.maximum(new.alpha, FLOOR),
      old.sigma / jnp.maximum(new.sigma, FLOOR),
    )
    x_t = inverse_scale * x
    data, eps = named.solve(old, field(x_t, t), x_t)
    rest = (x - new.alpha * data) / jnp.maximum(new.sigma, FLOOR)
    eps = jnp.where(paths.over(beyond, x), rest, eps)
    return named.form(new, data, eps)

  return on_schedule


def check(
  path: paths.Path, source: str, target: str, *, sigma_data: float = 0.5
) -> None:
  """Raises ValueError if `source` cannot give `target` where sampling starts.

  A network's error in `source` reaches `target` multiplied by their slope at
  given x_t. On a path with alpha = 0 at its end the noise in pure noise is x_t
  itself, and its smallest error says anything about the data.
  """
  one, high = jnp.ones(()), jnp.asarray(path.high)
  with jax.ensure_compile_time_eval():
    slope = convert(
      path, source, target, one, 0.0 * one, high, sigma_data=sigma_data
    )
    alpha = float(path.alpha(high))
  if abs(float(slope)) < _HOPELESS:
    return
  raise ValueError(
    f"On the path {path.name!r} a network that predicts {source!r} cannot be "
    f"sampled as {target!r}: at t = {path.high:g}, where sampling starts, "
    f"alpha is {alpha:.1e}, and an error of the network is multiplied by "
    f"{abs(float(slope)):.0e}. Predict 'v', 'velocity' or 'data', or let the "
    "path end sooner, as with high=0.999."
  )


def _named(name: str, sigma_data: float) -> Prediction:
  if name not in PREDICTIONS:
    near = difflib.get_close_matches(str(name), PREDICTIONS, n=1)
    raise ValueError(
      f"There is no prediction {name!r}; it must be one of "
      f"{', '.join(PREDICTIONS)}."
      + (f" Did you mean {near[0]!r}?" if near else "")
    )
  return _edm(sigma_data) if name == "edm" else _PREDICTIONS[name]


def _from_data(c, x, x_t) -> Pair:
  return x, (x_t - c.alpha * x) / jnp.maximum(c.sigma, FLOOR)


def _from_noise(c, eps, x_t) -> Pair:
  return (x_t - c.sigma * eps) / jnp.maximum(c.alpha, FLOOR), eps


def _from_velocity(c, u, x_t) -> Pair:
  determinant = c.alpha * c.sigma_dot - c.sigma * c.alpha_dot
  determinant = jnp.maximum(determinant, FLOOR)
  x = (c.sigma_dot * x_t - c.sigma * u) / determinant
  eps = (c.alpha * u - c.alpha_dot * x_t) / determinant
  return x, eps


def _from_v(c, v, x_t) -> Pair:
  square = c.alpha**2 + c.sigma**2
  x = (c.alpha * x_t - c.sigma * v) / square
  eps = (c.sigma * x_t + c.alpha * v) / square
  return x, eps


def _from_score(c, score, x_t) -> Pair:
  return _from_noise(c, -c.sigma * score, x_t)


def _edm_square(c: paths.Coefficients, sigma_data: float) -> jax.Array:
  """Returns n^2, the variance of x_t if the data has that of sigma_data."""
  return c.sigma**2 + (sigma_data * c.alpha) ** 2


def _edm(sigma_data: float) -> Prediction:
  if not 0.0 < sigma_data < math.inf:
    raise ValueError(
      "sigma_data is the standard deviation of the data: it must be above 0, "
      f"not {sigma_data}; 0.5 is EDM's for images in [-1, 1]."
    )

  def form(c, x, eps):
    difference = c.sigma / sigma_data * x - sigma_data * c.alpha * eps
    return difference / jnp.sqrt(_edm_square(c, sigma_data))

  def solve(c, value, x_t):
    square = _edm_square(c, sigma_data)
    scaled = sigma_data * jnp.sqrt(square) * value
    x = (sigma_data**2 * c.alpha * x_t + c.sigma * scaled) / square
    eps = (c.sigma * x_t - c.alpha * scaled) / square
    return x, eps

  return Prediction(form, solve)


_PREDICTIONS = {
  "data": Prediction(lambda c, x, eps: x, _from_data),
  "noise": Prediction(lambda c, x, eps: eps, _from_noise),
  "velocity": Prediction(
    lambda c, x, eps: c.alpha_dot * x + c.sigma_dot * eps, _from_velocity
  ),
  "v": Prediction(lambda c, x, eps: c.alpha * eps - c.sigma * x, _from_v),
  "score": Prediction(
    lambda c, x, eps: -eps / jnp.maximum(c.sigma, FLOOR), _from_score
  ),
}

PREDICTIONS = (*_PREDICTIONS, "edm")
