"""The same coefficients as diffusers, and as torchcfm in our direction of time.

diffusers keeps its tables in float32: the agreement is that of its rounding,
and to 1e-10 where its own functions are given betas in float64.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowjax.flow import paths, prediction, schedules

pytestmark = pytest.mark.slow

LDM = {"beta_start": 0.00085, "beta_end": 0.012}
TABLES = {
  "ddpm": ("ddpm", {}, {"beta_schedule": "linear"}),
  "short": (
    "ddpm",
    {"steps": 50, "beta_end": 0.3},
    {"beta_schedule": "linear", "num_train_timesteps": 50, "beta_end": 0.3},
  ),
  "ldm": ("scaled_linear", {}, {"beta_schedule": "scaled_linear", **LDM}),
  "cosine": ("cosine", {"steps": 1000}, {"beta_schedule": "squaredcos_cap_v2"}),
}
for name in ("ddpm", "ldm"):
  ours_name, ours, theirs = TABLES[name]
  TABLES[f"{name} zero"] = (
    ours_name,
    {**ours, "zero_terminal_snr": True},
    {**theirs, "rescale_betas_zero_snr": True},
  )


@pytest.mark.parametrize("scheduler", ["DDPMScheduler", "DDIMScheduler"])
@pytest.mark.parametrize("case", TABLES)
def test_tables_of_diffusers(case, scheduler):
  diffusers = pytest.importorskip("diffusers")
  name, options, theirs = TABLES[case]
  expected = getattr(diffusers, scheduler)(**theirs).alphas_cumprod.numpy()
  path = paths.build(name, **options)
  with jax.enable_x64(True):
    t = (jnp.arange(path.steps) + 1.0) / path.steps
    alpha, sigma = np.asarray(path.alpha(t)), np.asarray(path.sigma(t))
  np.testing.assert_allclose(alpha**2, expected, atol=6e-7)
  np.testing.assert_allclose(sigma**2, 1.0 - expected, atol=6e-7)
  if "zero" in case:
    assert alpha[-1] == expected[-1] == 0.0
  else:
    np.testing.assert_allclose(alpha[:-1] ** 2, expected[:-1], rtol=1e-6)
    # 1 - beta, in their float32, for a beta of as much as 0.999.
    np.testing.assert_allclose(alpha[-1] ** 2, expected[-1], rtol=2e-5)


def test_zero_terminal_snr_of_diffusers_in_float64():
  torch = pytest.importorskip("torch")
  ddpm = pytest.importorskip("diffusers.schedulers.scheduling_ddpm")
  beta_N = schedules.scaled_linear_betas(1000, 0.00085, 0.012)
  theirs = ddpm.rescale_zero_terminal_snr(torch.from_numpy(beta_N))
  expected = torch.cumprod(1.0 - theirs, 0).numpy()
  found = schedules.alpha_bar(beta_N, zero_terminal_snr=True)
  np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-15)


def test_noised_samples_and_v_of_diffusers():
  torch = pytest.importorskip("torch")
  diffusers = pytest.importorskip("diffusers")
  theirs = diffusers.DDPMScheduler()
  x, eps = np.random.default_rng(0).standard_normal((2, 6, 3, 2), np.float32)
  index = np.array([0, 1, 250, 500, 998, 999])
  arrays = torch.tensor(x), torch.tensor(eps), torch.tensor(index)

  path, t_B = paths.ddpm(), jnp.asarray((index + 1) / 1000, jnp.float32)
  x_t = path.interpolate(x, eps, t_B)
  np.testing.assert_allclose(x_t, theirs.add_noise(*arrays), atol=3e-6)
  v = prediction.convert(path, "data", "v", x, x_t, t_B)
  # At the first index sigma is 0.01: the noise is found again to 2e-5.
  np.testing.assert_allclose(v, theirs.get_velocity(*arrays), atol=5e-5)


def torchcfm_pair(matcher, t_B):
  """Returns x_t and its velocity, from noise at 0 there to data at 1."""
  torch = pytest.importorskip("torch")
  x, eps, more = np.random.default_rng(0).standard_normal((3, 6, 3, 2))
  noise, data, t = (torch.tensor(a) for a in (eps, x, 1.0 - t_B))
  mean = matcher.compute_mu_t(noise, data, t)
  std = matcher.compute_sigma_t(t)
  std = std.numpy() if torch.is_tensor(std) else std
  x_t = mean.numpy() + np.broadcast_to(np.reshape(std, (-1, 1, 1)), x.shape) * (
    eps if matcher.__class__.__name__.startswith("Target") else 0.0
  )
  v = matcher.compute_conditional_flow(noise, data, t, torch.tensor(x_t))
  return x, eps, x_t, v.numpy()


@pytest.mark.parametrize(
  "kind, sigma, name, options",
  [
    ("VariancePreserving", 0.0, "gvp", {}),
    ("Target", 0.1, "straight", {"sigma_min": 0.1}),
    ("Target", 0.0, "straight", {}),
    ("", 0.0, "straight", {}),
  ],
)
def test_paths_of_torchcfm(kind, sigma, name, options):
  cfm = pytest.importorskip("torchcfm.conditional_flow_matching")
  matcher = getattr(cfm, f"{kind}ConditionalFlowMatcher")(sigma=sigma)
  t_B = np.linspace(0.02, 1.0, 6)
  x, eps, x_t, v = torchcfm_pair(matcher, t_B)
  path = paths.build(name, **options)
  with jax.enable_x64(True):
    found = path.interpolate(x, eps, t_B), path.velocity(x, eps, t_B)
  np.testing.assert_allclose(found[0], x_t, rtol=1e-10, atol=1e-10)
  np.testing.assert_allclose(found[1], -v, rtol=1e-10, atol=1e-10)


def test_noise_levels_of_edm_in_diffusers():
  diffusers = pytest.importorskip("diffusers")
  theirs = diffusers.EDMEulerScheduler()
  theirs.set_timesteps(18)
  t = jnp.linspace(1.0, 0.0, 18)
  sigma = paths.edm(rho=theirs.config.rho).sigma(t)
  np.testing.assert_allclose(sigma, theirs.sigmas[:-1].numpy(), rtol=5e-6)


def test_preconditioning_of_edm_in_diffusers():
  torch = pytest.importorskip("torch")
  diffusers = pytest.importorskip("diffusers")
  theirs = diffusers.EDMEulerScheduler(sigma_data=0.5)
  path, t = paths.edm(), jnp.array(0.6)
  sigma = float(path.sigma(t))
  x_t, f = np.random.default_rng(0).standard_normal((2, 4, 3), np.float32)
  x_t = x_t * sigma
  expected = theirs.precondition_outputs(
    torch.tensor(x_t), torch.tensor(f), torch.tensor(sigma)
  )
  found = prediction.convert(path, "edm", "data", f, x_t, t)
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)

  def network(params, x, t_B, cond, rng):
    return x, t_B

  seen, time = prediction.preconditioned(network, path, "edm")(
    None, jnp.asarray(x_t), t, None, None
  )
  scaled = theirs.precondition_inputs(torch.tensor(x_t), sigma)
  np.testing.assert_allclose(seen, scaled, rtol=1e-6)
  # The same noise, in units of log(80 / 0.002) / 4 from log(0.002) / 4.
  c_noise = 0.25 * math.log(sigma)
  unit = 0.25 * math.log(80.0 / 0.002)
  expected = (c_noise - 0.25 * math.log(0.002)) / unit
  assert float(time) == pytest.approx(expected, abs=1e-6)
