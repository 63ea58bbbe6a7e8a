"""A whole sampler: guidance means the same whatever the solver follows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowjax.flow import grids, guidance, paths, prediction, sampling, solvers

B = 3
COND = {"label": jnp.array([0.0, 1.0, 2.0])}
UNCOND = {"label": jnp.full((B,), -1.0)}
X = jnp.asarray(np.random.default_rng(0).standard_normal((B, 4, 2), np.float32))


def network(x, t_B, cond):
  label_B = cond["label"][:, None, None]
  return jnp.sin(2.0 * x + label_B) + 0.3 * label_B * t_B[:, None, None]


def method(solver, source="velocity", rule="cfg", *, steps=6, **options):
  path = paths.straight()
  made = {
    key: options.pop(key) for key in ("momentum", "space") if key in options
  }
  return sampling.Method(
    path=path,
    prediction=source,
    solver=solvers.build(solver, path),
    grid=grids.build("uniform", path, steps),
    rule=guidance.build(rule, scale=3.0, **made),
    **options,
  )


@pytest.mark.parametrize("rule", sorted(guidance.GUIDANCES))
@pytest.mark.parametrize("source", ["velocity", "data", "edm"])
def test_euler_and_ddim_agree_on_what_is_guided(source, rule):
  # They are the same method on the straight path.
  euler, ddim = (
    method(name, source, rule).sample(network, COND, UNCOND, X)
    for name in ("euler", "ddim")
  )
  np.testing.assert_allclose(euler, ddim, atol=2e-4, rtol=1e-4)


def test_the_deviation_that_is_kept_is_that_of_what_the_network_predicts():
  def std(x):
    return np.std(x, axis=(1, 2))

  strong = network(X, jnp.ones((B,)), COND)
  found = method("euler", "data", "cfg_rescale", steps=1).sample(
    network, COND, UNCOND, X
  )
  # One step ends in the data predicted from noise.
  scaled = 0.7 * std(strong)
  weak = network(X, jnp.ones((B,)), UNCOND)
  plain = std(weak + 3.0 * (strong - weak))
  np.testing.assert_allclose(std(found), scaled + 0.3 * plain, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("solver", ["euler", "heun", "rk4", "dpmpp_2m"])
@pytest.mark.parametrize("momentum", [0.0, -0.5])
def test_the_first_steps_rest_with_and_without_momentum(solver, momentum):
  found = method(solver, rule="apg", momentum=momentum, still_steps=2).sample(
    network, COND, UNCOND, X
  )
  whole = method(solver, rule="apg", momentum=momentum)
  late = sampling.Method(
    path=whole.path,
    prediction=whole.prediction,
    solver=whole.solver,
    grid=whole.grid[2:],
    rule=whole.rule,
  )
  expected = late.sample(network, COND, UNCOND, X)
  np.testing.assert_allclose(found, expected, atol=1e-4, rtol=1e-4)
  moved = whole.sample(network, COND, UNCOND, X)
  assert np.abs(found - moved).max() > 1e-2


def test_steps_that_rest_are_not_evaluated():
  assert method("heun", still_steps=2).evaluations == 8
  for steps in (-1, 6):
    with pytest.raises(ValueError, match=f"still_steps = {steps} of the 6"):
      method("euler", still_steps=steps)


def test_pushes_and_worse_networks_are_of_the_networks_own_prediction():
  def worse(x, t_B, cond):
    return 0.5 * network(x, t_B, cond) - jnp.cos(x)

  for options in ({"worse": worse}, {"degraded": worse}):
    euler, ddim = (
      method(name, "edm", push_scale=0.5).sample(
        network, COND, UNCOND, X, **options
      )
      for name in ("euler", "ddim")
    )
    np.testing.assert_allclose(euler, ddim, atol=2e-4, rtol=1e-4)


def test_what_is_followed_is_converted():
  made = method("ddim", "edm", steps=1)
  t = jnp.ones((B,))
  guided = guidance.classifier_free(network, COND, UNCOND, scale=3.0)(X, 1.0)
  data = prediction.convert(made.path, "edm", "data", guided, X, t)
  found = jax.jit(lambda x: made.sample(network, COND, UNCOND, x))(X)
  np.testing.assert_allclose(found, data, atol=1e-5)


def gaussian(path, std=0.5):
  """Predicts the noise in N(1, std^2) on a path, exactly."""

  def predict(x, t_B, cond):
    c = path.at(t_B, x)
    square = c.sigma**2 + (std * c.alpha) ** 2
    return c.sigma * (x - c.alpha) / square

  return predict


@pytest.mark.parametrize("other", ["straight", "gvp", "edm", "vp"])
def test_a_network_is_sampled_on_another_path_than_its_own(other):
  trained_on, path = paths.build("vp"), paths.build(other, high=0.99)
  start = jnp.asarray(
    np.random.default_rng(1).standard_normal((64, 16), np.float32)
  )

  def drawn(predict, **options):
    return sampling.Method(
      path=path,
      prediction="noise",
      solver=solvers.build("heun", path),
      grid=grids.build("uniform", path, 40),
      rule=guidance.build("cfg", scale=1.0),
      **options,
    ).sample(predict, COND, UNCOND, start)

  found = drawn(gaussian(trained_on), trained_on=trained_on)
  np.testing.assert_allclose(found, drawn(gaussian(path)), atol=2e-3)
