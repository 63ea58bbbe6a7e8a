"""A whole sampler: path, prediction, solver, grid and guidance in one value.

Whatever the network predicts, on whatever path it was trained: what it returns
is guided, and converted to what the solver integrates.
"""

# Shape suffixes: B batch. Images have any shape that starts with B.

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flowjax.flow import (
  editing,
  guidance,
  guidance_rules,
  paths,
  prediction,
  solvers,
)
from flowjax.flow.solvers import adaptive, wrapped

# predict(x_t, t_B, cond) -> what the network predicts; (that, v) where the
# solver wants its learned variance.
Predict = guidance.Predict


# Of the size that x starts with, what must be left where a rest ends.
RESTED = 0.74


@dataclasses.dataclass(frozen=True, eq=False)
class Method:
  """How to go along `path` from noise to data.

  `prediction` is what the network predicts, and `trained_on` the path on which
  it learned that, where it is another than the one that is followed. Guidance
  acts for t in `interval`; in the first `still_steps` nothing moves
  (CFG-Zero*'s zero-init). Grid and intervals are times of `path`. What is
  `begun` starts from images with the noise of the grid's first time.
  """

  path: paths.Path
  prediction: str
  solver: solvers.Solver
  grid: np.ndarray
  rule: guidance_rules.Rule
  interval: guidance.Interval = guidance.ALWAYS
  still_steps: int = 0
  sigma_data: float = 0.5
  trained_on: paths.Path | None = None
  begun: bool = False

  def __post_init__(self):
    prediction.check(
      self.path,
      self.prediction,
      self.solver.prediction,
      sigma_data=self.sigma_data,
    )
    solvers.check(self.solver, self.path, self.grid, prediction=self.prediction)
    if self.learns_variance and self.trained_on is not None:
      raise ValueError(
        "A learned variance is that of steps along the path of training, and "
        f"another, {self.path.name!r}, is to be followed: take the variance "
        "'small' or 'large', or the path of training."
      )
    steps = len(self.grid) - 1
    if not 0 <= self.still_steps < steps:
      raise ValueError(
        f"still_steps = {self.still_steps} of the {steps} of this grid cannot "
        "stand still: 0 is none, and at least one step must move."
      )
    self._check_rest()
    if self.rule.told and self.interval != guidance.ALWAYS:
      raise ValueError(
        f"interval = {self.interval} has no effect on guidance that is told to "
        "the network: leave it out."
      )
    self._stepper(self.rule)

  @property
  def learns_variance(self) -> bool:
    """Whether the network has to say (prediction, v)."""
    return getattr(self.solver, "learns_variance", False)

  @property
  def evaluations(self) -> int:
    """How often one unguided sample evaluates the network.

    Raises ValueError where the solver decides that while running.
    """
    return self._stepper(self.rule).evaluations(len(self.grid) - 1)

  def sample(
    self,
    predict: Predict,
    cond: Any,
    uncond: Any,
    start: jax.Array,
    rng: jax.Array | None = None,
    edit: editing.Edit | None = None,
    **options: Any,
  ) -> jax.Array:
    """Returns samples from `start`, standard normal or images at t = 1.

    `rng` is one key, or one for each example; of an `edit`, `start` is the
    noise. Options are those of `field`.
    """
    field = self.field(predict, cond, uncond, **options)
    solver, x, times = self._begin(field, start, edit)
    field = self._kept(field, edit)
    return self._end(solvers.solve(solver, field, x, times, rng=rng), edit)

  def reported(
    self,
    field: guidance.Guided,
    start: jax.Array,
    rng: jax.Array | None = None,
    edit: editing.Edit | None = None,
  ) -> tuple[jax.Array, adaptive.Report | None]:
    """Returns samples along a field of this method, and how the solve went.

    There is a report where the solver chooses its own steps. If it says that
    the end was not reached, the samples are nan, and `reason` says why.
    """
    solver, x, times = self._begin(field, start, edit)
    kept = self._kept(field, edit)
    if hasattr(solver, "integrate"):
      end, report = solver.integrate(kept, x, times)
      return self._end(end, edit), report
    end = solvers.solve(solver, kept, x, times, rng=rng)
    return self._end(end, edit), None

  def reason(
    self,
    field: guidance.Guided,
    report: adaptive.Report,
    edit: editing.Edit | None = None,
  ) -> str:
    """Says at which time a solve stopped, and why; outside of jit."""
    solver: Any = self.solver
    return solver.reason(self._kept(field, edit), self.grid, report)

  @property
  def rises(self) -> bool:
    """Whether this is the way from data to noise."""
    return bool(self.grid[-1] > self.grid[0])

  def _begin(
    self,
    field: guidance.Guided,
    start: jax.Array,
    edit: editing.Edit | None = None,
  ) -> tuple:
    if self.begun and edit is None:
      raise ValueError(
        f"This grid starts from images at t = {self.grid[0]:g}: give edit=."
      )
    x = start if self.rises else self.path.prior_scale * start
    times = jnp.asarray(self.grid)
    if self.begun and edit is not None:
      x = edit.at(self.path, times[0])
    return self._stepper(field.rule), x, times

  def _kept(self, field: Any, edit: editing.Edit | None) -> Any:
    """Returns the field, which sees the pixels that are kept, if any are."""
    if edit is None or edit.mask is None:
      return field
    return editing.Kept(field, edit, self.path)

  def _end(self, x: jax.Array, edit: editing.Edit | None = None) -> jax.Array:
    x = x / self.path.prior_scale if self.rises else x
    return x if edit is None else edit.keep(x, edit.image)

  def field(
    self,
    predict: Predict,
    cond: Any,
    uncond: Any,
    *,
    scale: guidance_rules.Scale | None = None,
    pushes: Sequence[guidance.Push] = (),
    worse: Predict | None = None,
  ) -> guidance.Guided:
    """Returns the guided field that the solver follows.

    `scale` is in place of that of the rule, as with one for each example;
    `worse` is a worse network, guided away from instead of from no condition
    (autoguidance).
    """
    rule = self.rule
    if scale is not None:
      rule = dataclasses.replace(rule, scale=scale)
    if rule.told and worse is not None:
      raise ValueError(
        "Guidance that is told to the network has no difference from a worse "
        "one to add: leave out the worse network, or take the rule 'cfg'."
      )
    if rule.told:
      cond = guidance.distilled(cond, rule.scale)
    options: Any = {
      "pushes": [
        dataclasses.replace(push, degraded=self._on_path(push.degraded))
        for push in pushes
      ],
      "interval": self.interval,
      "path": self.path,
      "prediction": self.prediction,
      "target": self.solver.prediction,
      "sigma_data": self.sigma_data,
    }
    predict = self._on_path(predict)
    if worse is None:
      return guidance.guided(predict, cond, uncond, rule, **options)
    worse = self._on_path(worse)
    return guidance.autoguided(predict, worse, cond, rule, **options)

  def from_images(self, strength: float) -> "Method":
    """Returns the method that starts from images (flow/editing.py).

    It follows the last `strength` of the grid, as a grid of its own; 1 is all
    of it, from noise. Of the steps that stand still, those that are left do.
    """
    count = editing.skipped(len(self.grid) - 1, strength)
    if not count:
      return self
    solver: Any = self.solver
    return dataclasses.replace(
      self,
      solver=solver.begun() if hasattr(solver, "begun") else solver,
      grid=self.grid[count:],
      still_steps=max(0, self.still_steps - count),
      begun=True,
    )

  def inverse(self) -> "Method":
    """Returns the way back: from data to the noise that they are drawn from.

    The same ODE without guidance, followed up the grid. Raises ValueError for a
    solver that draws noise.
    """
    return dataclasses.replace(
      self,
      grid=self.grid[::-1].copy(),
      rule=guidance_rules.classifier_free(1.0),
      interval=guidance.ALWAYS,
      still_steps=0,
    )

  def _check_rest(self) -> None:
    """Refuses a rest after which x would be far too large for its time."""
    sizes = []
    for t in self.grid[[0, self.still_steps]].tolist():
      with jax.ensure_compile_time_eval():
        alpha, sigma = self.path.alpha(t), self.path.sigma(t)
        sizes.append(math.hypot(float(alpha), float(sigma)))
    if sizes[1] < RESTED * sizes[0]:
      raise ValueError(
        f"still_steps = {self.still_steps}: where this grid goes on, x is to "
        f"be {sizes[1] / sizes[0]:.2g} of its size at the start, and one that "
        f"stood still is not. On the path {self.path.name!r} leave it at 0, or "
        "take more steps; zero-init is for the straight path."
      )

  def _on_path(self, predict: Predict) -> Predict:
    """Returns the network as one that was trained on the path followed."""
    trained_on = self.trained_on
    if trained_on is None:
      return predict

    def followed(x, t_B, cond):
      field = prediction.rescheduled(
        trained_on,
        lambda x, t_B: predict(x, t_B, cond),
        self.path,
        self.prediction,
        sigma_data=self.sigma_data,
      )
      return field(x, t_B)

    return followed

  def _stepper(self, rule: guidance_rules.Rule) -> Any:
    """Returns the solver, with what momentum and steps that rest need."""
    solver: Any = self.solver
    if rule.remembers:
      solver = wrapped.Remembering(solver)
    if self.still_steps:
      solver = wrapped.Resting(solver, self.still_steps)
    return solver
