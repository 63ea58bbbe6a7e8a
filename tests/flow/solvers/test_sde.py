"""Every SDE has the marginals of its path, whatever its diffusion."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowjax.flow import paths, solvers
from flowjax.flow.solvers import noise, sde

METHODS = ("euler_maruyama", "heun_sde")
MEAN, STD = 0.7, 0.3
STRAIGHT = paths.straight()


def key(seed=0):
  # Compiles in a fifth of the time that threefry takes.
  return jax.random.key(seed, impl="rbg")


def gaussian_field(path, mean=MEAN, std=STD):
  """The velocity of x ~ N(mean, std^2), which keeps what it flows normal."""

  def field(x, t):
    c = path.at(t, x)
    variance = (c.alpha * std) ** 2 + c.sigma**2
    rise = c.alpha * c.alpha_dot * std**2 + c.sigma * c.sigma_dot
    return c.alpha_dot * mean + rise / variance * (x - c.alpha * mean)

  return field


def falling(path, steps):
  return np.linspace(path.high, path.low, steps + 1).astype(np.float32)


def moments(solver, path, grid):
  """Returns the mean and the deviation of what the solver makes, exactly.

  With a field linear in x the end is a x + b + the sum of c_i z_i, z_i the
  noise of step i. Each coefficient is the end of a particle of its own, from
  which that of a particle without any noise is taken.
  """
  steps = len(grid) - 1

  @jax.jit
  def run(axes):
    given = dataclasses.replace(
      solver, draw=lambda rng, number, x: axes[number].astype(x.dtype)
    )
    c = path.at(path.high, jnp.ones(()))
    mean, std = c.alpha * MEAN, jnp.sqrt((c.alpha * STD) ** 2 + c.sigma**2)
    x = mean + std * axes[steps]
    return solvers.solve(given, gaussian_field(path), x, grid, rng=key())

  end = np.asarray(run(np.eye(steps + 2)))
  return float(end[-1]), float(np.linalg.norm(end[:-1] - end[-1]))


# A diffusion is a function of t to either method, and one is asked for all.
@pytest.mark.slow
@pytest.mark.parametrize(
  "path, diffusion, scale, methods",
  [
    *((STRAIGHT, form, 0.3, METHODS[1:]) for form in sde.DIFFUSIONS),
    (paths.build("gvp"), "sbdm", 1.0, METHODS),
    (paths.build("vp"), "sbdm", 1.0, METHODS),
    (paths.build("sub_vp"), "sigma", 2.0, METHODS),
    (paths.build("ddpm"), "sbdm", 1.0, METHODS),
    (paths.build("edm", sigma_max=5.0), "sbdm", 1.0, METHODS),
  ],
  ids=lambda value: getattr(value, "name", None),
)
def test_mean_and_variance_are_those_of_the_data(
  path, diffusion, scale, methods
):
  for method in methods:
    solver = solvers.build(
      method,
      path,
      diffusion=diffusion,
      scale=scale,
      last_step="euler",
      last_step_size=0.01,
    )
    mean, std = moments(solver, path, falling(path, 200))
    assert mean == pytest.approx(MEAN, abs=0.005)
    assert std == pytest.approx(STD, rel=0.015)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_the_error_of_the_moments_is_of_first_order(method):
  def error(steps):
    solver = solvers.build(
      method, STRAIGHT, diffusion="constant", scale=0.5, last_step="none"
    )
    # A grid that ends before the score is steep.
    grid = np.linspace(1.0, 0.3, steps + 1)
    _, std = moments(solver, STRAIGHT, grid)
    return std - np.sqrt((0.7 * STD) ** 2 + 0.3**2)

  with jax.enable_x64(True):
    order = np.log2(error(200) / error(400))
  assert order == pytest.approx(1.0, abs=0.05)


def test_without_diffusion_it_is_the_flow():
  x = np.linspace(-1.0, 1.0, 5, dtype=np.float32)
  grid = falling(STRAIGHT, 10)
  field = gaussian_field(STRAIGHT)
  for method, flow in zip(METHODS, ("euler", "heun"), strict=True):
    solver = solvers.build(
      method, STRAIGHT, scale=0.0, last_step="none", diffusion="linear"
    )
    end = solvers.solve(solver, field, x, grid[:-1], rng=key(1))
    # Its last step is not corrected.
    before = solvers.solve(solvers.build(flow, STRAIGHT), field, x, grid[:-2])
    euler = solvers.build("euler", STRAIGHT)
    expected = solvers.solve(euler, field, before, grid[-3:-1])
    np.testing.assert_allclose(end, expected, rtol=1e-5)


def test_data_is_carried_to_noise_too():
  # As in `moments`, from the other end.
  solver = solvers.build("euler_maruyama", STRAIGHT, diffusion="linear")
  axes = np.eye(202, dtype=np.float32)
  solver = dataclasses.replace(
    solver, draw=lambda rng, number, x: jnp.asarray(axes)[number]
  )
  end = solvers.solve(
    solver,
    gaussian_field(STRAIGHT),
    MEAN + STD * axes[200],
    np.linspace(0.0, 1.0, 201),
    rng=key(),
  )
  end = np.asarray(end)
  assert float(end[-1]) == pytest.approx(0.0, abs=0.01)
  spread = np.linalg.norm(end[:-1] - end[-1])
  assert float(spread) == pytest.approx(1.0, abs=0.02)


# D of SiT at its times 0.05, 0.5 and 0.95, that is 0.95, 0.5 and 0.05 here.
SIT = {
  "straight": (19.0, 1.0, 0.0526),
  "gvp": (19.96, 1.571, 0.1236),
  "vp": (9.502, 5.025, 0.5475),
}


@pytest.mark.parametrize("name", SIT)
def test_the_diffusion_of_the_forward_sde_is_that_of_sit(name):
  diffusion = jax.jit(sde.DIFFUSIONS["sbdm"](paths.build(name), 1.0))
  found = np.asarray(diffusion(np.float32([0.95, 0.5, 0.05, 0.0, 1.0])))
  np.testing.assert_allclose(found[:3], SIT[name], rtol=1e-3)
  assert np.isfinite(found).all()


def test_the_other_forms_are_those_of_sit():
  # As SiT writes them, with its time s = 1 - t from noise to data.
  t = np.linspace(0.0, 1.0, 11, dtype=np.float32)
  s, c = 1.0 - t, 0.8
  forms = {
    "constant": c * np.ones_like(s),
    "sigma": c * (1.0 - s),
    "linear": c * (1.0 - s),
    "decreasing": 0.25 * (c * np.cos(np.pi * s) + 1.0) ** 2,
    "increasing_decreasing": c * np.sin(np.pi * s) ** 2,
  }
  for name, expected in forms.items():
    diffusion = jax.jit(sde.DIFFUSIONS[name](STRAIGHT, c))
    np.testing.assert_allclose(diffusion(t), expected, atol=1e-6)


def sit(x, draws, method, last_step, count, size, c):
  """Samples as SiT writes it: time s from noise 0 to data 1, in float64.

  On the straight path, with the diffusion c sin^2(pi s).
  """
  if last_step == "none":
    grid = np.linspace(0.0, 1.0, count + 1)
  else:
    grid = np.append(np.linspace(0.0, 1.0 - size, count), 1.0)

  def velocity(x, s):
    variance = (s * STD) ** 2 + (1.0 - s) ** 2
    return MEAN + (s * STD**2 - (1.0 - s)) / variance * (x - s * MEAN)

  def score(x, s):
    return (s * velocity(x, s) - x) / ((1.0 - s) ** 2 + s * (1.0 - s))

  def drift(x, s):
    return velocity(x, s) + c * np.sin(np.pi * s) ** 2 * score(x, s)

  for i, (s, after) in enumerate(zip(grid[:-1], grid[1:], strict=True)):
    h = after - s
    if i == count - 1 and last_step != "none":
      if last_step == "mean":
        return x + h * drift(x, s)
      if last_step == "euler":
        return x + h * velocity(x, s)
      return x / s + (1.0 - s) ** 2 / s * score(x, s)
    added = np.sqrt(2.0 * c * np.sin(np.pi * s) ** 2 * h) * draws[i]
    if method == "euler_maruyama" or i == count - 1:
      shifted = x if method == "euler_maruyama" else x + added
      x = shifted + h * drift(shifted, s) + (x + added - shifted)
    else:
      x = x + added
      slope = drift(x, s)
      x = x + 0.5 * h * (slope + drift(x + h * slope, after))
  return x


@pytest.mark.parametrize(
  "method, last_step",
  [("heun_sde", "tweedie"), ("heun_sde", "none")]
  + [("euler_maruyama", rule) for rule in sde.LAST_STEPS],
)
def test_it_is_sit_with_the_same_noise(method, last_step):
  count, size, c = 7, 0.05, 0.8
  with jax.enable_x64(True):
    x = np.random.default_rng(0).standard_normal((3, 2))
    rng = key(1)
    solver = solvers.build(
      method,
      STRAIGHT,
      diffusion="increasing_decreasing",
      scale=c,
      last_step=last_step,
      last_step_size=size,
    )
    grid = np.linspace(1.0, 0.0, count + 1)
    end = solvers.solve(solver, gaussian_field(STRAIGHT), x, grid, rng=rng)
    draw = jax.jit(lambda number: noise.normal(rng, number, x))
    draws = [np.asarray(draw(i)) for i in range(count)]
    expected = sit(x, draws, method, last_step, count, size, c)
    np.testing.assert_allclose(end, expected, rtol=1e-10, atol=1e-12)


def evaluated(solver, grid):
  """Returns the times at which a solve evaluates the field."""
  seen = []

  def field(x, t):
    jax.debug.callback(lambda t: seen.append(float(t)), t, ordered=True)
    return -x

  solvers.solve(solver, field, jnp.ones(2), grid, rng=key())
  jax.effects_barrier()
  return seen


@pytest.mark.parametrize("method", METHODS)
def test_the_last_step_has_its_size_and_one_evaluation(method):
  grid = np.linspace(1.0, 0.0, 5)
  solver = solvers.build(method, STRAIGHT, last_step_size=0.1)
  seen = evaluated(solver, grid)
  assert len(seen) == solver.evaluations(4)
  assert np.unique(seen) == pytest.approx([0.1, 0.4, 0.7, 1.0])
  # Any grid keeps its shape, and its ends.
  move = jax.jit(solver.grid)
  squeezed = move(np.float32([0.9, 0.8, 0.4, 0.2]))
  np.testing.assert_allclose(squeezed, [0.9, 0.78, 0.3, 0.2], rtol=1e-6)
  kept = solvers.build(method, STRAIGHT, last_step_size=None)
  assert np.unique(evaluated(kept, grid)) == pytest.approx(grid[-2::-1])
  for grid in ([0.0, 0.5, 1.0], [1.0, 0.0], [0.3, 0.28, 0.25]):
    np.testing.assert_array_equal(move(np.float32(grid)), np.float32(grid))


def test_a_tree_draws_for_every_leaf():
  path = STRAIGHT
  solver = solvers.build("euler_maruyama", path, diffusion="constant")
  state = {"a": jnp.ones(3), "b": jnp.ones((3,))}
  end = solvers.solve(
    solver,
    lambda state, t: jax.tree.map(lambda x: -x, state),
    state,
    np.float32([1.0, 0.5, 0.0]),
    rng=key(),
  )
  assert not np.any(np.asarray(end["a"]) == np.asarray(end["b"]))


@pytest.mark.slow
def test_a_mixture_in_the_plane_is_sampled():
  # Five narrow normals on a circle, and their exact velocity.
  angle = 2.0 * np.pi * np.arange(5) / 5.0
  centre = 2.0 * np.stack([np.cos(angle), np.sin(angle)], axis=-1)
  centre_K2, std, count = jnp.asarray(centre, jnp.float32), 0.2, 2000

  def field(x_B2, t):
    alpha, sigma = 1.0 - t, t
    variance = (alpha * std) ** 2 + sigma**2
    gap_BK2 = x_B2[:, None] - alpha * centre_K2[None]
    weight_BK = jax.nn.softmax(-0.5 * jnp.sum(gap_BK2**2, -1) / variance)
    gap_B2 = jnp.sum(weight_BK[..., None] * gap_BK2, axis=1)
    data_B2 = weight_BK @ centre_K2 + alpha * std**2 / variance * gap_B2
    noise_B2 = sigma / variance * gap_B2
    return noise_B2 - data_B2

  random = np.random.default_rng(0)
  truth = centre[random.integers(5, size=(2, count))]
  truth = truth + std * random.standard_normal(truth.shape)

  def distance(a, b):
    """Returns the sliced Wasserstein-2 distance, over 50 directions."""
    turn = np.pi * np.arange(50) / 50.0
    axis = np.stack([np.cos(turn), np.sin(turn)])
    gap = np.sort(a @ axis, axis=0) - np.sort(b @ axis, axis=0)
    return float(np.sqrt(np.mean(gap**2)))

  floor = distance(*truth)  # Of two draws from the mixture itself.
  eps = random.standard_normal((count, 2)).astype(np.float32)
  assert distance(eps, truth[0]) > 0.5
  for method in METHODS:
    solver = solvers.build(method, STRAIGHT)
    x = solvers.solve(solver, field, eps, falling(STRAIGHT, 60), rng=key(1))
    assert distance(np.asarray(x), truth[0]) < floor + 0.05


def test_bad_input_is_refused():
  def build(**options):
    return solvers.build("euler_maruyama", STRAIGHT, **options)

  with pytest.raises(ValueError, match="did you mean 'increasing_decreasing'"):
    build(diffusion="inccreasing-decreasing")
  with pytest.raises(ValueError, match="did you mean 'tweedie'"):
    build(last_step="tweedy")
  with pytest.raises(ValueError, match="at least 0, not -1"):
    build(scale=-1.0)
  for size in (0.0, 1.0):
    with pytest.raises(ValueError, match="a time in"):
      build(last_step_size=size)
  with pytest.raises(ValueError, match="random key"):
    solvers.solve(build(), lambda x, t: x, jnp.ones(2), np.float32([1, 0.5, 0]))
