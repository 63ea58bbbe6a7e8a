"""Grids of times for solvers: where between noise and data the steps end.

A grid is the `steps + 1` times of a solve, in float32, falling from `path.high`
to `path.low`; the spacings of a discrete table alone may start lower, as their
papers have it. It is made on the host in float64 and cast at the end. Reversed,
it encodes.

What the field calls sigma in a grid is the noise for one unit of data,
sigma / alpha: infinite where alpha vanishes. The path's log-SNR inverse gives
the time, so that these grids work on every path.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from flowjax.flow import names, paths, spacings, times

# EDM's sigmas, for paths that reach beyond them (arXiv:2206.00364, table 1).
SIGMA_MIN, SIGMA_MAX = 0.002, 80.0


def build(
  name: str, path: paths.Path, steps: int, **options: Any
) -> np.ndarray:
  """Builds the grid `name` of a path with the options that it takes.

  Raises ValueError for an unknown name or option, or a value out of range.
  """
  given = ("path", "steps")
  factory = names.choose("grid", GRIDS, name, options, given)
  return factory(path, steps, **options)


def check(grid: Any) -> np.ndarray:
  """Returns a grid as float32, or raises ValueError unless it descends."""
  grid = np.asarray(grid, np.float32)
  if grid.ndim != 1 or len(grid) < 2:
    raise ValueError(
      "A grid is a list of at least 2 times, from noise down to data, not "
      f"{grid.tolist()}."
    )
  wrong = np.flatnonzero(~(np.diff(grid) < 0.0))
  if wrong.size or not np.all(np.isfinite(grid)):
    i = int(wrong[0]) if wrong.size else 0
    raise ValueError(
      f"A grid must descend, but time {i} is {grid[i]} and time {i + 1} is "
      f"{grid[i + 1]}: order the times from noise (1) to data (0), take fewer "
      "steps where two coincide, or mend the options that made them."
    )
  return grid


def uniform(path: paths.Path, steps: int, *, shift: float = 1.0) -> np.ndarray:
  """Builds equidistant times, shifted towards noise (arXiv:2403.03206, eq. 23).

  The shift acts on the odds of the way from `low` to `high`, once.
  """
  _check_steps(steps)
  times.check_shift(shift)
  way = times.shift_times(np.linspace(1.0, 0.0, steps + 1), shift)
  return _across(path, way)


def beta(
  path: paths.Path, steps: int, *, a: float = 0.6, b: float = 0.6
) -> np.ndarray:
  """Builds the quantiles of a Beta law (arXiv:2407.12173).

  With both exponents below 1 the times are close at both ends.
  """
  _check_steps(steps)
  _check_exponents(a, b)
  return _across(path, spacings.beta(1.0, 0.0, steps + 1, a, b))


def karras(
  path: paths.Path,
  steps: int,
  *,
  rho: float = 7.0,
  sigma_min: float | None = None,
  sigma_max: float | None = None,
) -> np.ndarray:
  """Builds times whose sigma^(1 / rho) are equidistant.

  sigma_i = (a + i / (n - 1) (b - a))^rho,  a, b = sigma_max, sigma_min to the
  power 1 / rho  (arXiv:2206.00364, eq. 5)

  The n = steps sigmas, and the path's end as the last step, where it goes on
  below sigma_min; where it ends there, steps + 1 sigmas. By default sigma_min
  and sigma_max are the path's own, EDM's where these are 0 or infinite. The
  first time is `path.high`, in place of that of sigma_max.
  """
  _check_above_zero("rho", rho, "7 is EDM's, larger is denser near data")
  spacing = functools.partial(spacings.karras, rho=rho)
  return _by_sigma(path, steps, spacing, sigma_min, sigma_max)


def exponential(
  path: paths.Path,
  steps: int,
  *,
  sigma_min: float | None = None,
  sigma_max: float | None = None,
) -> np.ndarray:
  """Builds times whose log sigma, and so log-SNR, are equidistant.

  Ends and defaults are as for `karras`, of which it is the limit of great rho.
  """
  return _by_sigma(path, steps, spacings.exponential, sigma_min, sigma_max)


def trailing(
  path: paths.Path, steps: int, *, table: int | None = None
) -> np.ndarray:
  """Builds every (N / steps)-th entry of a table of N, from its last.

  The one spacing that starts from pure noise (arXiv:2305.08891, table 2).
  """
  count = _table(path, steps, table)
  indices = np.round(np.arange(count, 0, -count / steps))[:steps] - 1
  return _of_indices(path, indices, count)


def leading(
  path: paths.Path,
  steps: int,
  *,
  table: int | None = None,
  offset: int = 0,
  multistep: bool = False,
) -> np.ndarray:
  """Builds every (N // steps)-th entry of a table of N, from its first.

  DDIM's and Stable Diffusion's (`offset` 1): it starts below the noise that
  the network was trained with. DPM-Solver++ and UniPC in diffusers divide by
  steps + 1 and leave out the first (`multistep`).
  """
  count = _table(path, steps, table)
  if offset < 0:
    raise ValueError(
      f"offset = {offset} would begin below the first entry of the table: it "
      "is 0, or 1 for Stable Diffusion."
    )
  extra = 1 if multistep else 0
  indices = np.arange(steps + extra)[::-1][:steps] * (count // (steps + extra))
  return _of_indices(path, indices + offset, count)


def linspace(
  path: paths.Path,
  steps: int,
  *,
  table: int | None = None,
  multistep: bool = False,
) -> np.ndarray:
  """Builds equidistant entries of a table of N, its first and last included.

  iDDPM's. With `multistep`, of steps + 1 entries all but the first, as
  DPM-Solver++ and UniPC have it in diffusers.
  """
  count = _table(path, steps, table)
  extra = 1 if multistep else 0
  indices = np.linspace(0, count - 1, steps + extra).round()[::-1][:steps]
  return _of_indices(path, indices, count)


def flow_match(
  path: paths.Path,
  steps: int,
  *,
  shift: float = 1.0,
  mu: float | None = None,
  mu_form: str = "exponential",
  source: str = "table",
  terminal: float | None = None,
  spacing: str | None = None,
  table: int = 1000,
  compat: bool = False,
) -> np.ndarray:
  """Builds the sigmas of the discrete Euler method of SD3 and FLUX.

  1. `source`: "table" is `steps` equidistant sigmas from the greatest to the
     least of a table of N, 1 to 1 / N (SD3); "even" from 1 to 1 / steps (FLUX).
  2. Shifted by `shift`, or by `mu`: exp(mu) multiplies the odds, or mu itself
     where `mu_form` is "linear".
  3. Stretched so that they end at `terminal` (LTX-Video).
  4. With `spacing`, placed anew between the first and the last: "karras",
     "exponential" or "beta".
  5. A last step to 0.

  With `compat` these are the numbers of FlowMatchEulerDiscreteScheduler in
  diffusers to the bit: in the precisions that it computes in, and where `shift`
  meets "table", with the ends of the table shifted already, so that its end is
  shifted twice. SD3's samples are made so. Without, every sigma is shifted
  once.
  """
  _check_flow_match(path, steps, shift, mu, mu_form, source, terminal, spacing)
  if source == "table":
    _table(path, steps, table)
  if source == "even":
    sigma = np.linspace(1.0, 1.0 / steps, steps)
    sigma = sigma.astype(np.float32) if compat else sigma
  else:
    ends = np.array([1.0, 1.0 / table])
    if compat:
      ends = _table_ends(ends, shift)
    sigma = np.linspace(ends[0] * table, ends[1] * table, steps) / table

  if mu is None:
    sigma = shift * sigma / (1 + (shift - 1) * sigma)
  else:
    odds = math.exp(mu) if mu_form == "exponential" else float(mu)
    sigma = odds / (odds + (1 / sigma - 1) ** 1.0)
  if terminal is not None:
    rest = 1 - sigma
    sigma = 1 - rest / (rest[-1] / (1 - terminal))
  if spacing is not None:
    place = spacings.SPACINGS[spacing]
    sigma = place(sigma[0].item(), sigma[-1].item(), steps)
  return check(np.append(sigma.astype(np.float32), np.float32(0.0)))


# Factories of grids, factory(path, steps, **options), by the name in a config.
GRIDS: dict[str, Callable[..., np.ndarray]] = {
  "uniform": uniform,
  "karras": karras,
  "exponential": exponential,
  "beta": beta,
  "trailing": trailing,
  "leading": leading,
  "linspace": linspace,
  "flow_match": flow_match,
}


def _table_ends(ends: np.ndarray, shift: float) -> np.ndarray:
  """Returns the ends of diffusers' table: shifted, and rounded to float32."""
  ends = ends.astype(np.float32)
  return (shift * ends / (1 + (shift - 1) * ends)).astype(np.float64)


def _across(path: paths.Path, way: np.ndarray) -> np.ndarray:
  """Places the way from 1 to 0 between the ends of the path."""
  grid = path.low + (path.high - path.low) * way
  grid[0], grid[-1] = path.high, path.low
  return check(grid)


def _by_sigma(
  path: paths.Path,
  steps: int,
  spacing: spacings.Spacing,
  sigma_min: float | None,
  sigma_max: float | None,
) -> np.ndarray:
  _check_steps(steps)
  least, most = _sigmas(path, np.array([path.low, path.high]))
  if sigma_max is None:
    sigma_max = most if math.isfinite(most) else SIGMA_MAX
  if sigma_min is None:
    sigma_min = least if least > 0.0 else SIGMA_MIN
  # One part in 1e5, for ends that were rounded on the way here.
  if not (
    least * (1.0 - 1e-5) <= sigma_min < sigma_max <= most * (1.0 + 1e-5)
    and sigma_min > 0.0
  ):
    raise ValueError(
      f"The sigmas of a grid on the path {path.name!r} must rise within "
      f"[{least:.6g}, {most:.6g}], above 0; not from sigma_min = {sigma_min} "
      f"to sigma_max = {sigma_max}."
    )
  goes_on = least < sigma_min * (1.0 - 1e-5)
  count = steps if goes_on else steps + 1
  grid = np.empty(steps + 1)
  grid[:count] = _times_of(path, spacing(sigma_max, sigma_min, count))
  grid[0], grid[-1] = path.high, path.low
  return check(grid)


def _sigmas(path: paths.Path, t: np.ndarray) -> np.ndarray:
  """Returns sigma / alpha in float64."""
  with jax.enable_x64(True), jax.ensure_compile_time_eval():
    log_snr = jax.jit(path.log_snr)(t)
    return np.exp(-0.5 * np.asarray(log_snr, np.float64))


def _times_of(path: paths.Path, sigma: np.ndarray) -> np.ndarray:
  """Returns the times at which sigma / alpha is this, in float64."""
  with jax.enable_x64(True), jax.ensure_compile_time_eval():
    t = jax.jit(path.log_snr_inverse)(-2.0 * np.log(sigma))
    return np.asarray(t, np.float64)


def _of_indices(
  path: paths.Path, indices: np.ndarray, count: int
) -> np.ndarray:
  """Returns the times (i + 1) / N of table entries, and the path's end."""
  if indices[0] > count - 1:
    raise ValueError(
      f"Entry {int(indices[0])} is beyond a table of {count}: take a smaller "
      "offset or more steps."
    )
  return check(np.append((indices + 1.0) / count, path.low))


def _table(path: paths.Path, steps: int, table: int | None) -> int:
  """Returns the length of the path's table, or the one that is given."""
  _check_steps(steps)
  count = path.steps if table is None else table
  if count is not None and count < 1:
    raise ValueError(
      f"table = {table} entries: a table has at least 1, often 1000."
    )
  if count is None:
    raise ValueError(
      f"The path {path.name!r} is not made of a table, and this grid picks "
      "entries of one: give table=, the steps it was trained with, often 1000."
    )
  if path.steps not in (None, count):
    raise ValueError(
      f"The table of the path {path.name!r} has {path.steps} entries, not "
      f"table = {table}; leave table out."
    )
  if steps > count:
    raise ValueError(
      f"{steps} steps are more than the {count} entries of the table: take at "
      f"most {count}."
    )
  return count


def _check_flow_match(
  path, steps, shift, mu, mu_form, source, terminal, spacing
) -> None:
  _check_steps(steps)
  times.check_shift(shift)
  if path.name != "straight":
    raise ValueError(
      "The sigmas of flow_match are times of the straight path, not of "
      f"{path.name!r}: use the uniform grid with a shift there."
    )
  if mu is not None and shift != 1.0:
    raise ValueError(
      f"shift = {shift} and mu = {mu} both shift the times: give one of them; "
      "mu is the logarithm of the shift."
    )
  if mu_form not in ("exponential", "linear"):
    raise ValueError(
      f"mu_form must be 'exponential' or 'linear', not {mu_form!r}."
    )
  if mu is not None and not math.isfinite(mu):
    raise ValueError(
      f"mu = {mu} must be a finite number; FLUX's is 0.5 to 1.15."
    )
  if mu is not None and mu_form == "linear":
    _check_above_zero("mu", mu, "a linear mu is the shift itself")
  if source not in ("table", "even"):
    raise ValueError(
      f"source must be 'table' (SD3) or 'even' (FLUX), not {source!r}."
    )
  if terminal is not None and not (0.0 < terminal < 1.0 and steps > 1):
    raise ValueError(
      f"terminal = {terminal} is where the last but one of several times is "
      f"stretched to, within (0, 1), and there is {steps} step(s); 0.1 is "
      "LTX-Video's."
    )
  if spacing is not None:
    names.choose("spacing", spacings.SPACINGS, spacing, ())


def _check_steps(steps: int) -> None:
  if steps < 1:
    raise ValueError(f"A grid needs at least 1 step, not {steps}.")


def _check_exponents(a: float, b: float) -> None:
  _check_above_zero("a", a, "0.6 is usual")
  _check_above_zero("b", b, "0.6 is usual")


def _check_above_zero(name: str, value: float, usual: str) -> None:
  if not 0.0 < value < math.inf:
    raise ValueError(f"{name} must be above 0, not {value}; {usual}.")
