"""Combinations that cannot work are refused, with the reason."""

import numpy as np
import pytest

from flowjax.flow import grids, paths, solvers

DOWN = np.linspace(1.0, 0.0, 5)


def check(name, path, grid, prediction=None, **options):
  path = paths.build(path) if isinstance(path, str) else path
  solver = solvers.build(name, path, **options)
  solvers.check(solver, path, grid, prediction=prediction)


@pytest.mark.parametrize("name", sorted(solvers.SOLVERS))
@pytest.mark.parametrize("path", ["straight", "vp", "ddpm", "edm"])
def test_the_uniform_grid_suits_every_solver_on_every_path(name, path):
  path = paths.build(path)
  solver = solvers.build(name, path)
  solvers.check(solver, path, grids.build("uniform", path, 8))


@pytest.mark.parametrize(
  "grid,message",
  [
    ([1.0], "at least 2 times"),
    ([[1.0, 0.0]], "shape"),
    ([1.0, 0.5, 0.5, 0.0], "times 1 and 2 are 0.5 and 0.5"),
    ([1.0, 0.5, 0.6, 0.0], "times 1 and 2 are 0.5 and 0.6"),
    ([0.0, 0.5, 0.4, 1.0], "times 1 and 2 are 0.5 and 0.4"),
    ([1.0, np.nan, 0.0], "times 0 and 1 are 1 and nan"),
    ([1.2, 0.5, 0.0], "t = 1.2 lies outside"),
    ([0.5, -0.1], "t = -0.1 lies outside"),
  ],
)
def test_grids_that_do_not_run_one_way_are_refused(grid, message):
  with pytest.raises(ValueError, match=message):
    check("euler", "straight", grid)


def test_the_field_stays_where_it_was_trained():
  # heun looks at the last time; ddim does not, and ends in data all the same.
  with pytest.raises(ValueError, match="evaluated at t = 0: let"):
    check("heun", "vp", DOWN)
  check("ddim", "vp", DOWN)
  with pytest.raises(ValueError, match="evaluated at t = 0: let"):
    check("ddim", "vp", DOWN[::-1])
  narrow = paths.build("straight", high=0.9)
  with pytest.raises(ValueError, match="used from t = 0 to 0.9"):
    check("ddim", narrow, DOWN)


@pytest.mark.parametrize(
  "name,options",
  [("ddim", {"eta": 0.3}), ("ddpm", {}), ("dpmpp_sde_2m", {})],
)
def test_noise_is_drawn_on_the_way_down_alone(name, options):
  check(name, "straight", DOWN, **options)
  with pytest.raises(ValueError, match="this one rises from 0 to 1"):
    check(name, "straight", DOWN[::-1], **options)
  check("ddim", "straight", DOWN[::-1])


@pytest.mark.slow
@pytest.mark.parametrize("prediction", ["noise", "score"])
def test_noise_cannot_be_predicted_from_noise_alone(prediction):
  zero = paths.build("scaled_linear", zero_terminal_snr=True)
  for path in (zero, paths.straight()):
    with pytest.raises(ValueError, match="x_t is pure noise there"):
      check("ddim", path, DOWN, prediction)
    check("ddim", path, DOWN, "velocity")
    check("ddim", path, [0.999, 0.5, 0.0], prediction)
    # Encoding does not look at its end, unless the method looks ahead.
    check("euler", path, DOWN[::-1], prediction)
    with pytest.raises(ValueError, match="x_t is pure noise there"):
      check("heun", path, DOWN[::-1], prediction)
  check("ddim", "scaled_linear", DOWN, prediction)


@pytest.mark.parametrize("name", ["heun", "rk4"])
@pytest.mark.parametrize("path", ["straight", "gvp", "vp", "cosine"])
def test_data_are_not_divided_by_no_noise(path, name):
  def ends(low):
    made = paths.build(path, low=low)
    check(name, made, grids.build("uniform", made, 8), "data")

  with pytest.raises(ValueError, match="predicts data would be.*ddim"):
    ends(None)
  ends(1e-3)


def test_data_are_followed_to_the_end_by_what_does_not_look_there():
  for name in ("euler", "midpoint", "ddim", "dpmpp_2m"):
    check(name, "straight", DOWN, "data")
  for prediction in ("velocity", "v", "edm"):
    check("heun", "straight", DOWN, prediction)
  with pytest.raises(ValueError, match="evaluated at t = 0 of"):
    check("euler", "straight", DOWN[::-1], "data")
