"""The same numbers as diffusers and torchcfm, in our direction of time."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from flowjax.flow import paths, solvers, times

pytestmark = pytest.mark.slow


def scheduler(**options):
  diffusers = pytest.importorskip("diffusers")
  return diffusers.FlowMatchEulerDiscreteScheduler(**options)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_shift_of_the_training_times_of_diffusers(shift):
  # Before set_timesteps, which shifts the last one a second time.
  expected = scheduler(shift=shift).sigmas.numpy()
  found = times.shift_times(np.arange(1000, 0, -1) / 1000, shift)
  np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("mu", [0.5, 0.63, 1.15])
def test_grid_of_diffusers_with_the_shift_of_flux(mu):
  flux = scheduler(use_dynamic_shifting=True)
  flux.set_timesteps(sigmas=np.linspace(1.0, 1 / 7, 7), mu=mu)
  grid = times.uniform_grid(7, shift=math.exp(mu))
  np.testing.assert_allclose(grid, flux.sigmas.numpy(), atol=1e-6)


def test_sampling_takes_the_steps_of_diffusers():
  torch = pytest.importorskip("torch")
  theirs = scheduler(shift=3.0)
  theirs.set_timesteps(sigmas=np.linspace(1.0, 1 / 8, 8))
  start = np.random.default_rng(0).standard_normal((2, 3, 4, 4), np.float32)

  x = torch.from_numpy(start)
  for t in theirs.timesteps:
    x = theirs.step(torch.sin(2 * x) + t / 1000, t, x).prev_sample
  found = solvers.solve(
    solvers.build("euler", paths.straight()),
    lambda x, t: jnp.sin(2 * x) + t,
    start,
    times.uniform_grid(8, shift=3.0),
  )
  np.testing.assert_allclose(found, x.numpy(), atol=1e-5)


def test_straight_path_of_torchcfm():
  torch = pytest.importorskip("torch")
  cfm = pytest.importorskip("torchcfm.conditional_flow_matching")
  matcher = cfm.ConditionalFlowMatcher(sigma=0.0)
  x, eps = np.random.default_rng(0).standard_normal((2, 6, 3, 2), np.float32)
  t_B = np.linspace(0.0, 1.0, 6, dtype=np.float32)

  # There, noise is x0 at t = 0 and data is x1 at t = 1.
  _, x_t, v = matcher.sample_location_and_conditional_flow(
    torch.tensor(eps), torch.tensor(x), torch.tensor(1.0 - t_B)
  )
  path = paths.straight()
  np.testing.assert_allclose(path.interpolate(x, eps, t_B), x_t, atol=1e-6)
  np.testing.assert_allclose(path.velocity(x, eps, t_B), -v, atol=1e-6)
