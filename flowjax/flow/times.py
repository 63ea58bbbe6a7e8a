"""Laws of t for training, the resolution shift, and the plain grid.

A law is its quantile function: t = quantile(u) with u uniform on (0, 1). So a
law is sampled, shifted, mirrored or stratified without knowing which one it is.
"""

# Times have any shape; t = 0 is data and t = 1 is noise. Shape suffixes: N
# nodes of a table.

import dataclasses
import inspect
import math
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import jax.scipy.special
import numpy as np

from flowjax.flow import inversion, names, paths, spacings

Time = TypeVar("Time", float, np.ndarray, jax.Array)

# Half the spacing of jax's uniform numbers in float32. Added to them it makes
# them symmetric about 1/2, exact still, and never 0 or 1.
_HALF_STEP = 2.0**-24
# The quantiles of a Beta law are kept at this many logits of u, between those
# of the least and the greatest uniform number.
_NODES, _END = 513, 16.7


@dataclasses.dataclass(frozen=True)
class TimeLaw:
  """A distribution on (0, 1): its quantile function and its density.

  A `stratified` law spreads the times of one draw evenly over its quantiles.
  """

  quantile: Callable[[jax.Array], jax.Array]
  density: Callable[[jax.Array], jax.Array]
  stratified: bool = False

  def sample(self, rng: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Draws times in float32."""
    if self.stratified:
      return self.quantile(_spread(rng, shape))
    u = jax.random.uniform(rng, shape, jnp.float32) + _HALF_STEP
    return self.quantile(u)


def build(
  name: str,
  path: paths.Path | None = None,
  *,
  shift: float = 1.0,
  stratified: bool = False,
  **options: Any,
) -> TimeLaw:
  """Builds the law `name` with its options, shifted and stratified if asked.

  A law of sigma needs the path, which says at which t that sigma is. Raises
  ValueError for an unknown name or option, or a value out of range.
  """
  factory = names.choose("law of t", LAWS, name, options, given=("path",))
  if "path" in inspect.signature(factory).parameters:
    options["path"] = path
  law = factory(**options)
  if shift != 1.0:
    law = shifted(law, shift)
  return dataclasses.replace(law, stratified=law.stratified or stratified)


def uniform() -> TimeLaw:
  """Builds the uniform law."""
  return TimeLaw(quantile=lambda u: u, density=lambda t: jnp.ones_like(t))


def logit_normal(
  mean: float = 0.0, std: float = 1.0, *, compat: bool = False
) -> TimeLaw:
  """Builds the law of t = sigmoid(mean + std z), z normal.

  pi(t) = N(logit t; mean, std^2) / (t (1 - t))  (arXiv:2403.03206, section 3.1)

  A positive mean leans towards noise. In diffusers' training scripts the same
  mean leans towards data, as its indices run down a descending list: `compat`
  takes a mean that was meant for these.
  """
  _check_std(std, "logit-normal")
  _check_mean(mean, "logit-normal")
  mean = -mean if compat else mean

  def quantile(u):
    return jax.nn.sigmoid(mean + std * jax.scipy.special.ndtri(u))

  def density(t):
    # The density vanishes at both ends, where its factors are 0 and infinite.
    t = jnp.clip(t, _HALF_STEP, 1.0 - _HALF_STEP)
    z = (jax.scipy.special.logit(t) - mean) / std
    scale = std * math.sqrt(2.0 * math.pi)
    return jnp.exp(-0.5 * z**2) / (scale * t * (1.0 - t))

  return TimeLaw(quantile, density)


def mode(scale: float = 1.29) -> TimeLaw:
  """Builds SD3's law with heavy tails, whose mode is 1/2 for a scale above 0.

  quantile(u) = f(1 - u; s), f(u; s) = 1 - u - s (cos^2(pi u / 2) - 1 + u), for
  -1 <= s <= 2 / (pi - 2), where f falls (arXiv:2403.03206, section 3.1);
  s = 0 is uniform.
  """
  if not -1.0 <= scale <= 2.0 / (math.pi - 2.0):
    raise ValueError(
      "The scale of the mode law must be between -1 and 2 / (pi - 2) = 1.7519, "
      f"where it is monotone, not {scale}; 1.29 is usual, 0 is uniform."
    )

  def quantile(u):
    return u + scale * (u - jnp.sin(0.5 * math.pi * u) ** 2)

  def density(t):
    u = inversion.bisect(quantile, t, 0.0, 1.0)
    slope = 1.0 + scale * (1.0 - 0.5 * math.pi * jnp.sin(math.pi * u))
    return 1.0 / slope

  return TimeLaw(quantile, density)


def cosmap() -> TimeLaw:
  """Builds the law that gives the straight path the log-SNR of the cosine.

  quantile(u) = 1 - 1 / (tan(pi u / 2) + 1)
  pi(t) = 2 / (pi - 2 pi t + 2 pi t^2)   (arXiv:2403.03206, section 3.1)
  """

  def quantile(u):
    sine = jnp.sin(0.5 * math.pi * u)
    return sine / (sine + jnp.sin(0.5 * math.pi * (1.0 - u)))

  return TimeLaw(quantile, cosmap_density)


def cosmap_density(t: jax.Array) -> jax.Array:
  """Returns 2 / (pi - 2 pi t + 2 pi t^2), a law's density or a loss weight."""
  return 2.0 / (math.pi * (1.0 - 2.0 * t + 2.0 * t**2))


def log_normal_sigma(
  mean: float = -1.2, std: float = 1.2, *, path: paths.Path | None = None
) -> TimeLaw:
  """Builds EDM's law, ln(sigma / alpha) ~ N(mean, std^2), on any path.

  lambda = -2 ln(sigma / alpha) is normal (arXiv:2206.00364, table 1) and the
  path's inverse gives t, whose density is that of lambda times |lambda'|. The
  normal is cut to the log-SNRs between the path's `low` and `high`, and what
  is left is normalised: on the straight path nothing is cut.
  """
  _check_std(std, "log-normal")
  _check_mean(mean, "log-normal")
  if path is None:
    raise ValueError(
      "The law log_normal_sigma is a law of sigma, and which t has that sigma "
      "depends on the path: pass path=, for example paths.straight()."
    )

  def below(t):
    z = (-0.5 * path.log_snr(jnp.float32(t)) - mean) / std
    return float(jax.scipy.special.ndtr(z))

  with jax.ensure_compile_time_eval():
    first, last = below(path.low), below(path.high)
  if not last - first > 1e-3:
    raise ValueError(
      f"Log-normal sigmas of mean {mean} and std {std} do not occur on the "
      f"path {path.name!r}: it holds {last - first:.1e} of them; EDM's mean is "
      "-1.2, and std 1.2."
    )

  def quantile(u):
    z = jax.scipy.special.ndtri(first + u * (last - first))
    t = path.log_snr_inverse(-2.0 * (mean + std * z))
    return jnp.clip(t, path.low, path.high)

  def density(t):
    # As for the logit-normal law, and where the path has an infinite log-SNR.
    t = jnp.clip(t, max(path.low, _HALF_STEP), min(path.high, 1.0 - _HALF_STEP))
    z = (-0.5 * path.log_snr(t) - mean) / std
    fall = path.alpha_dot(t) / path.alpha(t)
    slope = path.sigma_dot(t) / path.sigma(t) - fall
    scale = std * math.sqrt(2.0 * math.pi) * (last - first)
    return jnp.exp(-0.5 * z**2) * slope / scale

  return TimeLaw(quantile, density)


def u_shaped(a: float = 4.0) -> TimeLaw:
  """Builds the law pi(t) ~ exp(a t) + exp(a (1 - t)), for rectified pairs.

  Of pairs that a flow has made, both ends are learned hardest
  (arXiv:2405.20320). In closed form:

  pi(t) = a cosh(z) / (2 sinh(a / 2)),  z = a (t - 1/2)
  quantile(u) = 1/2 + asinh((2 u - 1) sinh(a / 2)) / a
  """
  if not 0.0 < a <= 100.0:
    raise ValueError(
      "The steepness a of the U-shaped law must be above 0 and at most 100, "
      f"not {a}; 4 is usual, and near 0 it is uniform."
    )
  width = math.sinh(0.5 * a)

  def quantile(u):
    t = 0.5 + jnp.arcsinh((2.0 * u - 1.0) * width) / a
    return jnp.clip(t, _HALF_STEP, 1.0 - _HALF_STEP)

  def density(t):
    return a * jnp.cosh(a * (t - 0.5)) / (2.0 * width)

  return TimeLaw(quantile, density)


def beta(a: float = 1.0, b: float = 1.0) -> TimeLaw:
  """Builds the Beta law, pi(t) ~ t^(a - 1) (1 - t)^(b - 1).

  Its quantile has no closed form. A table of logit t against logit u, made on
  the host, is interpolated by cubics, whose slopes at the nodes are
  u (1 - u) / (pi(t) t (1 - t)): to the precision of float32.
  """
  if not (0.0 < a <= 1000.0 and 0.0 < b <= 1000.0):
    raise ValueError(
      "The exponents of a Beta law must be above 0 and at most 1000, not "
      f"a = {a} and b = {b}; 1 and 1 are uniform."
    )
  log_norm = math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)
  node_N = np.linspace(-_END, _END, _NODES)
  u_N = 1.0 / (1.0 + np.exp(-node_N))
  logit_N = spacings.beta_quantile_logit(u_N, a, b)
  # log t and log (1 - t).
  log_N, log_rest_N = -np.logaddexp(0.0, -logit_N), -np.logaddexp(0.0, logit_N)
  slope_N = u_N * (1.0 - u_N) * np.exp(log_norm - a * log_N - b * log_rest_N)

  def quantile(u):
    logit = inversion.interpolate(
      jax.scipy.special.logit(u), -_END, _END, logit_N, slope_N
    )
    return jnp.minimum(jax.nn.sigmoid(logit), 1.0 - _HALF_STEP)

  def density(t):
    # Where an exponent is below 1 the density is infinite at that end.
    t = jnp.clip(t, jnp.finfo(t.dtype).tiny, 1.0 - _HALF_STEP)
    powers = (a - 1.0) * jnp.log(t) + (b - 1.0) * jnp.log1p(-t)
    return jnp.exp(powers - log_norm)

  return TimeLaw(quantile, density)


