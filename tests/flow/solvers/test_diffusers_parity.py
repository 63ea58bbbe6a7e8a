"""Step by step the states of diffusers' schedulers, from the same networks.

The schedulers keep their tables and some of their states in float32. To compare
the formulas and not the roundings they are run in float64: the modules that
define them are given a `torch` and a `numpy` whose float32 is float64. As
published, in float32, they are compared as well, to what float32 allows.
"""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowjax.flow import grids, paths, solvers
from flowjax.flow.solvers import noise

torch = pytest.importorskip("torch")
schedulers = pytest.importorskip("diffusers.schedulers")

TABLE = {"num_train_timesteps": 1000}
DDPM_BETAS = {"beta_start": 1e-4, "beta_end": 2e-2, "beta_schedule": "linear"}
LDM_BETAS = {
  "beta_start": 0.00085,
  "beta_end": 0.012,
  "beta_schedule": "scaled_linear",
}
BETAS = {"ddpm": DDPM_BETAS, "scaled_linear": LDM_BETAS}
SHAPE = (2, 3, 4, 4)


class InDouble(types.ModuleType):
  """A module whose float32 is float64."""

  def __init__(self, module):
    super().__init__(module.__name__)
    self.module = module
    self.float32 = module.float64

  def __getattr__(self, name):
    return getattr(self.module, name)


@pytest.fixture
def in_double(monkeypatch):
  """Has diffusers' schedulers compute in float64 throughout."""
  from diffusers.schedulers import (
    scheduling_ddim,
    scheduling_ddpm,
    scheduling_dpmsolver_multistep,
    scheduling_edm_euler,
    scheduling_flow_match_euler_discrete,
    scheduling_flow_match_heun_discrete,
    scheduling_unipc_multistep,
  )

  for module in (
    scheduling_ddim,
    scheduling_ddpm,
    scheduling_dpmsolver_multistep,
    scheduling_edm_euler,
    scheduling_flow_match_euler_discrete,
    scheduling_flow_match_heun_discrete,
    scheduling_unipc_multistep,
  ):
    monkeypatch.setattr(module, "torch", InDouble(torch))
    monkeypatch.setattr(module, "np", InDouble(np), raising=False)
  before = torch.get_default_dtype()
  torch.set_default_dtype(torch.float64)
  with jax.enable_x64(True):
    yield
  torch.set_default_dtype(before)


def network(library, x, t):
  """A data prediction that is neither linear in x nor constant in t."""
  return library.sin(2.0 * x + 3.0 * t) - 0.3 * x * t


def start(dtype=np.float64):
  return np.random.default_rng(0).standard_normal(SHAPE).astype(dtype)


def drawn(count, dtype=np.float64):
  return np.random.default_rng(1).standard_normal((count, *SHAPE)).astype(dtype)


def theirs(scheduler, times, x, fresh=None):
  """Returns their states; `times` are ours, at which both are evaluated."""
  x = torch.tensor(x)
  states = []
  for i, timestep in enumerate(scheduler.timesteps):
    data = network(torch, x, float(times[i]))
    options = {}
    if fresh is not None:
      options["variance_noise"] = torch.tensor(fresh[i])
    x = scheduler.step(data, timestep, x, **options).prev_sample
    states.append(x.numpy())
  return np.stack(states)


def ours(solver, times, x, fresh=None, variance=None):
  """Returns our states after every step, with the noise that is given."""
  rng = None
  if fresh is not None:
    numbers = jnp.asarray(fresh)
    solver = dataclasses.replace(
      solver, draw=lambda rng, number, x: numbers[number]
    )
    rng = jax.random.key(0)

  def field(x, t):
    data = network(jnp, x, t)
    return data if variance is None else (data, variance(jnp, x, t))

  run = jax.jit(
    lambda x: solvers.solve(solver, field, x, times, rng=rng, trajectory=True)
  )
  return np.asarray(run(jnp.asarray(x)))[1:]


def close(states, expected, tolerance):
  scale = np.max(np.abs(expected))
  assert states.shape == expected.shape and np.all(np.isfinite(expected))
  np.testing.assert_allclose(
    states / scale, expected / scale, rtol=0.0, atol=tolerance
  )


