"""Methods that remember: their order, their ends, and both directions."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowjax.flow import paths, solvers
from flowjax.flow.solvers import exponential, unipc

MEAN, STD = 0.7, 0.3


def normal(*shape):
  random = np.random.default_rng(0)
  return random.standard_normal(shape)


build = functools.cache(paths.build)


@functools.cache
def marginals(path):
  """Returns alpha and the deviation of x_t, as a program of t."""

  @jax.jit
  def at(t):
    alpha = path.alpha(t)
    return alpha, jnp.sqrt((alpha * STD) ** 2 + path.sigma(t) ** 2)

  return at


def field_of(path, prediction):
  """The exact field for data ~ N(MEAN, STD^2): its velocity, or E[x | x_t]."""

  def field(x_t, t):
    c = path.at(t, x_t)
    variance = (c.alpha * STD) ** 2 + c.sigma**2
    if prediction == "data":
      gain, base = c.alpha * STD**2 / variance, MEAN
    else:
      gain = (c.alpha * c.alpha_dot * STD**2 + c.sigma * c.sigma_dot) / variance
      base = c.alpha_dot * MEAN
    return base + gain * (x_t - c.alpha * MEAN)

  return field


def exact(path, x, start, end):
  """Where the flow carries x: it is linear about the mean."""
  alpha, deviation = map(np.asarray, marginals(path)(np.array([start, end])))
  scale = deviation[1] / deviation[0]
  return alpha[1] * MEAN + scale * (x - alpha[0] * MEAN)


def error(solver, path, x):
  """Follows the grid from Python, so that all grids share one program."""
  field = field_of(path, solver.prediction)

  @jax.jit
  def move(x, memory, t, t_next, number):
    step = solvers.Step(t, t_next, number, 10**6)
    return solver.step(field, x, memory, step)

  def end(grid):
    state, memory = x, solver.init(x, None)
    for i in range(len(grid) - 1):
      state, memory = move(state, memory, grid[i], grid[i + 1], np.int32(i))
    expected = exact(path, x, grid[0], grid[-1])
    return float(np.linalg.norm(state - expected))

  return end


METHODS = {
  "ab2": ("ab2", {}, 2),
  "ab3": ("ab3", {}, 3),
  "ddim": ("ddim", {}, 1),
  "2M": ("dpmpp_2m", {}, 2),
  "2M heun": ("dpmpp_2m", {"form": "heun"}, 2),
  "3M": ("dpmpp_3m", {}, 3),
  "UniPC-1": ("unipc", {"order": 1, "lower_order_final": False}, 2),
  "UniPC-2": ("unipc", {"order": 2, "lower_order_final": False}, 3),
  "UniPC-2 bh1": (
    "unipc",
    {"order": 2, "variant": "bh1", "lower_order_final": False},
    3,
  ),
  "UniPC-3": ("unipc", {"order": 3, "lower_order_final": False}, 4),
}


def grid(ends, steps, lead):
  """`steps` equal steps, the first of which is cut in two.

  A method that starts with order 1 keeps its own only if it starts with a step
  as small as the square of the others.
  """
  way = np.linspace(0.0, 1.0, steps + 1)
  way = np.insert(way, 1, steps**-2.0) if lead else way
  return ends[0] + (ends[1] - ends[0]) * way


def slope(name, options, path, ends, lead=True, steps=128):
  with jax.enable_x64(True):
    solver = solvers.build(name, path, **options)
    end = error(solver, path, normal(20))
    coarse, fine = (end(grid(ends, n, lead)) for n in (steps, 2 * steps))
  return np.log2(coarse / fine)


ENDS = {"straight": (0.95, 0.4), "vp": (0.2, 0.7), "edm": (0.9, 0.1)}


# The order is of a formula in the log-SNR: all on one path, where nothing is
# linear in it; each family on the others, where alpha or the steps differ.
@pytest.mark.parametrize(
  "name, method",
  [("vp", method) for method in METHODS]
  + [("straight", method) for method in ("ab3", "ddim", "2M", "UniPC-2 bh1")]
  + [("edm", method) for method in ("ab2", "2M heun", "3M", "UniPC-3")],
)
def test_the_measured_order_is_the_claimed_one(name, method):
  ends = ENDS[name]
  solver, options, order = METHODS[method]
  lead = not solver.startswith("ab")
  measured = slope(solver, options, build(name), ends, lead)
  assert measured == pytest.approx(order, abs=0.35)


def test_what_diffusers_takes_for_the_second_derivative_costs_an_order():
  measured = slope("dpmpp_3m", {"compat": True}, build("edm"), (0.9, 0.1))
  assert measured == pytest.approx(2.0, abs=0.25)


@pytest.mark.slow
def test_a_last_step_of_order_1_costs_unipc_its_order():
  path = build("vp")
  solver = solvers.build("unipc", path, order=3)
  field = field_of(path, "data")
  run = jax.jit(lambda x, times: solvers.solve(solver, field, x, times))
  with jax.enable_x64(True):
    x = normal(20)
    errors = []
    for steps in (40, 80):
      times = grid((0.7, 0.2), steps, lead=True)
      errors.append(np.linalg.norm(run(x, times) - exact(path, x, 0.7, 0.2)))
  assert np.log2(errors[0] / errors[1]) == pytest.approx(2.0, abs=0.25)


EVERY = ["ab2", "ab3", "ddim", "dpmpp_2m", "dpmpp_3m", "unipc"]
OPTIONS = {"unipc": {"order": 3}}
every_method = pytest.mark.parametrize("name", EVERY)


def built(name, path):
  return solvers.build(name, path, **OPTIONS.get(name, {}))


@functools.cache
def straight(name):
  """Returns a solve on the straight path as a program, and what it follows."""
  path = build("straight")
  solver = built(name, path)
  field = field_of(path, solver.prediction)
  run = jax.jit(lambda x, times: solvers.solve(solver, field, x, times))
  return run, solver.prediction


@pytest.mark.slow
@every_method
def test_from_end_to_end_and_back(name):
  # alpha = 0 at the one end and sigma = 0 at the other: both log-SNR infinite.
  solver_ends, prediction = straight(name)
  eps = normal(50).astype(np.float32)
  down = np.linspace(1.0, 0.0, 101, dtype=np.float32)
  x = solver_ends(eps, down)
  bound = 0.02 if name == "ddim" else 3e-3
  np.testing.assert_allclose(x, MEAN + STD * eps, atol=bound)
  back = solver_ends(MEAN + STD * eps, down[::-1])
  np.testing.assert_allclose(back, eps, atol=5.0 * bound)
  # Nor is anything infinite in the derivative.
  slope = jax.jit(jax.grad(lambda x: jnp.sum(solver_ends(x, down))))(eps)
  np.testing.assert_allclose(slope, STD, atol=bound)


@every_method
@pytest.mark.parametrize("ends", [(1.0, 0.0), (0.0, 1.0)])
def test_a_single_step_from_end_to_end(name, ends):
  run, prediction = straight(name)
  end = run(normal(3).astype(np.float32), np.float32(ends))
  assert np.all(np.isfinite(end))
  if prediction == "data" and ends[1] == 0.0:
    np.testing.assert_array_equal(end, np.full(3, np.float32(MEAN)))


def test_ddim_on_the_straight_path_is_euler():
  x = normal(20).astype(np.float32)
  times = np.float32([1.0, 0.7, 0.3, 0.1, 0.0])
  ends = [straight(name)[0](x, times) for name in ("ddim", "euler")]
  np.testing.assert_allclose(*ends, atol=1e-6)


@every_method
def test_the_state_is_a_tree_in_float32_and_the_field_in_half(name):
  path = paths.straight()
  solver = built(name, path)
  times = np.float32([0.9, 0.5, 0.3, 0.2, 0.1])
  seen = []

  def field(state, t):
    seen.append((state["x"].dtype, t.dtype))
    return jax.tree.map(
      lambda leaf: jnp.bfloat16(0.5) * jnp.ones_like(leaf), state
    )

  x = normal(3).astype(jnp.bfloat16)
  state = {"x": x, "other": np.ones((2, 2), np.float32)}
  ends = jax.jit(
    lambda x: solvers.solve(solver, field, x, times, trajectory=True)
  )(state)
  assert ends["x"].shape == (5, 3) and ends["other"].shape == (5, 2, 2)
  assert ends["x"].dtype == jnp.float32
  assert set(seen) == {(jnp.dtype("float32"), jnp.dtype("float32"))}
  # A constant field: on the straight path from (0.9) to (0.1).
  x = x.astype(np.float32)
  keep = 1.0 / 9.0
  constant = {
    "velocity": x - 0.8 * 0.5,
    "data": keep * x + (0.9 - 0.1 * keep) * 0.5,
  }[solver.prediction]
  np.testing.assert_allclose(ends["x"][-1], constant, atol=1e-5)


@every_method
def test_the_field_is_evaluated_as_often_as_is_said(name):
  seen = []

  def field(x, t):
    jax.debug.callback(lambda t: seen.append(float(t)), t, ordered=True)
    return x

  solver = built(name, paths.straight())
  times = np.float32([0.9, 0.6, 0.5, 0.2])
  jax.jit(lambda x: solvers.solve(solver, field, x, times))(
    np.ones(2, np.float32)
  )
  jax.effects_barrier()
  assert len(seen) == solver.evaluations(3)
  assert set(seen) <= set(times.tolist())


def test_adams_bashforth_is_exact_for_polynomials_on_any_grid():
  with jax.enable_x64(True):
    times = np.array([0.0, 0.1, 0.35, 0.4, 0.9, 1.0])
    for name, power in (("ab2", 1), ("ab3", 2)):
      # Order 2 starts with Euler: from where the velocity is still.
      solver = solvers.build(name, paths.straight())

      @jax.jit
      def run(x, solver=solver, power=power):
        return solvers.solve(
          solver, lambda x, t: t**power, x, times, trajectory=True
        )

      states = run(np.float64(0.0))
      gained = np.diff(states)[power:]
      expected = np.diff(times ** (power + 1) / (power + 1))[power:]
      np.testing.assert_allclose(gained, expected, atol=1e-14)


def test_phis_keep_their_digits_at_every_size():
  z = np.concatenate([-np.logspace(-9, 2, 60), np.logspace(-9, 1, 60), [0.0]])
  phis = jax.jit(exponential.phis, static_argnums=1)
  single = phis(np.float32(z), 4)
  with jax.enable_x64(True):
    double = phis(np.float64(np.float32(z)), 4)
    # phi_k(z) = int_0^1 e^{(1 - s) z} s^{k-1} / (k-1)! ds
    s, w = np.polynomial.legendre.leggauss(80)
    s, w = 0.5 * (s + 1.0), 0.5 * w
    for k, values in enumerate(double):
      weights = w * s**k / math.factorial(k)
      integral = np.exp(np.float32(z)[:, None] * (1.0 - s)) @ weights
      np.testing.assert_allclose(values, integral, rtol=1e-9)
  for values, expected in zip(single, double, strict=True):
    np.testing.assert_allclose(values, expected, rtol=2e-6)


def test_quadrature_matches_its_moments():
  nodes, moments = [-2.0, -0.7, 1.0], [0.3, -0.2, 0.9]
  weights = unipc.quadrature(nodes, moments)
  found = [
    sum(g * r**k for g, r in zip(weights, nodes, strict=True)) for k in range(3)
  ]
  np.testing.assert_allclose(found, moments)


@pytest.mark.parametrize(
  "name,options,message",
  [
    ("unipc", {"order": 4}, "order 1, 2 or 3, not 4"),
    ("unipc", {"variant": "bh3"}, "no variant 'bh3'"),
    ("dpmpp_2m", {"form": "euler"}, "no form 'euler'"),
    ("ddim", {"eta": 1.5}, "eta must lie between 0 and 1, not 1.5"),
    ("ddim", {"clip": 0.0}, "must be above 0, not 0.0"),
    ("ddpm", {"variance": "middle"}, "no variance 'middle'"),
  ],
)
def test_options_out_of_range_are_refused(name, options, message):
  with pytest.raises(ValueError, match=message):
    solvers.build(name, paths.straight(), **options)
