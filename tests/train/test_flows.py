"""What a config says of the mathematics reaches the mathematics."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowjax import errors, models
from flowjax.train import experiment, flows, methods, presets

SHAPE = (6, 4, 4, 1)


def config(preset=None, **model):
  values = experiment.defaults("dit")
  values.model.update(
    image_size=(8, 8), channels=1, num_classes=10, width=32, heads=2, **model
  )
  if preset:
    presets.apply(values, preset)
  return values


def network(apply, **more):
  """A network of one number, that says apply(scale, x, t)."""
  return models.Network(
    config=None,
    init=lambda rng: {"scale": jnp.ones(())},
    apply=lambda params, x, t, cond, rng=None: apply(params["scale"], x, t),
    unconditional=lambda cond: cond,
    dropped=lambda cond, rng: cond,
    flops=0,
    example=lambda batch: {},
    **more,
  )


def batch(std=1.0, shape=SHAPE):
  image = std * np.random.default_rng(0).standard_normal(shape, np.float32)
  return {"image": image, "label": np.zeros(shape[:1], np.int32)}


@pytest.mark.slow(0.5)
@pytest.mark.parametrize("name", presets.PRESETS)
def test_each_preset_trains_and_can_be_sampled(name):
  built = experiment.build(config(name))
  channels = 2 if built.flow.learned_variance else 1

  def apply(scale, x, t):
    return jnp.concatenate([scale * x] * channels, axis=-1)

  net = network(apply)
  loss = built.flow.loss(net)
  short = dataclasses.replace(built.sample, steps=3)
  method = short.method(built.flow, flows.tokens_of(built.model))
  predict = built.flow.predictor(net, with_variance=method.learns_variance)

  @jax.jit
  def both(params, batch):
    trained = jax.value_and_grad(lambda *inputs: loss(*inputs)[0])(
      params, batch, jax.random.key(1)
    )
    drawn = method.sample(
      lambda x, t, cond: predict(params, x, t, cond, None),
      {}, {}, batch["image"], jax.random.key(2),
    )  # fmt: skip
    return *trained, drawn

  value, slopes, images = both({"scale": np.float32(1.0)}, batch())
  assert np.isfinite(value) and float(slopes["scale"]) != 0.0
  assert images.shape == SHAPE and np.isfinite(images).all()


def test_an_unknown_preset_names_the_nearest():
  with pytest.raises(ValueError, match="'score_sde_vp'"):
    presets.apply(config(), "score_sde_pv")


def test_options_that_are_not_set_are_the_papers():
  path = experiment.build(config("score_sde_vp")).flow.path.build()
  values = config("score_sde_vp")
  values.flow.path.beta_max = 10.0
  other = experiment.build(values).flow.path.build()
  t = jnp.float32(0.7)
  assert float(path.alpha(t)) < float(other.alpha(t))


def test_bits_along_the_ode_are_those_of_a_gaussian():
  # x ~ N(0, 4) on the straight path: v = (t - 4 (1 - t)) / var(t) x_t.
  def velocity(scale, x, t):
    t = t.reshape(-1, 1, 1, 1)
    variance = 4.0 * (1.0 - t) ** 2 + t**2
    return scale * (t - 4.0 * (1.0 - t)) / variance * x

  flow = flows.FlowConfig(
    objective="maximum_likelihood",
    likelihood=flows.LikelihoodConfig(divergence="exact", steps=32),
  )
  net, data = network(velocity), batch(2.0)
  value, _ = flow.loss(net)(net.init(None), data, jax.random.key(0))
  log_p = -0.5 * data["image"] ** 2 / 4.0 - 0.5 * math.log(2 * math.pi * 4.0)
  expected = -float(jnp.mean(log_p)) / math.log(2.0)
  assert float(value) == pytest.approx(expected, abs=1e-3)
  estimated = dataclasses.replace(flow, likelihood=flows.LikelihoodConfig())
  # The field is linear and isotropic: any probe of signs finds its trace.
  guess, _ = estimated.loss(net)(net.init(None), data, jax.random.key(0))
  assert float(guess) == pytest.approx(expected, abs=1e-2)


def test_a_normalizing_flow_needs_its_objective():
  net = network(None, forward=lambda *args: None)
  with pytest.raises(ValueError, match="maximum_likelihood"):
    flows.FlowConfig().loss(net)


@pytest.mark.slow(1)
def test_uncertainty_is_learned_beside_the_network():
  plain = network(lambda scale, x, t: scale * x)
  net = models.with_uncertainty(plain)
  params = net.init(jax.random.key(0))
  loss = flows.FlowConfig(uncertainty=True).loss(net)
  mine, slopes = jax.jit(jax.value_and_grad(lambda *inputs: loss(*inputs)[0]))(
    params, batch(), jax.random.key(1)
  )
  assert float(jnp.abs(slopes["uncertainty"]["kernel"]).max()) > 0.0
  # At its start u = 0, and the loss is the plain one.
  rest = jax.jit(flows.FlowConfig().loss(plain))(
    {"scale": params["scale"]}, batch(), jax.random.key(1)
  )[0]
  np.testing.assert_allclose(mine, rest, rtol=1e-6)
  t = jnp.linspace(0.0, 1.0, 5)
  moved = {**params, "uncertainty": {"kernel": jnp.ones(128)}}
  assert len(np.unique(np.round(net.uncertainty(moved, t), 4))) == 5


@pytest.mark.slow(0.5)
@pytest.mark.parametrize("solver", ["euler_maruyama", "ddpm", "dpmpp_sde_2m"])
def test_what_an_example_receives_does_not_depend_on_the_others(solver):
  flow = flows.FlowConfig(
    path=flows.PathConfig("vp"),
    prediction="data",
    law=flows.LawConfig("uniform"),
  )
  method = methods.SampleConfig(
    steps=4, solver=methods.SolverConfig(solver)
  ).method(flow)
  keys = jax.random.split(jax.random.key(3), SHAPE[0])
  start = batch()["image"]

  @jax.jit
  def draw(start, keys):
    return method.sample(lambda x, t, cond: 0.5 * x, {}, {}, start, keys)

  found = draw(start, keys)
  np.testing.assert_allclose(
    found[:2], draw(start[:2], keys[:2]), rtol=1e-5, atol=1e-6
  )
  assert not np.allclose(found[0], found[1])


def test_skipped_layers_push_and_must_exist():
  values = config().sample.to_dict()
  values["guidance"].update(skip_layers=(0,), skip_scale=0.0)
  full = config().to_dict() | {"sample": values}
  with pytest.raises(errors.UserError, match="need each other"):
    experiment.build(full)


@pytest.mark.slow(1)
def test_perturbed_layers_push_beside_skipped_ones():
  values = config(depth=3)
  values.sample.guidance.update(
    skip_layers=(0,),
    skip_scale=2.5,
    perturbed_layers=(1, 2),
    perturbed_scale=3.0,
    perturbed_interval=(0.2, 0.9),
  )
  built = experiment.build(values)
  net = models.build(built.model)
  skipped, perturbed = built.sample.guidance.pushes(net)
  assert (skipped.scale, skipped.interval) == (2.5, (0.0, 1.0))
  assert (perturbed.scale, perturbed.interval) == (3.0, (0.2, 0.9))
  params = jax.tree.map(
    lambda p: 0.1 * np.cos(np.arange(p.size, dtype=p.dtype)).reshape(p.shape),
    jax.eval_shape(net.init, jax.random.key(0)),
  )
  x = jax.random.normal(jax.random.key(2), (2, 8, 8, 1))
  inputs = (x, jnp.array([0.2, 0.7]), {"label": jnp.array([1, 2])})
  for push, apply in (
    (skipped, models.without_layers(net, (0,))),
    (perturbed, models.with_identity_attention(net, (1, 2))),
  ):
    found = jax.jit(push.degraded)(params, *inputs)
    np.testing.assert_array_equal(found, jax.jit(apply)(params, *inputs))
  assert config().sample.guidance.perturbed_layers == ()


def test_a_learned_variance_is_of_the_path_of_training():
  values = config("iddpm")
  built = experiment.build(values)
  assert built.sample.method(built.flow).learns_variance
  values.sample.grid.name = "uniform"
  values.sample.path.name = "vp"
  with pytest.raises(errors.UserError, match="'vp', is to be followed"):
    experiment.build(values)


def test_the_variance_that_a_network_learns_is_the_second_half():
  flow = experiment.build(config("iddpm")).flow
  net = network(lambda scale, x, t: jnp.concatenate([scale * x, 0.5 * x], -1))
  inputs = ({"scale": 2.0}, jnp.ones(SHAPE), jnp.ones(6), {}, None)
  value, v = flow.predictor(net, with_variance=True)(*inputs)
  np.testing.assert_allclose(value, 2.0)
  np.testing.assert_allclose(v, 0.5)
  np.testing.assert_array_equal(flow.predictor(net)(*inputs), value)


@pytest.mark.slow(0.5)
def test_a_network_without_layers_is_the_one_whose_gates_are_shut():
  built = experiment.build(config(depth=3))
  net = models.build(built.model)
  random = np.random.default_rng(1)
  params = jax.tree.map(
    lambda p: p + 0.1 * random.standard_normal(p.shape, p.dtype),
    jax.jit(net.init)(jax.random.key(0)),
  )
  shut = jax.tree.map(np.array, params)
  for gates in shut["blocks"]["modulation"].values():
    gates[1, ..., (2, 5), :] = 0.0
  x = jax.random.normal(jax.random.key(2), (2, 8, 8, 1))
  inputs = (x, jnp.array([0.2, 0.7]), {"label": jnp.array([1, 2])})
  np.testing.assert_allclose(
    jax.jit(models.without_layers(net, (1,)))(params, *inputs),
    jax.jit(net.apply)(shut, *inputs),
    atol=1e-5,
  )
  with pytest.raises(ValueError, match="0 to 2"):
    models.without_layers(net, (3,))


def test_a_bridge_is_refused_for_what_does_not_determine_it():
  full = config().to_dict()
  full["flow"]["prediction"] = "data"
  full["flow"]["coupling"].update(name="schrodinger_bridge", plan="exact")
  with pytest.raises(errors.UserError, match="velocity"):
    experiment.build(full)


def test_momentum_is_refused_where_a_solver_chooses_its_steps():
  full = config().to_dict()
  full["sample"]["solver"]["name"] = "dopri5"
  full["sample"]["guidance"].update(name="apg", scale=2.0, momentum=-0.5)
  with pytest.raises(errors.UserError, match="chooses its own steps"):
    experiment.build(full)


@pytest.mark.parametrize(
  ("changes", "text"),
  [
    # The score that a solver with noise needs is not that of these pairs.
    (
      {
        "flow": {"coupling": {"name": "optimal_transport"}},
        "sample": {"solver": {"name": "euler_maruyama"}},
      },
      "follow the ODE",
    ),
    (
      {"flow": {"objective": "maximum_likelihood", "uncertainty": True}},
      "without effect",
    ),
    ({"flow": {"likelihood": {"solver": "ddim"}}}, "follow a velocity alone"),
    ({"flow": {"likelihood": {"solver": "rk5"}}}, "'rk4'"),
    (
      {"sample": {"guidance": {"skip_layers": (12,), "skip_scale": 1.0}}},
      "blocks 0 to",
    ),
    (
      {"sample": {"guidance": {"perturbed_layers": (12,)}}},
      "perturbed_scale = 0.0 need each other",
    ),
    (
      {"sample": {"guidance": {"perturbed_scale": 2.0}}},
      r"perturbed_layers = \(\).*need each other",
    ),
    (
      {
        "sample": {
          "guidance": {"perturbed_layers": (12,), "perturbed_scale": 1.0}
        }
      },
      r"perturbed_layers: blocks \(12,\): this network has the blocks 0 to 11",
    ),
    (
      {"sample": {"guidance": {"perturbed_interval": (0.5, 0.2)}}},
      "perturbed_interval",
    ),
    (
      {"sample": {"guidance": {"perturbed_scale": math.nan}}},
      "perturbed_scale = nan must be a finite",
    ),
    (
      {"sample": {"steps": 2, "guidance": {"zero_init_steps": 2}}},
      "must move",
    ),
    (
      {
        "flow": {
          "objective": "maximum_likelihood",
          "law": {"name": "uniform"},
        }
      },
      "law belongs to the objective 'matching'",
    ),
    (
      {"sample": {"solver": {"name": "ddpm", "variance": "learned"}}},
      "learns no variance.*'small'.*learned_variance=True",
    ),
    (
      {"sample": {"solver": {"name": "heun", "variance": "learned"}}},
      "'heun' has no option 'variance'",
    ),
  ],
)
def test_what_would_be_wrong_or_without_effect_is_refused(changes, text):
  def merged(values, more):
    for key, item in more.items():
      if isinstance(item, dict):
        merged(values[key], item)
      else:
        values[key] = item

  full = config().to_dict()
  merged(full, changes)
  with pytest.raises(errors.UserError, match=text):
    experiment.build(full)


def test_a_preset_replaces_all_of_another():
  values = presets.apply(config("edm"), "rectified_flow")
  fresh = presets.apply(config(), "rectified_flow")
  assert experiment.build(values) == experiment.build(fresh)


def test_the_likelihood_trains_with_labels_dropped():
  seen = []

  def apply(params, x, t, cond, rng=None):
    seen.append(rng is not None)
    return params["scale"] * x

  net = dataclasses.replace(network(None), apply=apply)
  flow = flows.FlowConfig(objective="maximum_likelihood")
  flow.loss(net)(net.init(None), batch(), jax.random.key(0))
  assert all(seen)
  seen.clear()
  flow.validation_loss(net)(net.init(None), batch(), jax.random.key(0))
  assert not any(seen)


def test_options_of_a_distance_and_of_paired_couplings_reach_them():
  values = config()
  values.flow.distance.update(name="pseudo_huber", c=0.5, of="examples")
  measure = experiment.build(values).flow.distance.build()
  zero, two = jnp.zeros((1, 3)), jnp.full((1, 3), 2.0)
  np.testing.assert_allclose(measure(two, zero), np.sqrt(4.25) - 0.5, rtol=1e-6)
  values.flow.distance.scale = 2.0
  with pytest.raises(
    errors.UserError, match="no option 'scale'; it takes c, of"
  ):
    experiment.build(values)

  coupling = flows.CouplingConfig("pairs", then="optimal_transport").build()
  x, ends = jnp.array([[0.0], [1.0]]), jnp.array([[1.1], [0.1]])
  _, found, _ = coupling(jax.random.key(0), x, 0 * x, {"source": ends})
  np.testing.assert_allclose(found, ends[::-1])
  with pytest.raises(ValueError, match="'pairs' alone"):
    flows.CouplingConfig("independent", then="optimal_transport")


@pytest.mark.parametrize(
  ("rule", "base", "shift"),
  [("sd3", 4, 2.0), ("sd3", None, 0.25), ("flux", None, math.exp(0.459375))],
)
def test_a_shift_follows_from_the_length_of_the_sequence(rule, base, shift):
  values = config()  # 16 tokens
  for group in (values.flow.law, values.sample.grid):
    group.update(shift_by=rule, base_tokens=base)
  values.sample.steps = 4
  built = experiment.build(values)
  fixed = flows.LawConfig(shift=shift)
  u = jnp.array([0.1, 0.5, 0.8])
  path, tokens = built.flow.path.build(), flows.tokens_of(built.model)
  np.testing.assert_allclose(
    built.flow.law.build(path, tokens).quantile(u),
    fixed.build(path, None).quantile(u),
    rtol=1e-6,
  )
  grid = built.sample.method(built.flow, tokens).grid
  t = np.linspace(1, 0, 5)
  np.testing.assert_allclose(grid, shift * t / (1 + (shift - 1) * t), rtol=1e-6)


def test_a_shift_that_follows_from_nothing_is_refused():
  values = config()
  values.flow.law.base_tokens = 256
  with pytest.raises(errors.UserError, match="base_tokens = 256 is an option"):
    experiment.build(values)
  values.flow.law.shift_by = "sd33"
  with pytest.raises(errors.UserError, match="mean 'sd3'"):
    experiment.build(values)


def test_the_space_of_a_rule_is_that_of_the_config():
  values = config()
  values.sample.guidance.update(name="apg", scale=2.0, space="noise")
  built = experiment.build(values)
  assert built.sample.method(built.flow).rule.space == "noise"
  values.sample.guidance.space = "noises"
  with pytest.raises(errors.UserError, match="mean 'noise'"):
    experiment.build(values)


def test_samples_may_follow_another_path():
  values = config("sd2_v")
  values.sample.update(grid={"name": "uniform"}, path={"name": "straight"})
  built = experiment.build(values)
  method = built.sample.method(built.flow)
  assert method.path.name == "straight"
  assert method.trained_on.name == "scaled_linear"
  values.sample.path.update(name="as_trained", high=0.9)
  with pytest.raises(errors.UserError, match="high of the path 'as_trained'"):
    experiment.build(values)
