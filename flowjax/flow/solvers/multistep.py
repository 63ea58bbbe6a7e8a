"""Adams-Bashforth: a step over the polynomial through the last velocities.

With h the step ahead and h_0, h_1 those behind, the velocities k_0, k_1, k_2
at t and before it are interpolated and integrated over the step, whatever the
grid (Hairer, Norsett and Wanner, Solving Ordinary Differential Equations I,
III.5):

  x(t + h) = x + h k_0 + h^2 / 2 d_1 + (h^3 / 3 + h_0 h^2 / 2) d_2
  d_1 = (k_0 - k_1) / h_0,   d_2 = (d_1 - (k_1 - k_2) / h_1) / (h_0 + h_1)

One evaluation per step buys order 2 or 3. A method of order p needs starting
values of order p - 1. Order 2 starts with Euler; order 3 with a step of Heun,
whose second evaluation is the only one beyond one per step, and one of order 2.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from flowjax.flow.solvers import linear


class Memory(NamedTuple):
  """Velocities and the steps that followed them, the newest first."""

  velocities: tuple[Any, ...]
  steps: tuple[jax.Array, ...]


@dataclasses.dataclass(frozen=True)
class AdamsBashforth:
  """Integrates a velocity with order 2 or 3 on a grid of any spacing."""

  name: str
  order: int
  prediction: str = "velocity"

  def init(self, x: Any, rng: jax.Array | None) -> Memory:
    """Returns room for the velocities before the current one."""
    del rng
    nothing = jax.tree.map(jnp.zeros_like, x)
    one = jnp.ones((), linear.dtype(x))
    return Memory((nothing,) * (self.order - 1), (one,) * (self.order - 1))

  def evaluations(self, count: int) -> int:
    """Returns one per step, and one more to start order 3."""
    return count + (1 if self.order == 3 else 0)

  def step(
    self, field: Any, x: Any, memory: Memory, step: Any
  ) -> tuple[Any, Memory]:
    """Moves x over the step by what the last velocities extrapolate to."""
    h = (step.t_next - step.t).astype(linear.dtype(x))
    slope = linear.like(x, field(x, step.t))
    first = step.number == 0
    slopes = (slope, *memory.velocities)
    if self.order == 2:
      weights = _second(h, *memory.steps)
      weights = linear.select(first, _euler(h), weights)
    else:
      weights = _third(h, *memory.steps)
      lower = _second(h, memory.steps[0])
      weights = linear.select(step.number < 2, lower, weights)
      weights = linear.select(first, [0.5 * h], [*weights])
      slopes += (_ahead(field, x, slope, step, h, first),)
      weights.append(jnp.where(first, 0.5 * h, 0.0))
    x = linear.combine([1.0, *weights], (x, *slopes))
    return x, Memory(
      (slope, *memory.velocities)[: self.order - 1],
      (h, *memory.steps)[: self.order - 1],
    )


def _euler(h):
  return [h]


def _second(h, h_0):
  bend = 0.5 * h * h / h_0
  return [h + bend, -bend]


def _third(h, h_0, h_1):
  curve = (h**3 / 3.0 + 0.5 * h_0 * h**2) / (h_0 + h_1)
  # The factors of (k_0 - k_1) and of (k_1 - k_2).
  near, far = (0.5 * h**2 + curve) / h_0, -curve / h_1
  return [h + near, far - near, -far]


def _ahead(field, x, slope, step, h, first):
  """Returns the velocity at the end of an Euler step, where it is needed."""

  def look():
    ahead = linear.combine([1.0, h], (x, slope))
    return linear.like(x, field(ahead, step.t_next))

  return jax.lax.cond(first, look, lambda: slope)


def ab2(path: Any) -> AdamsBashforth:
  """Builds Adams-Bashforth of order 2, for any path."""
  del path
  return AdamsBashforth(name="ab2", order=2)


def ab3(path: Any) -> AdamsBashforth:
  """Builds Adams-Bashforth of order 3, for any path."""
  del path
  return AdamsBashforth(name="ab3", order=3)


SOLVERS: dict[str, Callable[..., AdamsBashforth]] = {"ab2": ab2, "ab3": ab3}
