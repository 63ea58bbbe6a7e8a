"""A whole sampler: path, prediction, solver, grid and guidance in one value.

Whatever the network predicts, on whatever path it was trained: what it returns
is guided, and converted to what the solver integrates.
"""

# Shape suffixes: B batch. Images have any shape that starts with B.

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flowjax.flow import guidance, guidance_rules, paths, prediction, solvers
from flowjax.flow.solvers import wrapped

# predict(x_t, t_B, cond) -> what the network predicts.
Predict = Callable[[jax.Array, jax.Array, Any], jax.Array]


@dataclasses.dataclass(frozen=True, eq=False)
class Method:
  """How to go along `path` from noise to data.

  `prediction` is what the network predicts, and `trained_on` the path on which
  it learned that, where it is another than the one that is followed. Guidance
  acts for t in `interval`; in the first `still_steps` nothing moves
  (CFG-Zero*'s zero-init). Grid and intervals are times of `path`.
  """

  path: paths.Path
  prediction: str
  solver: solvers.Solver
  grid: np.ndarray
  rule: guidance_rules.Rule
  interval: guidance.Interval = guidance.ALWAYS
  still_steps: int = 0
  push_scale: float = 0.0
  push_interval: guidance.Interval = guidance.ALWAYS
  sigma_data: float = 0.5
  trained_on: paths.Path | None = None

  def __post_init__(self):
    prediction.check(
      self.path,
      self.prediction,
      self.solver.prediction,
      sigma_data=self.sigma_data,
    )
    solvers.check(self.solver, self.path, self.grid, prediction=self.prediction)
    steps = len(self.grid) - 1
    if not 0 <= self.still_steps < steps:
      raise ValueError(
        f"still_steps = {self.still_steps} of the {steps} of this grid cannot "
        "stand still: 0 is none, and at least one step must move."
      )
    self._stepper()

  @property
  def evaluations(self) -> int:
    """How often one unguided sample evaluates the network.

    Raises ValueError where the solver decides that while running.
    """
    return self._stepper().evaluations(len(self.grid) - 1)

  def sample(
    self,
    predict: Predict,
    cond: Any,
    uncond: Any,
    start: jax.Array,
    rng: jax.Array | None = None,
    *,
    degraded: Predict | None = None,
    worse: Predict | None = None,
  ) -> jax.Array:
    """Returns samples from `start`, standard normal or images at t = 1.

    `rng` is one key, or one for each example. `degraded` is the network with
    something taken from it, which `push_scale` pushes away from; `worse` is a
    worse network, guided away from instead of from no condition
    (autoguidance).
    """
    options: Any = {
      "interval": self.interval,
      "path": self.path,
      "prediction": self.prediction,
      "target": self.solver.prediction,
      "sigma_data": self.sigma_data,
    }
    if degraded is not None:
      options["pushes"] = [
        guidance.Push(
          self._on_path(degraded), self.push_scale, self.push_interval
        )
      ]
    field: Any
    predict = self._on_path(predict)
    if worse is None:
      field = guidance.guided(predict, cond, uncond, self.rule, **options)
    else:
      worse = self._on_path(worse)
      field = guidance.autoguided(predict, worse, cond, self.rule, **options)
    solver = self._stepper()
    x = self.path.prior_scale * start
    return solvers.solve(solver, field, x, jnp.asarray(self.grid), rng=rng)

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

  def _stepper(self) -> Any:
    """Returns the solver, with what momentum and steps that rest need."""
    solver: Any = self.solver
    if self.rule.momentum:
      solver = wrapped.Remembering(solver)
    if self.still_steps:
      solver = wrapped.Resting(solver, self.still_steps)
    return solver