def stratified(law: TimeLaw) -> TimeLaw:
  """Builds the same law, the times of one draw spread evenly over it.

  Every single time follows the law; a batch covers it, so that the loss varies
  less from step to step (arXiv:2107.00630, the low-discrepancy sampler).
  """
  return dataclasses.replace(law, stratified=True)


def mirrored(law: TimeLaw) -> TimeLaw:
  """Builds the law of 1 - t, for laws stated with data at t = 1."""
  return dataclasses.replace(
    law,
    quantile=lambda u: 1.0 - law.quantile(1.0 - u),
    density=lambda t: law.density(1.0 - t),
  )


def shifted(law: TimeLaw, shift: float) -> TimeLaw:
  """Builds the law of `shift_times(t, shift)`, t drawn from `law`.

  With t_n = shift_times(t_m, 1 / a), the density gains the factor
  d t_n / d t_m = a / (t_m + a (1 - t_m))^2.
  """
  check_shift(shift)

  def density(t):
    slope = shift / (t + shift * (1.0 - t)) ** 2
    return law.density(shift_times(t, 1.0 / shift)) * slope

  return dataclasses.replace(
    law,
    quantile=lambda u: shift_times(law.quantile(u), shift),
    density=density,
  )


# Laws by the name that a config gives them.
LAWS: dict[str, Callable[..., TimeLaw]] = {
  "uniform": uniform,
  "stratified": lambda: stratified(uniform()),
  "logit_normal": logit_normal,
  "mode": mode,
  "cosmap": cosmap,
  "log_normal_sigma": log_normal_sigma,
  "u_shaped": u_shaped,
  "beta": beta,
}


