"""DPM-Solver++: multistep methods for a data prediction, in log-SNR.

With D_0 the data predicted now, D_1 and D_2 before, at distances h_0 and h_1
in l = log(alpha / sigma), and h the step ahead (arXiv:2211.01095, section 4;
gain = alpha_t h phi_1(-h), see flow/solvers/exponential.py):

  2M  x_t = keep x_s + gain D_0 + gain / 2 (D_0 - D_1) h / h_0
  3M  x_t = keep x_s + gain D_0 + alpha_t h^2 phi_2(-h) D'
            + alpha_t h^3 phi_3(-h) D''

D' and D'' are those of the parabola through D_0, D_1, D_2. 2M's gain / 2 is
alpha_t h phi_2(-h) to the order that counts; `form="heun"` takes the latter.

The code that the paper's authors published, and diffusers after it, take the
second divided difference for D'', which is half of it. That costs the third
order: their error falls like h^2. `compat` does as they do.

SDE-2M is 2M for the reverse-time SDE: the same with 2h for h wherever D is
integrated, and noise (same, section 5). Its order counts steps without noise;
with it the mean and the variance of the samples converge like h.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from flowjax.flow import paths
from flowjax.flow.solvers import exponential, linear, noise

# Below as many steps the last ones are of lower order: it is steadier there.
FEW = 15


class Memory(NamedTuple):
  """What was predicted before, and the key from which noise is drawn."""

  history: exponential.History
  rng: Any


@dataclasses.dataclass(frozen=True)
class DPMSolver:
  """Extrapolates the predicted data by a polynomial in the log-SNR.

  The first step is of order 1 and the second of at most 2, for lack of a past,
  and so is every step to or from an end, where the log-SNR is infinite, or as
  good as that (`exponential.LEAP`). With `lower_order_final` so are, of fewer
  than 15 steps, the last and the last but one.
  """

  name: str
  path: paths.Path
  order: int
  form: str = "midpoint"
  lower_order_final: bool = True
  compat: bool = False
  stochastic: bool = False
  draw: noise.Draw = noise.normal
  prediction: str = "data"

  def init(self, x: Any, rng: jax.Array | None) -> Memory:
    """Returns an empty history, and the key if noise is drawn."""
    key = noise.required(rng, self.name) if self.stochastic else ()
    return Memory(exponential.no_history(x, self.order - 1), key)

  def evaluations(self, count: int) -> int:
    """Returns one per step."""
    return count

  def step(
    self, field: Any, x: Any, memory: Memory, step: Any
  ) -> tuple[Any, Memory]:
    """Moves x to the next time by the highest order that the past allows."""
    over = exponential.interval(self.path, step.t, step.t_next, linear.dtype(x))
    data = linear.like(x, field(x, step.t))
    history = memory.history
    trees = [x, data, *history.values]
    weights = self._weights(over, history, step)
    if self.stochastic:
      trees.append(self.draw(memory.rng, step.number, x))
      weights.append(over.sigma * jnp.sqrt(1.0 - over.decay**2))
    x = linear.combine(weights, trees)
    return x, Memory(history.push(data, over.clock), memory.rng)

  def _weights(self, over, history, step):
    """Returns the weights of x and of the data predicted now and before."""
    order = exponential.order(self._most(step), over, history)
    keep, gain, h = over.keep, over.gain, over.h
    if self.stochastic:
      keep, gain = keep * over.decay, gain * (1.0 + over.decay)
      h = 2.0 * h
    _, phi_2, phi_3 = exponential.phis(-h, 3)
    slope = over.alpha * h * phi_2
    behind = over.clock - history.clocks[0]
    lean = (slope if self.form == "heun" else 0.5 * gain) * over.h / behind
    weights = linear.select(order == 2, [gain + lean, -lean], [gain])
    if self.order == 3:
      bend = (1.0 if self.compat else 2.0) * over.alpha * h * phi_3
      parabola = self._parabola(over, history, gain, slope, bend)
      weights = linear.select(order == 3, parabola, weights)
    return [keep, *weights]

  def _parabola(self, over, history, gain, slope, bend):
    near = (over.clock - history.clocks[0]) / over.h
    far = (history.clocks[0] - history.clocks[1]) / over.h
    # The factors of (D_0 - D_1) and (D_1 - D_2): first and second differences.
    curve = (slope * near + bend) / (near + far)
    one, two = (slope + curve) / near, -curve / far
    return [gain + one, two - one, -two]

  def _most(self, step):
    """Returns the order that the end of the grid allows."""
    if not self.lower_order_final or step.total >= FEW:
      return self.order
    return jnp.minimum(self.order, step.total - step.number)


def dpmpp_2m(
  path: paths.Path, form: str = "midpoint", lower_order_final: bool = True
) -> DPMSolver:
  """Builds DPM-Solver++(2M)."""
  return DPMSolver("dpmpp_2m", path, 2, _form(form), lower_order_final)


def dpmpp_3m(
  path: paths.Path, lower_order_final: bool = True, compat: bool = False
) -> DPMSolver:
  """Builds DPM-Solver++(3M); `compat` halves D'' as diffusers does."""
  return DPMSolver(
    "dpmpp_3m", path, 3, "midpoint", lower_order_final, compat=compat
  )


def dpmpp_sde_2m(
  path: paths.Path, form: str = "midpoint", lower_order_final: bool = True
) -> DPMSolver:
  """Builds SDE-DPM-Solver++(2M), which draws noise."""
  return DPMSolver(
    "dpmpp_sde_2m", path, 2, _form(form), lower_order_final, stochastic=True
  )


def _form(form: str) -> str:
  if form not in ("midpoint", "heun"):
    raise ValueError(
      f"There is no form {form!r} of DPM-Solver++(2M): it must be 'midpoint' "
      "or 'heun'."
    )
  return form


SOLVERS: dict[str, Callable[..., DPMSolver]] = {
  "dpmpp_2m": dpmpp_2m,
  "dpmpp_3m": dpmpp_3m,
  "dpmpp_sde_2m": dpmpp_sde_2m,
}