def our_times(scheduler, last=0.0, dtype=np.float64):
  """Returns the times of a table's entries, and the last one."""
  entries = (np.asarray(scheduler.timesteps, np.float64) + 1.0) / 1000.0
  return np.append(entries, last).astype(dtype)


def table_scheduler(cls, betas, steps, **options):
  scheduler = cls(**TABLE, **BETAS[betas], prediction_type="sample", **options)
  scheduler.set_timesteps(steps)
  return scheduler


@pytest.mark.parametrize(
  "betas,eta", [("ddpm", 0.0), ("ddpm", 0.5), ("scaled_linear", 1.0)]
)
def test_ddim(in_double, betas, eta):
  scheduler = table_scheduler(
    schedulers.DDIMScheduler,
    betas,
    10,
    clip_sample=False,
    timestep_spacing="trailing",
  )
  step = scheduler.step
  scheduler.step = lambda *args, **options: step(*args, eta=eta, **options)
  times, fresh = our_times(scheduler), drawn(10)
  solver = solvers.build("ddim", paths.build(betas), eta=eta)
  given = fresh if eta else None
  expected = theirs(scheduler, times, start(), given)
  close(ours(solver, times, start(), given), expected, 1e-10)


def test_ddim_with_clipped_data(in_double):
  scheduler = table_scheduler(
    schedulers.DDIMScheduler,
    "ddpm",
    10,
    clip_sample=True,
    clip_sample_range=0.5,
    timestep_spacing="trailing",
  )
  step = scheduler.step
  scheduler.step = lambda *args, **options: step(
    *args, use_clipped_model_output=True, **options
  )
  times = our_times(scheduler)
  solver = solvers.build("ddim", paths.build("ddpm"), clip=0.5)
  expected = theirs(scheduler, times, start())
  close(ours(solver, times, start()), expected, 1e-10)


@pytest.mark.parametrize("variance", ["small", "large"])
@pytest.mark.parametrize("clip", [None, 0.5])
def test_ddpm(in_double, monkeypatch, variance, clip):
  # It takes no noise, and draws none at entry 0, where we draw 0.
  scheduler = table_scheduler(
    schedulers.DDPMScheduler,
    "ddpm",
    8,
    clip_sample=clip is not None,
    clip_sample_range=clip,
    variance_type=f"fixed_{variance}",
    timestep_spacing="linspace",
  )
  # Entry 0 is the last of the spacing; the state before it is at entry 0.
  times, fresh = our_times(scheduler), drawn(8)
  left = iter(fresh)
  monkeypatch.setattr(
    "diffusers.schedulers.scheduling_ddpm.randn_tensor",
    lambda *args, **options: torch.tensor(next(left)),
  )
  # In diffusers the entry before is N // steps below, whatever the spacing.
  entries = [*scheduler.timesteps.tolist(), -1]
  monkeypatch.setattr(
    type(scheduler),
    "previous_timestep",
    lambda self, t: entries[entries.index(int(t)) + 1],
  )
  expected = theirs(scheduler, times, start())
  solver = solvers.build(
    "ddpm", paths.build("ddpm"), variance=variance, clip=clip
  )
  close(ours(solver, times, start(), fresh), expected, 1e-10)