def shift_times(t: Time, shift: float) -> Time:
  """Moves t towards noise by multiplying its odds t / (1 - t) by `shift`.

  t_m = a t_n / (1 + (a - 1) t_n)   (arXiv:2403.03206, eq. 23)

  On the straight path the log-SNR falls by 2 log a. FLUX's exponential shift by
  mu is a = exp(mu). Written so that 0, 1 and a = 1 are exact in floating point.
  """
  return shift * t / (shift * t + (1.0 - t))


def resolution_shift(tokens: int, base_tokens: int = 256) -> float:
  """Returns the shift sqrt(m / n) that keeps the noise level seen by the eye.

  m tokens average away more noise than n do (arXiv:2403.03206, section 5.3.2).
  256 tokens are 256 pixels in SD3 and FLUX, 4096 are 1024.
  """
  if tokens < 1 or base_tokens < 1:
    raise ValueError(
      f"A sequence has at least 1 token: not {tokens} with {base_tokens} as "
      "the base; 256 tokens are 256 pixels in SD3."
    )
  return math.sqrt(tokens / base_tokens)


def flux_mu(
  tokens: int,
  *,
  base_tokens: int = 256,
  base_mu: float = 0.5,
  max_tokens: int = 4096,
  max_mu: float = 1.15,
) -> float:
  """Returns FLUX's mu, linear in the length of the sequence.

  It is `base_mu` at `base_tokens` and `max_mu` at `max_tokens`, and goes on in
  the same line beyond.
  """
  if tokens < 1 or base_tokens < 1:
    raise ValueError(
      f"A sequence has at least 1 token: not {tokens} with {base_tokens} as "
      "the base; FLUX's base is 256."
    )
  if base_tokens == max_tokens:
    raise ValueError(
      f"base_tokens and max_tokens are both {max_tokens}: they are two lengths "
      "between which mu is a line; FLUX's are 256 and 4096."
    )
  slope = (max_mu - base_mu) / (max_tokens - base_tokens)
  return base_mu + slope * (tokens - base_tokens)


