"""Grids: their ends, their spacing, and the numbers of diffusers to the bit."""

import itertools
import math

import jax
import numpy as np
import pytest
import scipy.stats

from flowjax.flow import grids, paths, spacings, times

STRAIGHT = paths.straight()
ON_ALL_PATHS = ("uniform", "karras", "exponential", "beta")


def log_sigma(path, grid):
  with jax.enable_x64(True):
    log_snr = jax.jit(path.log_snr)(np.asarray(grid, np.float64))
    return -0.5 * np.asarray(log_snr)


@pytest.mark.parametrize("name", ON_ALL_PATHS)
@pytest.mark.parametrize("path", paths.PATHS)
def test_grids_fall_from_end_to_end_of_every_path(path, name):
  path = paths.build(path)
  for steps in (1, 8):
    grid = grids.build(name, path, steps)
    assert grid.shape == (steps + 1,) and grid.dtype == np.float32
    assert grid[0] == np.float32(path.high) and grid[-1] == np.float32(path.low)
    assert np.all(np.diff(grid) < 0.0)


@pytest.mark.parametrize("shift", [0.3, 1.0, 3.0])
def test_the_uniform_grid_is_the_plain_one(shift):
  grid = grids.build("uniform", STRAIGHT, 50, shift=shift)
  np.testing.assert_array_equal(grid, times.uniform_grid(50, shift))


@pytest.mark.parametrize("path, rho", [("vp", 7.0), ("straight", 3.0)])
def test_karras_is_equation_5_of_edm(path, rho):
  path = paths.build(path)
  options = {"sigma_min": 0.02, "sigma_max": 60.0}
  grid = grids.karras(path, 12, rho=rho, **options)
  i = np.arange(12) / 11
  roots = 60 ** (1 / rho) + i * (0.02 ** (1 / rho) - 60 ** (1 / rho))
  # The first is the path's own end, and the last step goes on to the other.
  found = np.exp(log_sigma(path, grid[1:12]))
  np.testing.assert_allclose(found, roots[1:] ** rho, rtol=2e-5)


def test_karras_on_the_path_of_edm_is_uniform():
  path = paths.build("edm")
  np.testing.assert_allclose(
    grids.karras(path, 18), grids.uniform(path, 18), atol=1e-6
  )


def test_exponential_steps_lower_the_log_snr_evenly():
  path = paths.build("ve")
  steps = np.diff(log_sigma(path, grids.exponential(path, 10)))
  np.testing.assert_allclose(steps, steps[0], rtol=1e-5)


def test_great_rho_is_exponential():
  path = paths.build("sub_vp")
  options = {"sigma_min": 0.01, "sigma_max": 80.0}
  np.testing.assert_allclose(
    grids.karras(path, 9, rho=1e6, **options),
    grids.exponential(path, 9, **options),
    atol=1e-5,
  )


def test_beta_grids_are_quantiles():
  p = np.linspace(1.0, 0.0, 11)
  found = grids.build("beta", STRAIGHT, 10, a=0.6, b=0.9)
  np.testing.assert_allclose(
    found, scipy.stats.beta.ppf(p, 0.6, 0.9), atol=1e-7
  )
  even = grids.beta(STRAIGHT, 10, a=1.0, b=1.0)
  np.testing.assert_allclose(even, p, atol=1e-7)


@pytest.mark.parametrize("a, b", [(0.6, 0.6), (0.05, 2.0), (30.0, 500.0)])
def test_quantiles_of_beta_are_those_of_scipy(a, b):
  p = np.linspace(0.0, 1.0, 21)
  np.testing.assert_allclose(
    spacings.beta_quantile(p, a, b),
    scipy.stats.beta.ppf(p, a, b),
    atol=1e-12,
  )


def test_spacings_of_a_table():
  path = paths.build("ddpm", steps=10)
  trailing = [1.0, 0.8, 0.5, 0.2, 0.0]
  leading = [0.7, 0.5, 0.3, 0.1, 0.0]
  for name, expected in {
    "trailing": trailing,
    "leading": leading,
    "linspace": [1.0, 0.7, 0.4, 0.1, 0.0],
  }.items():
    grid = grids.build(name, path, 4)
    np.testing.assert_array_equal(grid, np.float32(expected))
  shifted = grids.leading(path, 4, offset=1)
  np.testing.assert_array_equal(shifted[:-1], np.float32(leading[:-1]) + 0.1)


def test_a_table_may_be_laid_over_a_continuous_path():
  np.testing.assert_array_equal(
    grids.trailing(STRAIGHT, 4, table=8), np.float32([1, 0.75, 0.5, 0.25, 0])
  )


def test_trailing_has_as_many_steps_as_are_asked_for():
  # The float step of numpy's arange makes one too many of them at times.
  path = paths.build("ddpm")
  for steps in (61, 103, 887, 998, 1000):
    assert len(grids.trailing(path, steps)) == steps + 1


