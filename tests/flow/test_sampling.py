"""A whole sampler: guidance means the same whatever the solver follows."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowjax.flow import grids, guidance, paths, prediction, sampling, solvers

B = 3
COND = {"label": np.float32([0.0, 1.0, 2.0])}
UNCOND = {"label": np.full(B, -1.0, np.float32)}
X = np.random.default_rng(0).standard_normal((B, 4, 2), np.float32)


def network(x, t_B, cond):
  label_B = cond["label"][:, None, None]
  told_B = cond.get("guidance", jnp.zeros(x.shape[0]))[:, None, None]
  value = jnp.sin(2.0 * x + label_B) + 0.3 * label_B * t_B[:, None, None]
  return value + 0.1 * told_B


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


# Every rule is of one prediction, that is converted for either solver; and one
# rule that has a memory is of those that one of them follows as they are.
@pytest.mark.parametrize(
  "source, rule",
  [("edm", rule) for rule in sorted(guidance.GUIDANCES)]
  + [("velocity", "apg"), ("data", "apg")],
)
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

  ask = jax.jit(network)
  strong = np.asarray(ask(X, np.ones(B, np.float32), COND))
  found = method("euler", "data", "cfg_rescale", steps=1).sample(
    network, COND, UNCOND, X
  )
  # One step ends in the data predicted from noise.
  scaled = 0.7 * std(strong)
  weak = np.asarray(ask(X, np.ones(B, np.float32), UNCOND))
  plain = std(weak + 3.0 * (strong - weak))
  found = std(np.asarray(found))
  np.testing.assert_allclose(found, scaled + 0.3 * plain, rtol=1e-4)


@pytest.mark.slow
# The memory of momentum is carried over one evaluation of a step or several,
# and beside that of a solver; of what follows a step, rk4 asks as heun does.
@pytest.mark.parametrize(
  "solver, momentum", [("euler", 0.0), ("heun", -0.5), ("dpmpp_2m", -0.5)]
)
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
  assert np.abs(np.asarray(found) - np.asarray(moved)).max() > 1e-2


def test_steps_that_rest_are_not_evaluated():
  assert method("heun", still_steps=2).evaluations == 8
  for steps in (-1, 6):
    with pytest.raises(ValueError, match=f"still_steps = {steps} of the 6"):
      method("euler", still_steps=steps)


def test_pushes_and_worse_networks_are_of_the_networks_own_prediction():
  def worse(x, t_B, cond):
    return 0.5 * network(x, t_B, cond) - jnp.cos(x)

  push = guidance.Push(worse, 0.5, (0.2, 1.0))
  for options in ({"worse": worse}, {"pushes": [push, push]}):
    euler, ddim = (
      method(name, "edm").sample(network, COND, UNCOND, X, **options)
      for name in ("euler", "ddim")
    )
    np.testing.assert_allclose(euler, ddim, atol=2e-4, rtol=1e-4)


def test_two_pushes_add_up():
  def worse(x, t_B, cond):
    return 0.5 * network(x, t_B, cond) - jnp.cos(x)

  def ends(*scales):
    pushes = [guidance.Push(worse, scale) for scale in scales]
    made = method("euler").sample(network, COND, UNCOND, X, pushes=pushes)
    return np.asarray(made)

  np.testing.assert_allclose(ends(0.2, 0.3), ends(0.5), atol=1e-5)
  assert np.abs(ends(0.5) - ends()).max() > 0.05


@pytest.mark.parametrize(
  "rule,options",
  [(rule, {}) for rule in sorted(guidance.GUIDANCES)]
  + [("apg", {"momentum": -0.5})],
)
def test_each_example_has_its_own_scale(rule, options):
  made = method("euler", rule=rule, steps=3, **options)

  @jax.jit
  def sample(scale):
    return made.sample(network, COND, UNCOND, X, scale=scale)

  scales = np.float32([1.0, 1.5, 4.0])
  found = np.asarray(sample(scales))
  for i, scale in enumerate(scales):
    alone = sample(scale)
    np.testing.assert_allclose(found[i], alone[i], atol=1e-5, rtol=1e-5)
  plain = made.sample(network, COND, UNCOND, X)
  assert np.abs(found - np.asarray(plain)).max() > 1e-2


def test_a_learned_variance_goes_by_guidance_and_costs_nothing():
  calls = []

  def both(x, t_B, cond):
    jax.debug.callback(lambda x: calls.append(len(x)), x)
    value = network(x, t_B, cond)
    return value, jnp.tanh(value)

  def worse(x, t_B, cond):
    return 0.5 * network(x, t_B, cond)

  def fields(predict, scale, **options):
    rule = guidance.build("cfg", scale=scale)
    more = {"interval": (0.2, 0.8), "path": paths.straight(), "target": "data"}
    return guidance.guided(predict, COND, UNCOND, rule, **more, **options)

  for scale, pushes in ((1.0, []), (3.0, [guidance.Push(worse, 0.5)])):
    for t, count in ((0.5, B if scale == 1.0 else 2 * B), (0.9, B)):
      calls.clear()
      made = jax.jit(fields(both, scale, pushes=pushes))
      value, v = made(X, np.float32(t))
      jax.effects_barrier()
      assert calls == [count]
      alone = jax.jit(fields(network, scale, pushes=pushes))(X, t)
      np.testing.assert_allclose(value, alone, atol=1e-5)
      strong = np.asarray(jax.jit(network)(X, np.full(B, t, np.float32), COND))
      np.testing.assert_allclose(v, np.tanh(strong), atol=1e-6)
  rule = guidance.build("cfg", scale=3.0)
  value, v = jax.jit(guidance.autoguided(both, worse, COND, rule))(X, 0.5)
  expected = jax.jit(guidance.autoguided(network, worse, COND, rule))(X, 0.5)
  np.testing.assert_allclose(value, expected, atol=1e-5)
  strong = np.asarray(jax.jit(network)(X, np.full(B, 0.5, np.float32), COND))
  np.testing.assert_allclose(v, np.tanh(strong), atol=1e-6)


@pytest.mark.slow(1)
def test_a_solve_that_stops_is_reported_out_of_jit():
  pytest.importorskip("diffrax")

  def broken(x, t_B, cond):
    return network(x, jnp.where(t_B < 0.4, jnp.nan, t_B), cond)

  made = method("dopri5")
  fields = [made.field(predict, COND, UNCOND) for predict in (broken, network)]
  images, report = jax.jit(lambda x: made.reported(fields[0], x))(X)
  assert np.all(np.isnan(images)) and not report.finished
  assert int(report.evaluations) < 500
  said = made.reason(fields[0], report)
  assert "stopped at t = 0.4" in said and "not finite" in said
  assert f"after {int(report.evaluations)} evaluations" in said
  images, report = jax.jit(lambda x: made.reported(fields[1], x))(X)
  assert report.finished and np.all(np.isfinite(images))
  _, report = method("euler").reported(fields[1], X)
  assert report is None


def test_what_is_followed_is_converted():
  made = method("ddim", "edm", steps=1)
  guide = guidance.classifier_free(network, COND, UNCOND, scale=3.0)

  @jax.jit
  def wanted(x):
    t_B = jnp.ones((B,))
    return prediction.convert(made.path, "edm", "data", guide(x, 1.0), x, t_B)

  data = wanted(X)
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
  start = np.random.default_rng(1).standard_normal((64, 16), np.float32)

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


# Each solver, each path, and what remembers steps on a grid that is not even.
@pytest.mark.parametrize(
  "name, solver",
  [
    ("straight", "ddim"),
    ("straight", "rk4"),
    ("vp", "heun"),
    ("vp", "dpmpp_2m"),
    ("edm", "dpmpp_2m"),
  ],
)
def test_what_is_encoded_is_drawn_again(name, solver):
  path = paths.build(name)
  way = sampling.Method(
    path=path,
    prediction="v",
    solver=solvers.build(solver, path),
    grid=grids.build("karras" if name == "edm" else "uniform", path, 60),
    rule=guidance.build("cfg", scale=1.0),
  )

  def predict(x, t_B, cond):
    noise = gaussian(path)(x, t_B, cond)
    return prediction.convert(path, "noise", "v", noise, x, t_B)

  images = 1.0 + 0.5 * np.random.default_rng(2).standard_normal((B, 400))
  start = way.inverse().sample(predict, COND, COND, images.astype(np.float32))
  # Standard normal, as samples start.
  np.testing.assert_allclose(np.std(np.asarray(start)), 1.0, atol=0.06)
  again = way.sample(predict, COND, UNCOND, start)
  first_order = solver == "ddim"
  np.testing.assert_allclose(again, images, atol=0.2 if first_order else 0.05)


@pytest.mark.parametrize(
  "solver", ["ddpm", "dpmpp_sde_2m", "euler_maruyama", "heun_sde"]
)
def test_noise_that_is_drawn_cannot_be_encoded(solver):
  with pytest.raises(ValueError, match=f"'{solver}' draws noise"):
    method(solver).inverse()


def test_a_rest_from_which_x_comes_too_large_is_refused():
  path = paths.build("edm")
  options = dict(
    path=path,
    prediction="edm",
    solver=solvers.build("heun", path),
    grid=grids.build("karras", path, 18),
    rule=guidance.build("cfg_zero_star", scale=2.0),
  )
  sampling.Method(**options)
  with pytest.raises(ValueError, match="of its size at the start"):
    sampling.Method(**options, still_steps=1)


def test_what_is_told_has_no_worse_network_and_no_interval():
  with pytest.raises(ValueError, match="told"):
    method("euler", rule="distilled", interval=(0.2, 0.8))
  with pytest.raises(ValueError, match="told"):
    method("euler", rule="distilled").sample(
      network, COND, UNCOND, X, worse=network
    )


def test_momentum_is_carried_where_a_scale_is_given_later():
  made = method("euler", rule="apg", momentum=-0.5)
  idle = dataclasses.replace(
    made, rule=dataclasses.replace(made.rule, scale=1.0)
  )
  scales = np.full(B, 3.0, np.float32)
  np.testing.assert_allclose(
    idle.sample(network, COND, UNCOND, X, scale=scales),
    made.sample(network, COND, UNCOND, X, scale=scales),
  )