def flux_shift(tokens: int, **options: Any) -> float:
  """Returns FLUX's shift exp(mu); options are those of `flux_mu`."""
  return math.exp(flux_mu(tokens, **options))


# Rules for a shift from the length of a sequence, by the name in a config.
SHIFTS: dict[str, Callable[..., float]] = {
  "sd3": resolution_shift,
  "flux": flux_shift,
}


def shift_by(name: str, tokens: int, **options: Any) -> float:
  """Returns the shift for a sequence of `tokens` by the rule `name`."""
  names.check("rule of a shift", SHIFTS, name)
  return SHIFTS[name](tokens, **options)


def uniform_grid(steps: int, shift: float = 1.0) -> np.ndarray:
  """Returns the steps + 1 times from exactly 1 down to exactly 0.

  Equidistant, then shifted once; float32.
  """
  if steps < 1:
    raise ValueError(f"A grid needs at least 1 step, not {steps}.")
  check_shift(shift)
  times = np.linspace(1.0, 0.0, steps + 1)
  return shift_times(times, shift).astype(np.float32)


def check_shift(shift: float) -> None:
  """Raises ValueError unless the shift is above 0, and finite."""
  if not 0.0 < shift < math.inf:
    raise ValueError(
      f"A shift multiplies the odds of t and must be above 0, not {shift}; "
      "1.0 leaves the times as they are, 3.0 is SD3's at 1024 pixels."
    )


def _check_mean(mean: float, law: str) -> None:
  if not math.isfinite(mean):
    raise ValueError(
      f"The mean of a {law} law must be a finite number, not {mean}; 0 is "
      "SD3's for a logit-normal, -1.2 is EDM's for a log-normal."
    )


def _check_std(std: float, law: str) -> None:
  if not 0.0 < std < math.inf:
    raise ValueError(
      f"The standard deviation of a {law} law must be above 0, not {std}; 1.0 "
      "is SD3's for a logit-normal, 1.2 is EDM's for a log-normal."
    )


def _spread(rng: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """Returns u_i = u + i / n modulo 1, all uniform and together even."""
  count = math.prod(shape)
  u = jax.random.uniform(rng, (), jnp.float32)
  u = (u + jnp.arange(count, dtype=jnp.float32) / count) % 1.0
  return jnp.clip(u, _HALF_STEP, 1.0 - _HALF_STEP).reshape(shape)