@pytest.mark.parametrize("steps", [8, 1000])
@pytest.mark.parametrize("clip", [None, 0.5])
def test_ddpm_with_a_learned_variance(in_double, monkeypatch, clip, steps):
  scheduler = table_scheduler(
    schedulers.DDPMScheduler,
    "ddpm",
    steps,
    clip_sample=clip is not None,
    clip_sample_range=clip,
    variance_type="learned_range",
    timestep_spacing="linspace",
  )
  # Of all the steps of the table, the first and the last three.
  entries = [*scheduler.timesteps.tolist(), -1]
  if steps == 1000:
    entries = [999, 998, 997, 996, 2, 1, 0, -1]
  times = (np.asarray(entries, np.float64) + 1.0) / 1000.0
  fresh = drawn(len(entries) - 1)
  left = iter(fresh)
  monkeypatch.setattr(
    "diffusers.schedulers.scheduling_ddpm.randn_tensor",
    lambda *args, **options: torch.tensor(next(left)),
  )
  monkeypatch.setattr(
    type(scheduler),
    "previous_timestep",
    lambda self, t: entries[entries.index(int(t)) + 1],
  )

  def variance(library, x, t):
    return library.cos(3.0 * x + t)

  x, expected = torch.tensor(start()), []
  for t, entry in zip(times[:-1], entries[:-1], strict=True):
    data = network(torch, x, float(t))
    # Channels are the second dim in diffusers.
    both = torch.cat([data, variance(torch, x, float(t))], dim=1)
    x = scheduler.step(both, entry, x).prev_sample
    expected.append(x.numpy())
  solver = solvers.build(
    "ddpm", paths.build("ddpm"), variance="learned", clip=clip
  )
  found = ours(solver, times, start(), fresh, variance)
  close(found, np.stack(expected), 1e-10)


DPM = {
  "2M": ("dpmpp_2m", {}, {"solver_order": 2}),
  "2M heun": (
    "dpmpp_2m",
    {"form": "heun"},
    {"solver_order": 2, "solver_type": "heun"},
  ),
  "3M": ("dpmpp_3m", {"compat": True}, {"solver_order": 3}),
  "3M to the end": (
    "dpmpp_3m",
    {"compat": True, "lower_order_final": False},
    {"solver_order": 3, "lower_order_final": False},
  ),
  "SDE-2M": (
    "dpmpp_sde_2m",
    {},
    {"solver_order": 2, "algorithm_type": "sde-dpmsolver++"},
  ),
  "SDE-2M heun": (
    "dpmpp_sde_2m",
    {"form": "heun"},
    {
      "solver_order": 2,
      "algorithm_type": "sde-dpmsolver++",
      "solver_type": "heun",
    },
  ),
}


@pytest.mark.parametrize(
  "method,betas,steps,final",
  [
    ("2M", "ddpm", 8, "zero"),
    ("2M", "scaled_linear", 20, "sigma_min"),
    ("2M heun", "ddpm", 20, "sigma_min"),
    ("3M", "ddpm", 8, "zero"),
    ("3M", "scaled_linear", 20, "zero"),
    ("3M to the end", "ddpm", 8, "sigma_min"),
    ("SDE-2M", "ddpm", 8, "zero"),
    ("SDE-2M heun", "scaled_linear", 20, "sigma_min"),
  ],
)
def test_dpm_solver(in_double, method, betas, steps, final):
  name, options, their_options = DPM[method]
  scheduler = table_scheduler(
    schedulers.DPMSolverMultistepScheduler,
    betas,
    steps,
    final_sigmas_type=final,
    timestep_spacing="trailing",
    **their_options,
  )
  # The table's first entry is sigma_min.
  times = our_times(scheduler, 0.0 if final == "zero" else 1e-3)
  fresh = drawn(steps) if "SDE" in method else None
  expected = theirs(scheduler, times, start(), fresh)
  solver = solvers.build(name, paths.build(betas), **options)
  close(ours(solver, times, start(), fresh), expected, 1e-10)


@pytest.mark.slow
@pytest.mark.parametrize(
  "order,variant,final,lower",
  [
    (1, "bh2", "zero", True),
    (2, "bh1", "zero", True),
    (2, "bh2", "zero", True),
    (2, "bh2", "sigma_min", False),
    (3, "bh1", "sigma_min", False),
    (3, "bh2", "zero", True),
  ],
)
def test_unipc(in_double, order, variant, final, lower):
  steps = 9
  scheduler = table_scheduler(
    schedulers.UniPCMultistepScheduler,
    "scaled_linear",
    steps,
    solver_order=order,
    solver_type=variant,
    final_sigmas_type=final,
    lower_order_final=lower,
    timestep_spacing="trailing",
  )
  times = our_times(scheduler, 0.0 if final == "zero" else 1e-3)
  solver = solvers.build(
    "unipc",
    paths.build("scaled_linear"),
    order=order,
    variant=variant,
    lower_order_final=lower,
  )
  expected = theirs(scheduler, times, start())
  states = ours(solver, times, start())
  if variant == "bh1" and final == "zero":
    # Theirs multiplies B(h) = infinity by 0 there.
    assert np.all(np.isnan(expected[-1])) and np.all(np.isfinite(states[-1]))
    states, expected = states[:-1], expected[:-1]
  close(states, expected, 1e-10)