@pytest.mark.parametrize(
  "steps, options, expected",
  [
    (4, {"shift": 3.0, "compat": True}, [1, 0.857692, 0.602151, 0.008929]),
    (4, {"shift": 3.0}, [1, 0.857326, 0.600719, 0.002994]),
    (4, {"compat": True}, [1, 0.667, 0.334, 0.001]),
    (4, {"mu": 0.5, "source": "even"}, [1, 0.831824, 0.622459, 0.354661]),
    (4, {"mu": 1.15, "source": "even"}, [1, 0.904531, 0.759511, 0.512844]),
    (
      4,
      {"mu": 3.0, "mu_form": "linear", "source": "even"},
      [1, 0.9, 0.75, 0.5],
    ),
    (3, {"source": "even", "terminal": 0.1}, [1, 0.55, 0.1]),
  ],
)
def test_sigmas_of_flow_match(steps, options, expected):
  grid = grids.build("flow_match", STRAIGHT, steps, **options)
  np.testing.assert_allclose(grid, [*expected, 0.0], atol=1e-6)


def test_shifted_once_from_even_sigmas_flow_match_is_the_uniform_grid():
  grid = grids.flow_match(STRAIGHT, 20, shift=3.0, source="even")
  np.testing.assert_allclose(grid, times.uniform_grid(20, 3.0), atol=1e-7)


def test_grids_are_made_inside_of_jit_too():
  path = paths.build("vp")

  @jax.jit
  def shifted(x):
    return x + grids.karras(path, 5)

  np.testing.assert_array_equal(shifted(np.zeros(6)), grids.karras(path, 5))


@pytest.mark.parametrize(
  "make, message",
  [
    (lambda: grids.build("karas", STRAIGHT, 4), "did you mean 'karras'"),
    (lambda: grids.build("beta", STRAIGHT, 4, rho=7.0), "no option 'rho'"),
    *(
      (
        lambda name=name: grids.build(name, paths.build("ddpm"), 0),
        "at least 1 step, not 0",
      )
      for name in grids.GRIDS
    ),
    (lambda: grids.uniform(STRAIGHT, 4, shift=0.0), "above 0, not 0.0"),
    (lambda: grids.flow_match(STRAIGHT, 4, shift=-1.0), "above 0, not -1.0"),
    (lambda: grids.beta(STRAIGHT, 4, a=0.0), "a must be above 0, not 0.0"),
    (lambda: grids.karras(STRAIGHT, 4, rho=0.0), "rho must be above 0"),
    (
      lambda: grids.karras(STRAIGHT, 4, sigma_min=2.0, sigma_max=1.0),
      "not from sigma_min = 2.0 to sigma_max = 1.0",
    ),
    (
      lambda: grids.karras(paths.build("ve"), 4, sigma_max=80.0),
      r"within \[0.01, 50\]",
    ),
    (lambda: grids.trailing(STRAIGHT, 4), "not made of a table"),
    (
      lambda: grids.trailing(paths.build("ddpm"), 4, table=50),
      "has 1000 entries, not table = 50",
    ),
    (lambda: grids.linspace(STRAIGHT, 9, table=8), "more than the 8 entries"),
    (
      lambda: grids.leading(paths.build("ddpm", steps=8), 8, offset=1),
      "Entry 8 is beyond a table of 8",
    ),
    (lambda: grids.flow_match(paths.gvp(), 4), "not of 'gvp'"),
    (
      lambda: grids.flow_match(STRAIGHT, 4, shift=3.0, mu=1.0),
      "both shift the times",
    ),
    (lambda: grids.flow_match(STRAIGHT, 4, mu=1.0, mu_form="log"), "mu_form"),
    (lambda: grids.flow_match(STRAIGHT, 4, source="odd"), "not 'odd'"),
    (lambda: grids.flow_match(STRAIGHT, 1, terminal=0.1), "there is 1 step"),
    (
      lambda: grids.flow_match(STRAIGHT, 4, spacing="karas"),
      "did you mean 'karras'",
    ),
    (lambda: grids.check([0.0, 0.5, 1.0]), "time 0 is 0.0 and time 1 is 0.5"),
    (lambda: grids.check([1.0, 0.5, 0.5]), "time 1 is 0.5 and time 2 is 0.5"),
    (lambda: grids.check([1.0, math.nan, 0.0]), "must descend"),
    (lambda: grids.check([1.0]), "at least 2 times"),
  ],
)
def test_an_impossible_value_is_refused(make, message):
  with pytest.raises(ValueError, match=message):
    make()


def test_a_grid_that_is_given_is_checked_and_cast():
  grid = grids.check([1, 0.5, 0])
  assert grid.dtype == np.float32
  np.testing.assert_array_equal(grid, np.float32([1.0, 0.5, 0.0]))


SHIFTS = [
  *({"shift": shift} for shift in (1.0, 1.7, 3.0, 0.4)),
  *({"mu": mu} for mu in (0.5, 0.63, 1.15)),
  {"mu": 1.15, "mu_form": "linear"},
]


