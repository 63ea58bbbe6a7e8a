"""EDM's sampler: Heun's method in sigma, with noise churned in and out again.

Algorithm 2 of arXiv:2206.00364. It is written for x + s eps; every path is that
after a division by alpha, with s = sigma / alpha. Scaled back, with the noise
e = (x_t - alpha D(x_t)) / sigma that a denoiser D sees in x_t, a step to s' is

  x'_t = alpha' D + sigma' e                                (Euler)
  x'_t + alpha' (s' - s) (e' - e) / 2,  e' at x'_t, t'      (Heun)

in which nothing is divided by alpha at noise or by sigma at data.
"""

# States are trees of arrays; s is sigma / alpha, and a prime marks t_next.

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from flowjax.flow import paths
from flowjax.flow.solvers import noise

# Below it alpha or sigma counts as 0.
FLOOR = 1e-6


@dataclasses.dataclass(frozen=True)
class Heun:
  """Heun's method for the flow in sigma, the field being the denoised data.

  Where s_min <= s <= s_max each of N steps first raises the noise level to
  s (1 + gamma), gamma = min(churn / N, sqrt(2) - 1), by noise of standard
  deviation s_noise. With churn = 0 it is deterministic.

  The last step is not corrected, and neither is one that starts where alpha is
  0 and so s is infinite; there the field is evaluated once. A step that ends at
  `path.low` ends in data, s = 0, also where the path keeps a little noise. No
  noise level exceeds that of t = 1.
  """

  path: paths.Path
  churn: float = 0.0
  s_min: float = 0.0
  s_max: float = math.inf
  s_noise: float = 1.0
  draw: noise.Draw = noise.normal
  name: str = "edm_heun"
  prediction: str = "data"
  late: bool = False  # Grids start below `path.high`.

  @property
  def stochastic(self) -> bool:
    """Whether it draws noise, and so runs from noise to data alone."""
    return self.churn > 0.0

  def init(self, x: Any, rng: jax.Array | None) -> Any:
    """Returns the key from which every step draws its noise, if any does."""
    del x
    return noise.required(rng, self.name) if self.stochastic else ()

  def evaluations(self, count: int) -> int:
    """Returns how often a grid from `path.high` evaluates the field.

    Two per step but for those that are not corrected. The first is corrected of
    a grid that starts `late`.
    """
    if self.late:
      return max(2 * count - 1, 1)
    with jax.ensure_compile_time_eval():
      from_noise = float(self.path.alpha(jnp.float32(self.path.high))) <= FLOOR
    return max(2 * count - 1 - from_noise, 1)

  def begun(self) -> "Heun":
    """Returns the same sampler, for grids that start below `path.high`."""
    return dataclasses.replace(self, late=True)

  def step(
    self,
    field: Callable[[Any, jax.Array], Any],
    x: Any,
    memory: Any,
    step: Any,
  ) -> tuple[Any, Any]:
    """Moves x over the step."""
    t, t_next = step.t, step.t_next
    if self.stochastic:
      x, t = self._churned(x, t, memory, step)
    now, after = self._levels(t), self._levels(t_next)
    # t_N of the algorithm is 0; the path may end a little above.
    to_data = (t_next <= self.path.low) & (t_next < t)
    after = tuple(
      jnp.where(to_data, end, value)
      for end, value in zip((1.0, 0.0), after, strict=True)
    )
    data = field(x, t)
    eps = _noise_in(x, data, now)
    euler = jax.tree.map(
      lambda d, e: _as(after[0], e) * d.astype(e.dtype) + _as(after[1], e) * e,
      data,
      eps,
    )

    def correct(euler):
      alpha, sigma = after
      half = 0.5 * (sigma - alpha * now[1] / jnp.maximum(now[0], FLOOR))
      far = _noise_in(euler, field(euler, t_next), after)
      return jax.tree.map(
        lambda x, e, e_far: x + _as(half, x) * (e_far - e), euler, eps, far
      )

    alone = (step.number == step.total - 1) | (now[0] <= FLOOR) | to_data
    return jax.lax.cond(alone, lambda euler: euler, correct, euler), memory

  def _levels(self, t):
    return self.path.alpha(t), self.path.sigma(t)

  def _churned(self, x, t, rng, step):
    """Raises the noise of x from level s to s (1 + gamma); returns x and t."""
    alpha, sigma = self._levels(t)
    s = sigma / jnp.maximum(alpha, FLOOR)
    gamma = min(self.churn / step.total, math.sqrt(2.0) - 1.0)
    inside = (self.s_min <= s) & (s <= self.s_max) & (alpha > FLOOR) & (s > 0.0)
    raised = jnp.where(inside, s, 1.0) * (1.0 + gamma)
    t_hat = self.path.log_snr_inverse(-2.0 * jnp.log(raised))
    t_hat = jnp.where(inside, t_hat.astype(t.dtype), t)
    # What the path has at that time, which is all that the field can be told.
    alpha_hat, sigma_hat = self._levels(t_hat)
    s_hat = sigma_hat / jnp.maximum(alpha_hat, FLOOR)
    added = jnp.sqrt(jnp.maximum((s_hat - s) * (s_hat + s), 0.0))
    factor = jnp.where(inside, alpha_hat / jnp.maximum(alpha, FLOOR), 1.0)
    scale = jnp.where(inside, alpha_hat * added * self.s_noise, 0.0)
    z = self.draw(rng, step.number, x)
    x = jax.tree.map(lambda x, z: _as(factor, x) * x + _as(scale, x) * z, x, z)
    return x, t_hat


def _noise_in(x: Any, data: Any, levels: Any) -> Any:
  """Returns (x - alpha D) / sigma."""
  alpha, sigma = levels[0], jnp.maximum(levels[1], FLOOR)
  return jax.tree.map(
    lambda x, d: (x - _as(alpha, x) * d.astype(x.dtype)) / _as(sigma, x),
    x,
    data,
  )


def _as(factor: jax.Array, x: jax.Array) -> jax.Array:
  return factor.astype(x.dtype)


def heun(
  path: paths.Path,
  churn: float = 0.0,
  s_min: float = 0.0,
  s_max: float = math.inf,
  s_noise: float = 1.0,
) -> Heun:
  """Builds the sampler with the paper's S_churn, S_min, S_max and S_noise."""
  if churn < 0.0 or s_noise < 0.0:
    raise ValueError(
      f"churn = {churn} and s_noise = {s_noise} are amounts of noise: at least "
      "0. The paper's are 40 and 1.003 for ImageNet; churn = 0 adds none."
    )
  if not 0.0 <= s_min <= s_max:
    raise ValueError(
      f"Noise is churned where s_min = {s_min} <= sigma / alpha <= s_max = "
      f"{s_max}, which is nowhere; the paper's are 0.05 and 50 for ImageNet."
    )
  return Heun(path, churn, s_min, s_max, s_noise)


SOLVERS = {"edm_heun": heun}