@pytest.mark.parametrize("name", ["dpmpp_2m", "dpmpp_3m", "unipc"])
def test_on_the_straight_path(in_double, name):
  # Their sigmas are our times there; they may not start at alpha = 0.
  cls = (
    schedulers.UniPCMultistepScheduler
    if name == "unipc"
    else schedulers.DPMSolverMultistepScheduler
  )
  order = 3 if name == "dpmpp_3m" else 2
  scheduler = cls(
    use_flow_sigmas=True,
    flow_shift=3.0,
    solver_order=order,
    prediction_type="sample",
  )
  scheduler.set_timesteps(10)
  times = scheduler.sigmas.numpy()
  assert times.dtype == np.float64 and times[0] < 1.0 and times[-1] == 0.0
  options = {"compat": True} if name == "dpmpp_3m" else {}
  solver = solvers.build(name, paths.straight(), **options)
  expected = theirs(scheduler, times, start())
  close(ours(solver, times, start()), expected, 1e-10)


FLOW = [
  {},
  {"shift": 3.0},
  {"shift": 3.0, "spacing": "karras"},
  {"shift": 3.0, "spacing": "exponential"},
  {"shift": 3.0, "spacing": "beta"},
  {"mu": 0.63, "source": "even"},
]


@pytest.mark.parametrize("options", FLOW, ids=str)
def test_flow_match_euler(options):
  # In float32, as published: SD3 and FLUX are sampled with exactly these.
  steps = 12
  scheduler = schedulers.FlowMatchEulerDiscreteScheduler(
    shift=options.get("shift", 1.0),
    use_dynamic_shifting="mu" in options,
    **{
      f"use_{spacing}_sigmas": options.get("spacing") == spacing
      for spacing in ("karras", "exponential", "beta")
    },
  )
  if "mu" in options:
    sigmas = np.linspace(1.0, 1.0 / steps, steps)
    scheduler.set_timesteps(sigmas=sigmas, mu=options["mu"])
  else:
    scheduler.set_timesteps(steps)
  times = grids.build(
    "flow_match", paths.straight(), steps, compat=True, **options
  )
  np.testing.assert_array_equal(times, scheduler.sigmas.numpy())

  slopes = drawn(steps, np.float32)
  x = torch.tensor(start(np.float32))
  states = [x.numpy()]
  for timestep, slope in zip(scheduler.timesteps, slopes, strict=True):
    x = scheduler.step(torch.tensor(slope), timestep, x).prev_sample
    states.append(x.numpy())
  # One step from each of their states, operation by operation, as torch does:
  # a compiler may contract x + h v into one rounding.
  euler = solvers.build("euler", paths.straight())
  for i in range(steps):
    with jax.disable_jit():
      step = solvers.Step(*jnp.asarray(times[i : i + 2]), jnp.int32(i), steps)
      after, _ = euler.step(
        lambda x, t, i=i: jnp.asarray(slopes[i]),
        jnp.asarray(states[i]),
        (),
        step,
      )
    np.testing.assert_array_equal(np.asarray(after), states[i + 1])
  # And the whole loop in one program.
  all_slopes = jnp.asarray(slopes)

  def field(x, t):
    return all_slopes[jnp.argmin(jnp.abs(jnp.asarray(times) - t))]

  end = solvers.solve(euler, field, jnp.asarray(states[0]), times)
  np.testing.assert_allclose(end, states[-1], atol=1e-6)


