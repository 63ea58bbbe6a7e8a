"""Explicit Runge-Kutta methods: a method is its tableau.

  k_i = field(x + h sum_j a_ij k_j, t + c_i h)
  x(t + h) = x + h sum_i b_i k_i

(Hairer, Norsett and Wanner, Solving Ordinary Differential Equations I, II.1).
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax


@dataclasses.dataclass(frozen=True)
class RungeKutta:
  """A tableau: nodes c_i, rows a_ij for j < i, weights b_i, and its order."""

  name: str
  nodes: tuple[float, ...]
  matrix: tuple[tuple[float, ...], ...]
  weights: tuple[float, ...]
  order: int
  prediction: str = "velocity"

  def init(self, x: Any, rng: jax.Array | None) -> tuple[()]:
    """Returns nothing: each step starts afresh."""
    del x, rng
    return ()

  def evaluations(self, count: int) -> int:
    """Returns one per stage and step."""
    return count * len(self.nodes)

  def step(
    self,
    field: Callable[[Any, jax.Array], Any],
    x: Any,
    memory: tuple[()],
    step: Any,
  ) -> tuple[Any, tuple[()]]:
    """Moves x over the step by one evaluation of the field per stage."""
    t, t_next = step.t, step.t_next
    slopes: list[Any] = []
    for node, row in zip(self.nodes, self.matrix, strict=True):
      # Exact at both ends, so that no stage leaves the grid by a rounding.
      t_stage = (1.0 - node) * t + node * t_next
      slopes.append(field(_advance(x, t_next - t, row, slopes), t_stage))
    return _advance(x, t_next - t, self.weights, slopes), memory


def _advance(
  x: Any, h: jax.Array, weights: Sequence[float], slopes: Sequence[Any]
) -> Any:
  """Returns x + h sum_j weights_j slopes_j, in the dtype of x."""
  used = [(w, k) for w, k in zip(weights, slopes, strict=True) if w != 0.0]
  if not used:
    return x
  factors, slopes = zip(*used, strict=True)

  def leaf(x, *slopes):
    pairs = zip(factors, slopes, strict=True)
    return x + h.astype(x.dtype) * sum(w * k.astype(x.dtype) for w, k in pairs)

  return jax.tree.map(leaf, x, *slopes)


euler = RungeKutta(
  name="euler", nodes=(0.0,), matrix=((),), weights=(1.0,), order=1
)

midpoint = RungeKutta(
  name="midpoint",
  nodes=(0.0, 1 / 2),
  matrix=((), (1 / 2,)),
  weights=(0.0, 1.0),
  order=2,
)

# The trapezoidal rule with an Euler step for its far end.
heun = RungeKutta(
  name="heun",
  nodes=(0.0, 1.0),
  matrix=((), (1.0,)),
  weights=(1 / 2, 1 / 2),
  order=2,
)

rk4 = RungeKutta(
  name="rk4",
  nodes=(0.0, 1 / 2, 1 / 2, 1.0),
  matrix=((), (1 / 2,), (0.0, 1 / 2), (0.0, 0.0, 1.0)),
  weights=(1 / 6, 1 / 3, 1 / 3, 1 / 6),
  order=4,
)


def _on_any_path(method: RungeKutta) -> Callable[..., RungeKutta]:
  return lambda path: method


SOLVERS = {
  method.name: _on_any_path(method) for method in (euler, midpoint, heun, rk4)
}
