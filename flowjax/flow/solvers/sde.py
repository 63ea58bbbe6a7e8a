"""Stochastic solvers: Euler-Maruyama and Heun for the reverse-time SDE.

The marginals of a path are those of its flow, and for any D(t) >= 0 also those
of

  dx = (v(x, t) - D(t) score(x, t)) dt + sqrt(2 D(t)) dW,   t falling

(arXiv:2401.08740, eq. 4 and 6, whose w is 2 D and whose time runs from noise to
data). D = 0 is the flow itself. Along t rising the score changes its sign.
"""

# States are trees of arrays, c is a scale, L the size of the last step.

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from flowjax.flow import names, paths, prediction
from flowjax.flow.solvers import noise

Diffusion = Callable[[jax.Array], jax.Array]

# Where alpha vanishes g^2 is infinite: the SDE would forget x at once. As any D
# will do, its alpha is kept above that of SiT's first time, 0.999.
ALPHA_FLOOR = 1e-3


def _sbdm(path: paths.Path, c: float) -> Diffusion:
  def diffusion(t):
    alpha = jnp.maximum(path.alpha(t), ALPHA_FLOOR)
    sigma = path.sigma(t)
    growth = path.sigma_dot(t) - path.alpha_dot(t) / alpha * sigma
    return c * sigma * growth

  return diffusion


# Forms of D(t), form(path, c), as in SiT (arXiv:2401.08740, table 5; its t is
# 1 - t here). "sbdm" is g^2 / 2 of the forward SDE: score-based diffusion.
DIFFUSIONS: dict[str, Callable[[paths.Path, float], Diffusion]] = {
  "constant": lambda path, c: lambda t: jnp.full_like(t, c),
  "sbdm": _sbdm,
  "sigma": lambda path, c: lambda t: c * path.sigma(t),
  "linear": lambda path, c: lambda t: c * t,
  "decreasing": lambda path, c: (
    lambda t: 0.25 * (1.0 - c * jnp.cos(jnp.pi * t)) ** 2
  ),
  "increasing_decreasing": lambda path, c: (
    lambda t: c * jnp.sin(jnp.pi * t) ** 2
  ),
}

# The last step, from t = L where the score may be steep, without noise: the
# drift of the SDE, the flow, or the data expected from x. With "none" it is a
# step like the others.
LAST_STEPS = ("mean", "euler", "tweedie", "none")


@dataclasses.dataclass(frozen=True)
class Stochastic:
  """A solver of the reverse-time SDE with diffusion D(t).

  With `corrected`, each step first adds its noise and then takes one of Heun's
  along the drift (arXiv:2401.08740, algorithm 2); the last step is not
  corrected. Both methods are of weak order 1.
  """

  name: str
  path: paths.Path
  diffusion: Diffusion
  last_step: str
  last_step_size: float | None
  corrected: bool
  draw: noise.Draw = noise.normal
  prediction: str = "velocity"
  # For `solvers.check`: towards noise it works where D vanishes with sigma,
  # but nobody encodes by it.
  stochastic: bool = True

  def grid(self, times: jax.Array) -> jax.Array:
    """Returns `times`, squeezed so that the last step has `last_step_size`.

    The first time and the last stay, and so does a grid that rises, is a single
    step, or is shorter than the last step should be.
    """
    if self.last_step_size is None or len(times) < 3:
      return times
    first, before, end = times[0], times[-2], times[-1]
    squeezed = end + self.last_step_size
    factor = (first - squeezed) / (first - before)
    moved = first - factor * (first - times)
    moved = moved.at[-2].set(squeezed).at[-1].set(end)
    return jnp.where(first > squeezed, moved, times)

  def init(self, x: Any, rng: jax.Array | None) -> jax.Array:
    """Returns the key from which every step draws its noise."""
    del x
    return noise.required(rng, self.name)

  def evaluations(self, count: int) -> int:
    """Returns one per step, or two for each but the last when corrected."""
    return 2 * count - 1 if self.corrected else count

  def step(
    self,
    field: Callable[[Any, jax.Array], Any],
    x: Any,
    memory: jax.Array,
    step: Any,
  ) -> tuple[Any, jax.Array]:
    """Moves x over the step, by the rule for the last step if it is that."""
    t, h = step.t, step.t_next - step.t
    final = step.number == step.total - 1
    # A grid that rises ends in noise, where no rule is needed.
    quiet = final & (h < 0.0) & (self.last_step != "none")
    scale = jnp.sqrt(2.0 * self.diffusion(t) * jnp.abs(h))
    scale = jnp.where(quiet, 0.0, scale)
    z = self.draw(memory, step.number, x)
    if self.corrected:
      x = _moved(x, scale, z)
    v = _like(field(x, t), x)
    drift = self._drift(x, v, t, h)
    ends = _moved(x, h, drift)
    if self.corrected:

      def correct(ends):
        far = self._drift(
          ends, _like(field(ends, step.t_next), x), step.t_next, h
        )
        return _moved(_moved(x, 0.5 * h, drift), 0.5 * h, far)

      ends = jax.lax.cond(final, lambda ends: ends, correct, ends)
    else:
      ends = _moved(ends, scale, z)
    if self.last_step == "euler":
      ends = _choose(quiet, _moved(x, h, v), ends)
    if self.last_step == "tweedie":
      ends = _choose(quiet, self._convert("data", x, v, t), ends)
    return ends, memory

  def _drift(self, x, v, t, h):
    """Returns v - D score, or v + D score where t rises."""
    strength = jnp.sign(h) * self.diffusion(t)
    return _moved(v, strength, self._convert("score", x, v, t))

  def _convert(self, target, x, v, t):
    def leaf(x, v):
      return prediction.convert(self.path, "velocity", target, v, x, t)

    return jax.tree.map(leaf, x, v)


def _moved(x: Any, factor: jax.Array, direction: Any) -> Any:
  """Returns x + factor direction, in the dtype of x."""
  return jax.tree.map(
    lambda x, d: x + factor.astype(x.dtype) * d.astype(x.dtype), x, direction
  )


def _like(v: Any, x: Any) -> Any:
  return jax.tree.map(lambda v, x: v.astype(x.dtype), v, x)


def _choose(first: jax.Array, a: Any, b: Any) -> Any:
  return jax.tree.map(lambda a, b: jnp.where(first, a, b), a, b)


def _build(name: str, corrected: bool) -> Callable[..., Stochastic]:
  def build(
    path: paths.Path,
    diffusion: str = "sigma",
    scale: float = 1.0,
    last_step: str = "mean",
    last_step_size: float | None = 0.04,
  ) -> Stochastic:
    names.check("diffusion", DIFFUSIONS, diffusion)
    names.check("rule for the last step", LAST_STEPS, last_step)
    if not 0.0 <= scale < math.inf:
      raise ValueError(
        f"The scale of the diffusion must be at least 0, not {scale}: it is a "
        "rate of noise. 0 leaves no noise, 1.0 is SiT's."
      )
    if last_step_size is not None and not 0.0 < last_step_size < 1.0:
      raise ValueError(
        f"The size of the last step is a time in (0, 1), not {last_step_size}; "
        "0.04 is SiT's, None keeps the grid as it is."
      )
    if last_step == "none":
      last_step_size = None
    form = DIFFUSIONS[diffusion](path, scale)
    return Stochastic(name, path, form, last_step, last_step_size, corrected)

  return build


SOLVERS = {
  "euler_maruyama": _build("euler_maruyama", corrected=False),
  "heun_sde": _build("heun_sde", corrected=True),
}