def test_flow_match_heun(in_double):
  scheduler = schedulers.FlowMatchHeunDiscreteScheduler(shift=3.0)
  scheduler.set_timesteps(8)
  sigmas = scheduler.sigmas.numpy()
  times = np.append(sigmas[:-1:2], 0.0)
  assert len(times) == 9
  x = torch.tensor(start())
  # The last step, to sigma = 0, is Euler's: there is nothing to divide by.
  states = []
  for i, timestep in enumerate(scheduler.timesteps):
    slope = network(torch, x, float(timestep) / 1000.0)
    x = scheduler.step(slope, timestep, x).prev_sample
    if i % 2 or i == len(scheduler.timesteps) - 1:
      states.append(x.numpy())
  heun = solvers.build("heun", paths.straight())
  close(ours(heun, times[:-1], start()), np.stack(states[:7]), 1e-10)
  euler = solvers.build("euler", paths.straight())
  close(ours(euler, times[-2:], states[6]), np.stack(states[7:]), 1e-10)


def test_edm_euler(in_double):
  # Euler in sigma is DDIM where alpha = 1. Its last step, to sigma = 0, which
  # the path does not have, gives the data predicted.
  steps = 10
  scheduler = schedulers.EDMEulerScheduler()
  scheduler.set_timesteps(steps)
  path = paths.build("edm")
  times = np.linspace(1.0, 0.0, steps)
  sigmas = scheduler.sigmas.numpy()
  np.testing.assert_allclose(path.sigma(times), sigmas[:-1], rtol=1e-12)

  def raw(library, x, sigma):
    """Returns what preconditioning turns into `network`."""
    data = network(library, x, sigma)
    skip = 0.25 / (sigma**2 + 0.25)
    return (data - skip * x) / (0.5 * sigma / (sigma**2 + 0.25) ** 0.5)

  x = torch.tensor(80.0 * start())
  states = []
  for timestep, sigma in zip(scheduler.timesteps, sigmas[:-1], strict=True):
    scheduler.scale_model_input(x, timestep)
    x = scheduler.step(raw(torch, x, float(sigma)), timestep, x).prev_sample
    states.append(x.numpy())
  ddim = solvers.build("ddim", path)
  mine = solvers.solve(
    ddim,
    lambda x, t: network(jnp, x, path.sigma(t)),
    jnp.asarray(80.0 * start()),
    times,
    trajectory=True,
  )
  close(np.asarray(mine)[1:], np.stack(states[:-1]), 1e-10)
  last = network(np, np.asarray(mine)[-1], sigmas[-2])
  np.testing.assert_allclose(last, states[-1], atol=1e-10)


@pytest.mark.parametrize(
  "name,cls,options",
  [
    ("ddim", "DDIMScheduler", {"clip_sample": False}),
    ("dpmpp_2m", "DPMSolverMultistepScheduler", {}),
    ("unipc", "UniPCMultistepScheduler", {}),
  ],
)
def test_in_float32_as_published(name, cls, options):
  # Both round at every step; theirs takes e^-h - 1 and log alpha - log sigma
  # in float32, and cumulates its table in float32: 1000 roundings of 6e-8.
  scheduler = table_scheduler(
    getattr(schedulers, cls), "ddpm", 20, timestep_spacing="trailing", **options
  )
  times = our_times(scheduler, dtype=np.float32)
  expected = theirs(scheduler, times, start(np.float32))
  assert expected.dtype == np.float32
  states = ours(
    solvers.build(name, paths.build("ddpm")), times, start(np.float32)
  )
  assert states.dtype == np.float32
  close(states, expected, 2e-5)


@pytest.mark.slow
def test_the_noise_of_a_step_is_known_from_the_key():
  # So that it may be handed to another implementation.
  path, rng = paths.build("ddpm"), jax.random.key(7)
  times = np.float32([1.0, 0.6, 0.2])
  x = jnp.asarray(start(np.float32))
  field = lambda x, t: network(jnp, x, t)  # noqa: E731
  solver = solvers.build("ddpm", path)
  drawn_here = [noise.normal(rng, jnp.int32(i), x) for i in range(2)]
  end = solvers.solve(solver, field, x, times, rng=rng)
  given = ours(solver, times, x, np.stack(drawn_here))
  np.testing.assert_allclose(end, given[-1], rtol=1e-5, atol=1e-6)
