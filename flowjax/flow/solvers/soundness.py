"""Whether a solver, a path, a grid and a network go together."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flowjax.flow import paths
from flowjax.flow import prediction as predictions

# An error of a network is not to be multiplied by more, at any time.
STEEP = 1e4
# Times are float32: what a path's end loses when it is rounded to that.
ROUNDING = 1e-6


def check(
  solver: Any, path: paths.Path, grid: Any, *, prediction: str | None = None
) -> None:
  """Raises ValueError where following `grid` with `solver` is unsound.

  `prediction` is what the network predicts, where that is known. Refused are:

  - a grid that turns back, leaves [0, 1], or has the field evaluated outside
    of [path.low, path.high], for which no network is trained;
  - a method that draws noise on a grid that rises towards noise;
  - a network that predicts noise, or score, evaluated where alpha = 0: x_t
    holds no data there, and the noise in it says nothing about them;
  - one that predicts data, followed by velocity where sigma is all but 0: the
    velocity there is its error divided by sigma.
  """
  if hasattr(solver, "grid"):
    with jax.ensure_compile_time_eval():
      grid = solver.grid(jnp.asarray(grid))
  times = np.asarray(grid, np.float64)
  _check_order(solver, times)
  evaluated = times if _looks_ahead(solver) else times[:-1]
  _check_range(path, times, evaluated)
  if prediction in ("noise", "score"):
    _check_data(prediction, path, evaluated)
  if prediction == "data" and solver.prediction != "data":
    _check_slope(solver, path, evaluated)


def _check_data(
  prediction: str, path: paths.Path, evaluated: np.ndarray
) -> None:
  with jax.ensure_compile_time_eval():
    alpha = np.asarray(jax.jit(path.alpha)(evaluated.astype(np.float32)))
  blind = evaluated[alpha == 0.0]
  if blind.size:
    raise ValueError(
      f"A network that predicts {prediction} cannot be followed from t = "
      f"{blind[0]:g} on the path {path.name!r}: x_t is pure noise there, and "
      "that says nothing about the data. Train for 'v', 'velocity' or 'data', "
      "or stay below (paths.build(..., high=0.999))."
    )


def _check_order(solver: Any, times: np.ndarray) -> None:
  if times.ndim != 1 or len(times) < 2:
    raise ValueError(
      "A grid is a list of at least 2 times, one more than there are steps, "
      f"not of shape {times.shape}."
    )
  steps = np.diff(times)
  rises = bool(steps[0] > 0.0)
  wrong = np.flatnonzero(~((steps > 0.0) if rises else (steps < 0.0)))
  if wrong.size:
    i = int(wrong[0])
    raise ValueError(
      f"A grid must fall throughout, or rise throughout, but times {i} and "
      f"{i + 1} are {times[i]:g} and {times[i + 1]:g}: sort the times, or take "
      "fewer steps where two coincide."
    )
  if rises and getattr(solver, "stochastic", False):
    raise ValueError(
      f"The solver {solver.name!r} draws noise and follows the grid down, from "
      f"noise to data; this one rises from {times[0]:g} to {times[-1]:g}. To "
      "encode, take a deterministic one: ddim with eta = 0, heun, dpmpp_2m."
    )


def _check_range(
  path: paths.Path, times: np.ndarray, evaluated: np.ndarray
) -> None:
  for t in times:
    if not 0.0 <= t <= 1.0:
      raise ValueError(
        f"t = {t:g} lies outside of [0, 1]: 0 is data and 1 is noise."
      )
  low, high = path.low - ROUNDING, path.high + ROUNDING
  for t in evaluated:
    if not low <= t <= high:
      raise ValueError(
        f"The path {path.name!r} is used from t = {path.low:g} to "
        f"{path.high:g}, and the field would be evaluated at t = {t:g}: let "
        "the grid start and end there (grids.build does)."
      )


def _check_slope(solver: Any, path: paths.Path, evaluated: np.ndarray) -> None:
  @jax.jit  # One program, and not one for each operation.
  def slope(t):
    one = jnp.ones_like(t)
    return predictions.convert(
      path, "data", solver.prediction, one, 0.0 * one, t
    )

  with jax.ensure_compile_time_eval():
    slopes = np.abs(np.asarray(slope(evaluated.astype(np.float32))))
  worst = int(np.argmax(slopes))
  if slopes[worst] > STEEP:
    raise ValueError(
      f"The solver {solver.name!r} follows {solver.prediction}, and a network "
      f"that predicts data would be evaluated at t = {evaluated[worst]:g} of "
      f"the path {path.name!r}, where its error is multiplied by "
      f"{slopes[worst]:.0e}: take ddim or dpmpp_2m, which follow data, or let "
      "the path begin later, as with low=1e-3."
    )


def _looks_ahead(solver: Any) -> bool:
  """Whether the last step evaluates the field at its end, too."""
  nodes = getattr(solver, "nodes", (0.0,))
  return hasattr(solver, "run") or max(nodes) == 1.0