@pytest.mark.slow
@pytest.mark.parametrize("spacing", [None, "karras", "exponential", "beta"])
@pytest.mark.parametrize("source", ["table", "even"])
def test_compat_is_diffusers_to_the_bit(source, spacing):
  diffusers = pytest.importorskip("diffusers")
  # In both each quantile of beta is found by itself, and slowly.
  counts = (1, 2, 7) if spacing == "beta" else (1, 2, 7, 20, 28)
  for steps, options, terminal in itertools.product(
    counts, SHIFTS, (None, 0.1)
  ):
    if terminal is not None and steps == 1:
      continue  # Not a number in diffusers.
    mu = options.get("mu")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(
      shift=options.get("shift", 1.0),
      use_dynamic_shifting=mu is not None,
      time_shift_type=options.get("mu_form", "exponential"),
      shift_terminal=terminal,
      **({f"use_{spacing}_sigmas": True} if spacing else {}),
    )
    if source == "table":
      scheduler.set_timesteps(steps, mu=mu)
    else:
      scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps), mu=mu)
    common = {"source": source, "terminal": terminal, "spacing": spacing}
    grid = grids.flow_match(STRAIGHT, steps, compat=True, **options, **common)
    np.testing.assert_array_equal(grid, scheduler.sigmas.numpy())
    # Shifted once: all but the double shift is the same.
    if source == "even" or mu is not None or options["shift"] == 1.0:
      single = grids.flow_match(STRAIGHT, steps, **options, **common)
      np.testing.assert_allclose(single, grid, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["trailing", "leading", "linspace"])
def test_spacings_are_those_of_ddim(name):
  diffusers = pytest.importorskip("diffusers")
  path = paths.build("ddpm")
  for offset in (0, 1) if name == "leading" else (0,):
    scheduler = diffusers.DDIMScheduler(
      timestep_spacing=name, steps_offset=offset
    )
    for steps in (1, 2, 3, 7, 50, 99, 333, 500):
      options = {"offset": offset} if offset else {}
      scheduler.set_timesteps(steps)
      expected = np.float32((scheduler.timesteps.numpy() + 1) / 1000)
      grid = grids.build(name, path, steps, **options)
      np.testing.assert_array_equal(grid, [*expected, 0.0])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["trailing", "leading", "linspace"])
def test_spacings_are_those_of_multistep_solvers(name):
  diffusers = pytest.importorskip("diffusers")
  options = {} if name == "trailing" else {"multistep": True}
  path = paths.build("ddpm")
  for scheduler in (
    diffusers.DPMSolverMultistepScheduler(timestep_spacing=name),
    diffusers.UniPCMultistepScheduler(timestep_spacing=name),
  ):
    for steps in (1, 2, 7, 20, 50):
      scheduler.set_timesteps(steps)
      expected = np.float32((scheduler.timesteps.numpy() + 1) / 1000)
      grid = grids.build(name, path, steps, **options)
      np.testing.assert_array_equal(grid[:-1], expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["karras", "exponential"])
def test_sigmas_are_those_of_euler_discrete(name):
  diffusers = pytest.importorskip("diffusers")
  scheduler = diffusers.EulerDiscreteScheduler(
    beta_start=0.00085,
    beta_end=0.012,
    beta_schedule="scaled_linear",
    **{f"use_{name}_sigmas": True},
  )
  # Their table is rounded to float32; ours is made of the same numbers.
  path = paths.table(scheduler.alphas_cumprod.double().numpy())
  least = float(np.exp(log_sigma(path, [1 / 1000])[0]))
  for steps in (2, 50):
    scheduler.set_timesteps(steps)
    grid = grids.build(name, path, steps, sigma_min=least)
    sigma = np.exp(log_sigma(path, grid[:-1]))
    np.testing.assert_allclose(sigma, scheduler.sigmas[:-1], rtol=1e-4)
    # Times in float32 are known to 6e-8, which is 6e-5 of their units.
    np.testing.assert_allclose(
      grid[:-1] * 1000 - 1, scheduler.timesteps, atol=2e-3
    )
    first, last = scheduler.sigmas[0].item(), scheduler.sigmas[-2].item()
    own = spacings.SPACINGS[name](first, last, steps)
    np.testing.assert_allclose(own, scheduler.sigmas[:-1], rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["karras", "exponential"])
def test_sigmas_are_those_of_edm(name):
  diffusers = pytest.importorskip("diffusers")
  scheduler = diffusers.EDMEulerScheduler(sigma_schedule=name)
  path = paths.build("edm")
  for steps in (2, 18):
    scheduler.set_timesteps(steps)
    # This path ends at sigma_min, before their last step to 0.
    sigma = np.exp(log_sigma(path, grids.build(name, path, steps - 1)))
    np.testing.assert_allclose(sigma, scheduler.sigmas[:-1], rtol=2e-5)
