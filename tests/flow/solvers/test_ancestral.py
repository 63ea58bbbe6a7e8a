"""What stochastic methods draw: the moments of what comes out."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowjax.flow import paths, solvers, variance
from flowjax.flow.solvers import noise

MEAN, STD = 0.7, 0.3


def key(seed=0):
  # Compiles in a fifth of the time that threefry takes.
  return jax.random.key(seed, impl="rbg")


STOCHASTIC = [
  ("ddim", (("eta", 0.5),)),
  ("ddim", (("eta", 1.0),)),
  ("ddpm", ()),
  ("ddpm", (("variance", "large"),)),
  ("dpmpp_sde_2m", ()),
]
every_method = pytest.mark.parametrize("name,options", STOCHASTIC, ids=str)


def data_field(path):
  """E[x | x_t] for x ~ N(MEAN, STD^2)."""

  def field(x_t, t):
    c = path.at(t, x_t)
    gain = c.alpha * STD**2 / ((c.alpha * STD) ** 2 + c.sigma**2)
    return MEAN + gain * (x_t - c.alpha * MEAN)

  return field


@functools.cache
def moments(name, options, path, steps):
  """Returns mean and standard deviation of the samples, without sampling.

  The field is linear, and so is the end in all that is drawn: the start and
  the noise of every step. Its derivatives in them give the variance.
  """
  times = np.linspace(1.0, 0.0, steps + 1)
  with jax.enable_x64(True):
    solver = solvers.build(name, path, **dict(options))

    def end(drawn):
      given = dataclasses.replace(
        solver, draw=lambda rng, number, x: drawn[1 + number]
      )
      start = deviation(path, times[0]) * drawn[0] + path.alpha(times[0]) * MEAN
      return solvers.solve(given, data_field(path), start, times, rng=key())

    mean, slopes = jax.jit(jax.value_and_grad(end))(np.zeros(len(times)))
    return float(mean), float(np.linalg.norm(slopes))


def deviation(path, t):
  return jnp.sqrt((path.alpha(t) * STD) ** 2 + path.sigma(t) ** 2)


# Each where alpha falls evenly; where it does not, the two kinds of step.
@pytest.mark.slow
@pytest.mark.parametrize(
  "name, options, path",
  [(*method, "straight") for method in STOCHASTIC]
  + [(*method, "gvp") for method in (STOCHASTIC[0], STOCHASTIC[-1])],
  ids=str,
)
def test_the_moments_of_the_samples_approach_those_of_the_data(
  name, options, path
):
  # To first order, from pure noise to the data, ends included.
  path = paths.build(path)
  errors = []
  for steps in (50, 100):
    mean, std = moments(name, options, path, steps)
    errors.append(max(abs(mean - MEAN), abs(std - STD)))
  assert errors[1] < 0.7 * errors[0] and errors[1] < 0.02, errors


@pytest.mark.slow
def test_drawn_samples_have_these_moments():
  path = paths.straight()
  times = np.linspace(1.0, 0.0, 21, dtype=np.float32)
  eps = np.random.default_rng(1).standard_normal(40_000, np.float32)
  for name in ("ddpm", "dpmpp_sde_2m"):
    mean, std = moments(name, (), path, 20)
    solver = solvers.build(name, path)
    x = np.asarray(
      solvers.solve(solver, data_field(path), eps, times, rng=key(2))
    )
    # Five standard errors of a mean and of a standard deviation.
    assert np.mean(x) == pytest.approx(mean, abs=5.0 * std / 200.0)
    assert np.std(x) == pytest.approx(std, abs=5.0 * std / 283.0)


@every_method
def test_noise_needs_a_key_and_follows_it(name, options):
  path = paths.straight()
  solver = solvers.build(name, path, **dict(options))
  field = data_field(path)
  x, times = np.ones(4, np.float32), np.float32([1.0, 0.5, 0.1])
  with pytest.raises(ValueError, match=f"{name!r} draws noise"):
    solvers.solve(solver, field, x, times)
  run = jax.jit(lambda key: solvers.solve(solver, field, x, times, rng=key))
  one, same, other = (np.asarray(run(key(seed))) for seed in (0, 0, 1))
  np.testing.assert_array_equal(one, same)
  assert not np.any(one == other)


def test_every_step_and_every_leaf_has_its_own_noise():
  x = {"a": jnp.zeros(100), "b": jnp.zeros(100)}
  draw = jax.jit(lambda number: noise.normal(key(), number, x))
  first, second = (draw(np.int32(i)) for i in range(2))
  drawn = np.stack([first["a"], first["b"], second["a"], second["b"]])
  correlations = np.corrcoef(drawn) - np.eye(4)
  assert np.max(np.abs(correlations)) < 0.4


@pytest.mark.slow(1)
@pytest.mark.parametrize("path", ["ddpm", "straight"])
def test_a_learned_variance_has_the_two_others_as_its_ends(path):
  path = paths.build(path)
  x = np.linspace(-1.0, 1.0, 5, dtype=np.float32)
  times = np.float32([1.0, 0.6, 0.1, 0.0])
  field = data_field(path)

  def end(field, variance):
    solver = solvers.build("ddpm", path, variance=variance)
    return solvers.solve(solver, field, x, times, rng=key(3))

  @jax.jit
  def learned(v):
    return end(lambda x, t: (field(x, t), jnp.full_like(x, v)), "learned")

  half = np.asarray(learned(0.0))
  assert np.all(np.isfinite(half))
  for v, kind in ((-1.0, "small"), (1.0, "large")):
    found = learned(v)
    np.testing.assert_allclose(found, end(field, kind), rtol=2e-5)
    assert np.abs(half - np.asarray(found)).max() > 1e-3


def test_one_step_of_a_table_has_the_variance_that_was_trained():
  # The step from entry i to i - 1 is that of `variance.posterior`.
  path = paths.build("cosine", steps=20)
  posterior = variance.posterior(path)
  solver = solvers.build("ddpm", path, variance="learned")
  v = np.linspace(-1.0, 1.5, 6, dtype=np.float32)

  @jax.jit
  def moved(noise, times):
    given = dataclasses.replace(solver, draw=lambda *_: jnp.full(6, noise))
    return solvers.solve(
      given, lambda x, t: (x, v), jnp.ones(6), times, rng=key()
    )

  log_variance = jax.jit(posterior.log_variance)
  for i in (1, 7, 19):
    times = np.float32([(i + 1) / 20, i / 20])
    deviation = np.asarray(moved(1.0, times)) - np.asarray(moved(0.0, times))
    expected = np.exp(0.5 * np.asarray(log_variance(v, np.int32(i))))
    np.testing.assert_allclose(deviation, expected, rtol=1e-3)


def test_the_choice_of_variance_names_what_there_is():
  with pytest.raises(ValueError, match="'small'.*'large'.*'learned'"):
    solvers.build("ddpm", paths.straight(), variance="middle")
  with pytest.raises(ValueError, match="has no option 'variance'"):
    solvers.build("ddim", paths.straight(), variance="learned")


def test_ddpm_is_ddim_with_eta_1_to_the_bit():
  path = paths.build("ddpm")
  x, times = np.ones(5, np.float32), np.float32([1.0, 0.4, 0.0])
  one, other = (
    solvers.solve(
      solvers.build(name, path, **options),
      data_field(path),
      x,
      times,
      rng=key(3),
    )
    for name, options in (("ddpm", {}), ("ddim", {"eta": 1.0}))
  )
  np.testing.assert_array_equal(one, other)


@every_method
def test_the_last_state_holds_no_noise(name, options):
  # At sigma = 0 it is the data predicted.
  path = paths.straight()
  solver = solvers.build(name, path, **dict(options))
  times = np.float32([0.5, 0.0])
  x = np.linspace(-1.0, 1.0, 5, dtype=np.float32)
  end = solvers.solve(solver, data_field(path), x, times, rng=key())
  np.testing.assert_allclose(end, data_field(path)(x, 0.5), rtol=1e-6)
