"""A whole sampler: path, prediction, solver, grid and guidance in one value.

Whatever the network predicts, on whatever path it was trained: what it returns
is converted to what the solver integrates, and guided.
"""

# Shape suffixes: B batch. Images have any shape that starts with B.

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flowjax.flow import guidance, guidance_rules, paths, prediction, solvers

# predict(x_t, t_B, cond) -> what the network predicts.
Predict = Callable[[jax.Array, jax.Array, Any], jax.Array]


@dataclasses.dataclass(frozen=True, eq=False)
class Method:
  """How to go from noise to data with a network trained on `path`.

  `prediction` is what the network predicts. Guidance acts for t in `interval`;
  above the time `still_above` nothing moves (CFG-Zero*'s zero-init).
  """

  path: paths.Path
  prediction: str
  solver: solvers.Solver
  grid: np.ndarray
  rule: guidance_rules.Rule
  interval: guidance.Interval = guidance.ALWAYS
  still_above: float = 1.0
  push_scale: float = 0.0
  push_interval: guidance.Interval = guidance.ALWAYS
  sigma_data: float = 0.5

  def __post_init__(self):
    prediction.check(
      self.path,
      self.prediction,
      self.solver.prediction,
      sigma_data=self.sigma_data,
    )
    solvers.check(self.solver, self.path, self.grid, prediction=self.prediction)
    self._remembering()

  @property
  def evaluations(self) -> int:
    """How often one unguided sample evaluates the network.

    Raises ValueError where the solver decides that while running.
    """
    return self.solver.evaluations(len(self.grid) - 1)

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
    space: Any = {"path": self.path, "prediction": self.solver.prediction}
    options = {"interval": self.interval, **space}
    if degraded is not None:
      options["pushes"] = [
        guidance.Push(
          self._converted(degraded), self.push_scale, self.push_interval
        )
      ]
    strong = self._converted(predict)
    field: Any
    if worse is None:
      field = guidance.guided(strong, cond, uncond, self.rule, **options)
    else:
      weak = self._converted(worse)
      field = guidance.autoguided(strong, weak, cond, self.rule, **options)
    if self.still_above < self.path.high:
      field = guidance.zero_init(field, self.still_above, **space)
    solver = self._remembering()
    x = self.path.prior_scale * start
    return solvers.solve(solver, field, x, jnp.asarray(self.grid), rng=rng)

  def _remembering(self) -> Any:
    """Returns the solver, with the memory that guidance of momentum needs."""
    if self.rule.momentum:
      return guidance.Remembering(self.solver)
    return self.solver

  def _converted(self, predict: Predict) -> Predict:
    return prediction.field(
      predict,
      self.path,
      self.prediction,
      self.solver.prediction,
      sigma_data=self.sigma_data,
    )
