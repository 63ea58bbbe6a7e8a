"""Solvers around solvers: with a memory of guidance, or at rest at first."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class _Wrapped:
  """Is what the solver inside is, but for what a subclass says."""

  solver: Any

  def __post_init__(self):
    if hasattr(self.solver, "run"):
      raise ValueError(
        f"The solver {self.solver.name!r} chooses its own steps, and this "
        "guidance is defined for those of a grid: take another, as 'heun'."
      )

  def __getattr__(self, name: str) -> Any:
    # `name`, `prediction`, and what else a solver may have: `grid`, ...
    if name.startswith("_") or name in ("solver", "steps"):
      raise AttributeError(name)
    return getattr(self.solver, name)


@dataclasses.dataclass(frozen=True)
class Remembering(_Wrapped):
  """A solver that carries the memory of guidance with momentum.

  The field is a `guidance.Guided` in terms of the solver's own prediction. All
  stages of a step see the sum that the step before left, and the first one,
  which stands at the beginning of the step, makes the sum that the next sees.
  """

  def init(self, x: jax.Array, rng: jax.Array | None) -> Any:
    """Returns the solver's memory, and an empty sum."""
    return self.solver.init(x, rng), jnp.zeros_like(x)

  def step(
    self, field: Any, x: jax.Array, memory: Any, step: Any
  ) -> tuple[jax.Array, Any]:
    """Moves x by a step of the solver."""
    inner, total = memory
    totals = []

    def remembering(x, t):
      value, following = field.remember(x, t, total)
      totals.append(following)
      return value

    x, inner = self.solver.step(remembering, x, inner, step)
    return x, (inner, totals[0])


@dataclasses.dataclass(frozen=True)
class Resting(_Wrapped):
  """A solver that stands still in its first `steps`, and evaluates nothing.

  The zero-init of CFG-Zero* (arXiv:2503.18886, section 4.2): a velocity early
  in sampling is worse than none. The solver begins at the step after them, as
  if there had been none before it. Around `Remembering`, not within it.
  """

  steps: int

  def __post_init__(self):
    super().__post_init__()
    if self.steps < 0:
      raise ValueError(
        f"steps = {self.steps} cannot stand still: it must be 0 (none) or more."
      )

  def evaluations(self, count: int) -> int:
    """Returns how often `count` steps evaluate the field."""
    return self.solver.evaluations(count - self.steps)

  def step(
    self, field: Any, x: jax.Array, memory: Any, step: Any
  ) -> tuple[jax.Array, Any]:
    """Moves x by a step of the solver, or not at all."""
    number = step.number - self.steps
    later = step._replace(number=number, total=step.total - self.steps)

    def move(x, memory):
      return self.solver.step(field, x, memory, later)

    def rest(x, memory):
      return x, memory

    return jax.lax.cond(number < 0, rest, move, x, memory)
