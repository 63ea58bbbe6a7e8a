"""The loop around a solver: directions, dtypes, trajectories, one program."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowjax.flow import paths, solvers, times

METHODS = ("euler", "midpoint", "heun", "rk4")
RK4 = solvers.build("rk4", paths.straight())
EULER = solvers.build("euler", paths.straight())
every_solver = pytest.mark.parametrize(
  "solver",
  [solvers.build(name, paths.straight()) for name in METHODS],
  ids=METHODS,
)

MEAN, STD = 0.7, 0.3


def normal(*shape, seed=0):
  random = np.random.default_rng(seed)
  return random.standard_normal(shape, np.float32)


def normal_field(x_t, t):
  """The velocity of x ~ N(MEAN, STD^2) on the straight path."""
  variance = ((1.0 - t) * STD) ** 2 + t**2
  slope = (t - (1.0 - t) * STD**2) / variance
  return -MEAN + slope * (x_t - (1.0 - t) * MEAN)


@functools.cache
def follow(solver, *, trajectory=False):
  """Returns a program of x and times that follows `normal_field`."""
  return jax.jit(
    lambda x, times: solvers.solve(
      solver, normal_field, x, times, trajectory=trajectory
    )
  )


def test_the_names_are_those_of_the_solvers():
  for name in solvers.SOLVERS:
    assert solvers.build(name, paths.straight()).name == name


def test_an_unknown_name_or_option_names_what_there_is():
  with pytest.raises(ValueError, match="did you mean 'heun'"):
    solvers.build("heum", paths.straight())
  with pytest.raises(ValueError, match="no option 'eta'; it takes none"):
    solvers.build("euler", paths.straight(), eta=0.5)


def test_noise_becomes_data():
  # The flow of a normal is linear: it carries eps to MEAN + STD eps.
  eps = normal(100)
  x = follow(RK4)(eps, times.uniform_grid(50))
  np.testing.assert_allclose(x, MEAN + STD * eps, atol=1e-4)


@every_solver
def test_there_and_back_again(solver):
  eps = normal(100)
  down = times.uniform_grid(400)
  x = follow(solver)(eps, down)
  back = follow(solver)(x, down[::-1])
  bound = {1: 0.05, 2: 1e-3}.get(solver.order, 1e-5)
  assert np.max(np.abs(back - eps)) < bound


def test_one_euler_step_is_exact_on_a_straight_path():
  path = paths.straight()
  x, eps = normal(2, 4, 3, 3, 1)

  @jax.jit
  def step(x, eps):
    start = path.interpolate(x, eps, 1.0)
    field = lambda x_t, t: path.velocity(x, eps, t)  # noqa: E731
    return solvers.solve(EULER, field, start, times.uniform_grid(1))

  end = step(x, eps)
  np.testing.assert_allclose(end, x, atol=1e-6)


@every_solver
def test_the_trajectory_is_the_state_at_every_time(solver):
  eps = normal(5, 2)
  grid = times.uniform_grid(3, shift=2.0)
  states = follow(solver, trajectory=True)(eps, grid)
  assert states.shape == (4, 5, 2)
  np.testing.assert_array_equal(states[0], eps)
  for i in range(1, 4):
    # Steps of no length at its end make one program of all.
    alone = follow(solver)(eps, np.pad(grid[: i + 1], (0, 3 - i), mode="edge"))
    np.testing.assert_allclose(states[i], alone, rtol=1e-6)


@every_solver
def test_the_loop_is_one_program_whatever_its_length(solver):
  traced = []

  def field(x, t):
    traced.append(None)
    return -x

  def sample(x, grid):
    return solvers.solve(solver, field, x, grid)

  x = jnp.ones((3,))
  short, long = (
    jax.make_jaxpr(sample)(x, times.uniform_grid(steps)) for steps in (5, 100)
  )
  assert len(traced) == 2 * len(solver.weights)
  for jaxpr in (short, long):
    loops = [e for e in jaxpr.eqns if e.primitive.name in ("scan", "while")]
    assert len(loops) == 1
  assert len(short.eqns) == len(long.eqns)
  # What jit compiles is what runs without it.
  grid = times.uniform_grid(5)
  np.testing.assert_allclose(jax.jit(sample)(x, grid), sample(x, grid))


@every_solver
def test_the_state_stays_in_float32(solver):
  seen = []

  def field(x, t):
    seen.append((x.dtype, t.dtype))
    return slope

  x = np.ones(4, jnp.bfloat16)
  slope = np.array([0.3, 1.7, 2.9, 7.1], jnp.bfloat16)
  end = jax.jit(
    lambda x: solvers.solve(solver, field, x, times.uniform_grid(4))
  )(x)
  assert end.dtype == jnp.float32
  # Exact in float32, and not if slopes were added up in half precision.
  np.testing.assert_allclose(end, 1.0 - slope.astype(np.float32), atol=1e-6)
  assert set(seen) == {(jnp.dtype("float32"), jnp.dtype("float32"))}


@every_solver
def test_the_state_may_be_a_tree(solver):
  x = normal(3)
  grid = times.uniform_grid(8)

  def field(state, t):
    return {"x": normal_field(state["x"], t), "clock": jnp.ones(())}

  state = {"x": x, "clock": np.float32(1.0)}
  end = jax.jit(lambda x: solvers.solve(solver, field, x, grid))(state)
  alone = follow(solver)(x, grid)
  np.testing.assert_allclose(end["x"], alone, rtol=1e-6)
  np.testing.assert_allclose(end["clock"], 0.0, atol=1e-6)


@dataclasses.dataclass(frozen=True)
class AdamsBashforth:
  """x + h (3 k - k_before) / 2, on an equidistant grid: it must remember."""

  name: str = "adams_bashforth"

  def init(self, x, rng):
    return {"before": jnp.zeros_like(x), "first": jnp.bool_(True)}

  def step(self, field, x, memory, step):
    slope = field(x, step.t)
    before = jnp.where(memory["first"], slope, memory["before"])
    x = x + (step.t_next - step.t) * (1.5 * slope - 0.5 * before)
    return x, {"before": slope, "first": jnp.bool_(False)}


def test_a_solver_with_memory_fits_the_same_loop():
  errors = []
  for steps in (10, 20):
    grid = np.linspace(0, 1, steps + 1, dtype=np.float32)
    end = jax.jit(
      lambda x, grid: solvers.solve(AdamsBashforth(), lambda x, t: -x, x, grid)
    )(np.float32([1.0]), grid)
    errors.append(abs(end[0] - np.exp(-1.0)))
  assert np.log2(errors[0] / errors[1]) == pytest.approx(2.0, abs=0.2)
