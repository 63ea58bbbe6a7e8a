"""Likelihood: exact for normal data on every path, and good to train by."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flowjax.flow import likelihood, paths, solvers
from flowjax.flow.solvers import runge_kutta

MEAN_2 = np.array([0.7, -0.2])
COV_22 = np.array([[0.5, 0.3], [0.3, 0.4]])
STRAIGHT = paths.straight()


def correlated(path):
  """The velocity of x ~ N(MEAN_2, COV_22)."""
  # Along the axes of COV_22, all of whose functions are diagonal there.
  cov_2, axes_22 = np.linalg.eigh(COV_22)

  def field(x_B2, t):
    c = path.at(t, jnp.ones(()))
    variance_2 = c.alpha**2 * cov_2 + c.sigma**2
    rise_2 = c.alpha * c.alpha_dot * cov_2 + c.sigma * c.sigma_dot
    gap_B2 = (x_B2 - (c.alpha * MEAN_2)[None]) @ axes_22
    slope_B2 = gap_B2 * (rise_2 / variance_2)[None]
    return (c.alpha_dot * MEAN_2)[None] + slope_B2 @ axes_22.T

  return field


def density(field, path, x, times, **options):
  """`likelihood.log_density`, as one program."""
  return jax.jit(
    lambda x: likelihood.log_density(field, path, x, times, **options)
  )(x)


@functools.cache
def levels(path):
  """Returns a program: alpha and sigma at a time."""
  return jax.jit(lambda t: path.at(t, t)[:2])


def marginal(path, t):
  """The log-density of x_t."""
  alpha, sigma = map(float, levels(path)(float(t)))
  cov = alpha**2 * COV_22 + sigma**2 * np.eye(2)

  def log_density(x_B2):
    gap_B2 = x_B2 - alpha * MEAN_2[None]
    square_B = (gap_B2 @ np.linalg.inv(cov) * gap_B2).sum(axis=-1)
    return -0.5 * square_B - 0.5 * math.log(np.linalg.det(2 * math.pi * cov))

  return log_density


def key(seed=0):
  # Compiles in half of the time that threefry takes.
  return jax.random.key(seed, impl="rbg")


def points(count=8):
  random = np.random.default_rng(0)
  return MEAN_2 + random.standard_normal((count, 2)) @ np.linalg.cholesky(
    COV_22
  )


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(paths.PATHS))
def test_the_density_of_normal_data_is_exact_on_every_path(name):
  options = {"sigma_max": 5.0} if name in ("edm", "ve") else {}
  with jax.enable_x64(True):
    path = paths.build(name, **options)
    low, high = path.low, path.high
    x = points()
    # Even in the square root of t: sigma may grow like it.
    times = low + (high - low) * np.linspace(0.0, 1.0, 301) ** 2
    if path.steps:  # At the entries of a table the velocity jumps: step over.
      entries = np.arange(1, path.steps) / path.steps
      times = np.sort(np.append([low, high], [entries - 1e-9, entries + 1e-9]))
    result = density(
      correlated(path), path, x, times, log_prior=marginal(path, high)
    )
    exact = marginal(path, low)(x)
    np.testing.assert_allclose(result.log_density_B, exact, atol=3e-6)
    if name == "straight":
      # It ends in N(0, 1), which is the prior by itself.
      result = density(correlated(path), path, x, times)
      np.testing.assert_allclose(result.log_density_B, exact, atol=1e-8)


@pytest.mark.slow
def test_adaptive_solvers_are_exact_to_their_tolerance():
  pytest.importorskip("diffrax")
  # Of dopri5 as well, whose gradients and probes are looked at below.
  with jax.enable_x64(True):
    x, ends = points(), np.array([0.0, 1.0])
    solver = solvers.build("tsit5", STRAIGHT, rtol=1e-8, atol=1e-8)
    result = density(correlated(STRAIGHT), STRAIGHT, x, ends, solver=solver)
    np.testing.assert_allclose(
      result.log_density_B, marginal(STRAIGHT, 0.0)(x), atol=1e-7
    )


def test_a_sample_knows_its_density():
  with jax.enable_x64(True):
    noise = np.random.default_rng(0).standard_normal((5, 2))
    down = np.linspace(1.0, 0.0, 101)
    field = correlated(STRAIGHT)
    made = jax.jit(lambda x: likelihood.sample(field, STRAIGHT, x, down))(noise)
    np.testing.assert_allclose(
      made.log_density_B,
      marginal(STRAIGHT, 0.0)(np.asarray(made.x)),
      atol=1e-6,
    )
    back = density(field, STRAIGHT, made.x, down[::-1])
    np.testing.assert_allclose(back.x, noise, atol=1e-6)
    np.testing.assert_allclose(
      back.log_density_B, made.log_density_B, atol=1e-6
    )


@pytest.mark.parametrize(
  "name, law",
  [("rk4", "rademacher"), ("rk4", "gaussian"), ("dopri5", "rademacher")],
)
def test_one_probe_is_kept_for_the_whole_solve(name, law):
  if name == "dopri5":
    pytest.importorskip("diffrax")
  # The Jacobians commute, and integrate to -log(cov) / 2: so e^T J e does to
  # that form at e, if e stays what it is.
  with jax.enable_x64(True):
    path, rng = STRAIGHT, jax.random.key(3)
    divergence = likelihood.hutchinson(law, probes=2)

    @jax.jit
    def follow(x):
      result = likelihood.log_density(
        correlated(path),
        path,
        x,
        np.linspace(0.0, 1.0, 101),
        solver=solvers.build(name, path),
        divergence=divergence,
        rng=rng,
      )
      log_prior_B = likelihood.normal(1.0)(result.x)
      return result.log_density_B, log_prior_B, divergence.draw(rng, x)

    found_B, log_prior_B, probes_PB2 = follow(points(6))
    values, vectors = np.linalg.eigh(COV_22)
    log_22 = vectors @ np.diag(np.log(values)) @ vectors.T
    form_PB = np.einsum("pbi,ij,pbj->pb", probes_PB2, log_22, probes_PB2)
    expected = np.asarray(log_prior_B) - 0.5 * form_PB.mean(axis=0)
    bound = 1e-6 if name == "rk4" else 3e-4
    np.testing.assert_allclose(found_B, expected, atol=bound)


@pytest.mark.slow
def test_hutchinson_is_unbiased_and_exact_divergence_is_the_trace():
  # A field that is no sum of functions of one coordinate, on images.
  matrix = np.random.default_rng(0).standard_normal((12, 12)).astype(np.float32)

  def field(x, t):
    flat = x.reshape(x.shape[0], 12)
    return (jnp.sin(flat @ matrix) * jnp.cos(t)).reshape(x.shape)

  x = np.random.default_rng(1).standard_normal((3, 2, 3, 2), np.float32)

  @jax.jit
  def known(x):
    by_example = jax.jacfwd(lambda x: field(x[None], 0.3).reshape(12))
    return field(x, 0.3), jax.vmap(by_example)(x).reshape(3, 12, 12)

  expected, jacobian = map(np.asarray, known(x))
  trace_B = np.trace(jacobian, axis1=1, axis2=2)

  def evaluate(divergence):
    def found(x):
      probes = divergence.draw(jax.random.key(1, impl="rbg"), x)
      return divergence.evaluate(field, x, 0.3, probes)

    return jax.jit(found)(x)

  for chunk in (5, 16):
    v, divergence_B = evaluate(likelihood.exact(chunk))
    np.testing.assert_allclose(divergence_B, trace_B, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(v, expected, rtol=1e-6)
  for law in ("rademacher", "gaussian"):
    v, divergence_B = evaluate(likelihood.hutchinson(law, probes=4000))
    np.testing.assert_allclose(v, expected, rtol=1e-6)
    spread = np.sqrt(2.0 * np.sum(jacobian**2, axis=(1, 2)) / 4000)
    assert np.all(np.abs(divergence_B - trace_B) < 4.0 * spread)


@pytest.mark.parametrize(
  "name, divergence",
  [
    ("rk4", likelihood.exact()),
    ("rk4", likelihood.hutchinson()),
    pytest.param("dopri5", likelihood.hutchinson(), marks=pytest.mark.slow),
  ],
  ids=["rk4-exact", "rk4-hutchinson", "dopri5-hutchinson"],
)
def test_gradients_are_those_of_the_closed_form(name, divergence):
  # v = k x: log p(x) = log N(x e^k; 0, 1) + D k.
  if name == "dopri5":
    pytest.importorskip("diffrax")
  solver = solvers.build(name, STRAIGHT)
  x = points(3).astype(np.float32)

  def total(k):
    result = likelihood.log_density(
      lambda x, t: k * x,
      STRAIGHT,
      x,
      np.linspace(0.0, 1.0, 21).astype(np.float32),
      solver=solver,
      divergence=divergence,
      rng=jax.random.key(0),
    )
    return jnp.sum(result.log_density_B)

  exact = np.sum(2.0 - np.sum(np.square(x), axis=-1) * np.exp(2 * 0.3))
  np.testing.assert_allclose(jax.jit(jax.grad(total))(0.3), exact, rtol=1e-3)


@pytest.mark.slow
def test_a_flow_is_trained_by_maximum_likelihood():
  # A normal bent by a shear, which keeps its volume and so its entropy.
  entropy = math.log(2 * math.pi * math.e) + math.log(0.5)

  def draw(rng, count):
    a, b = jax.random.normal(rng, (2, count))
    return jnp.stack([a, 0.5 * b + 0.5 * a**2 - 0.5], axis=-1)

  def init():
    random, sizes = np.random.default_rng(0), (3, 24, 24, 2)
    scales = [
      (0.1 if b == 2 else 1.0) / a**0.5 for a, b in itertools.pairwise(sizes)
    ]
    return [
      scale * random.standard_normal(shape, np.float32)
      for scale, shape in zip(scales, itertools.pairwise(sizes), strict=True)
    ]

  def velocity(params, x, t):
    h = jnp.concatenate([x, jnp.full((len(x), 1), t, x.dtype)], axis=-1)
    for weight in params[:-1]:
      h = jnp.tanh(h @ weight)
    return h @ params[-1]

  def loss(params, x, steps):
    result = likelihood.log_density(
      lambda x, t: velocity(params, x, t),
      STRAIGHT,
      x,
      np.linspace(0.0, 1.0, steps + 1).astype(np.float32),
      solver=runge_kutta.rk4,
    )
    return -jnp.mean(result.log_density_B)

  params = init()
  optimiser = optax.adam(2e-2)

  @jax.jit
  def train(params):
    def step(carry, rng):
      params, memory = carry
      value, slope = jax.value_and_grad(loss)(params, draw(rng, 256), 3)
      change, memory = optimiser.update(slope, memory)
      return (optax.apply_updates(params, change), memory), value

    keys = jax.random.split(key(1), 150)
    (params, _), values = jax.lax.scan(
      step, (params, optimiser.init(params)), keys
    )
    return params, values

  trained, values = train(params)
  held_out = np.asarray(jax.jit(draw, static_argnums=1)(key(2), 4000))
  # What a sample of this size says of the entropy itself.
  a, b = (
    held_out[:, 0],
    (held_out[:, 1] + 0.5 - 0.5 * held_out[:, 0] ** 2) / 0.5,
  )
  truth = float(
    np.mean(0.5 * (a**2 + b**2)) + math.log(2 * math.pi) + math.log(0.5)
  )
  assert truth == pytest.approx(entropy, abs=0.05)
  # With other steps than it was trained with: it is the flow that fits.
  nll = float(jax.jit(loss, static_argnums=2)(trained, held_out, 16))
  assert float(values[0]) > entropy + 0.3
  assert truth - 0.02 < nll < truth + 0.06


def test_bits_per_dimension_count_the_bins():
  width = 2.0 / 255.0
  # Uniform over 256 bins from -1 to 1: 8 bits.
  log_density = -math.log(256.0 * width) * 48
  log_density_B = np.full(3, log_density, np.float32)
  bits = likelihood.bits_per_dimension(log_density_B, 48, width)
  np.testing.assert_allclose(bits, 8.0, rtol=1e-6)


def test_dequantised_values_fill_their_bins():
  width = 2.0 / 255.0
  levels = np.arange(256)
  x = jnp.asarray(np.tile(levels * width - 1.0, (100, 1)), jnp.float32)
  noisy = likelihood.dequantise(jax.random.key(0), x, width)
  np.testing.assert_array_equal(
    np.round((noisy + 1.0) / width), np.tile(levels, (100, 1))
  )
  offset = (np.asarray(noisy) - np.asarray(x)) / width
  assert abs(offset.mean()) < 0.01
  assert offset.std() == pytest.approx(1.0 / math.sqrt(12.0), rel=0.02)


def test_bad_input_is_refused():
  x, up = np.ones((2, 2), np.float32), np.float32([0.0, 1.0])
  field = correlated(STRAIGHT)
  with pytest.raises(ValueError, match="must be one of rademacher"):
    likelihood.hutchinson("uniform")
  with pytest.raises(ValueError, match="at least 1 probe"):
    likelihood.hutchinson(probes=0)
  with pytest.raises(ValueError, match="chunk"):
    likelihood.exact(0)
  with pytest.raises(ValueError, match="reverse them"):
    likelihood.log_density(field, STRAIGHT, x, up[::-1])
  with pytest.raises(ValueError, match="reverse them"):
    likelihood.sample(field, STRAIGHT, x, up)
  with pytest.raises(ValueError, match="random key"):
    likelihood.log_density(
      field, STRAIGHT, x, up, divergence=likelihood.hutchinson()
    )
  for name in ("edm_heun", "euler_maruyama"):
    solver = solvers.build(name, STRAIGHT)
    with pytest.raises(ValueError, match="does not integrate a velocity"):
      likelihood.log_density(field, STRAIGHT, x, up, solver=solver)
