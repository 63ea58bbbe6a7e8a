"""Guidance: what it computes, and how many evaluations it pays for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowjax.flow import guidance, paths, solvers, times
from flowjax.flow import prediction as predictions
from flowjax.flow.solvers import wrapped

B = 4
COND = {"label": jnp.array([0, 1, 2, 3]), "text": jnp.ones((B, 2))}
UNCOND = {"label": jnp.full((B,), 9), "text": jnp.zeros((B, 2))}
X = jnp.asarray(
  np.random.default_rng(0).standard_normal((B, 3, 3, 2), np.float32)
)


def velocity(x, t_B, cond):
  label = cond["label"].astype(jnp.float32) + cond["text"].sum(axis=1)
  return (
    jnp.sin(x * (1.0 + label[:, None, None, None])) + t_B[:, None, None, None]
  )


def counted(calls):
  """Notes the number of rows of each evaluation when it runs."""

  def evaluated(x, t_B, cond):
    jax.debug.callback(lambda _: calls.append(x.shape[0]), x, ordered=True)
    return velocity(x, t_B, cond)

  return evaluated


def full(t):
  return jnp.full((B,), t)


@pytest.mark.slow
@pytest.mark.parametrize("scale", [0.0, 4.0, np.float32(1.5)])
@pytest.mark.parametrize("interval", [(0.0, 1.0), (0.2, 0.8)])
def test_the_field_is_extrapolated_from_the_unconditional_one(scale, interval):
  field = guidance.classifier_free(
    velocity, COND, UNCOND, scale=scale, interval=interval
  )
  v_c = velocity(X, full(0.5), COND)
  v_u = velocity(X, full(0.5), UNCOND)
  expected = v_u + scale * (v_c - v_u)
  np.testing.assert_allclose(field(X, 0.5), expected, atol=1e-6)
  np.testing.assert_allclose(field(X, full(0.5)), expected, atol=1e-6)


@pytest.mark.parametrize("scale", [1.0, 1, np.float32(1.0)])
def test_scale_one_is_the_conditional_field_bit_for_bit(scale):
  calls = []
  field = guidance.classifier_free(
    counted(calls), COND, UNCOND, scale=scale, interval=(0.1, 0.9)
  )
  found = jax.jit(field)(X, jnp.float32(0.5))
  expected = jax.jit(velocity)(X, full(0.5), COND)
  jax.effects_barrier()
  np.testing.assert_array_equal(found, expected)
  assert calls == [B]


@pytest.mark.parametrize(
  "t, guided",
  [
    (0.0, False),
    (0.25, True),
    (0.5, True),
    (0.75, True),
    (0.8, False),
  ],
)
def test_outside_of_the_interval_one_evaluation_is_paid(t, guided):
  calls = []
  field = jax.jit(
    guidance.classifier_free(
      counted(calls), COND, UNCOND, scale=3.0, interval=(0.25, 0.75)
    )
  )
  found = field(X, jnp.float32(t))
  jax.effects_barrier()
  assert calls == [2 * B if guided else B]
  v_c = velocity(X, full(t), COND)
  v_u = velocity(X, full(t), UNCOND)
  expected = v_u + 3.0 * (v_c - v_u) if guided else v_c
  np.testing.assert_allclose(found, expected, atol=1e-6)


def test_a_whole_sampler_pays_only_for_the_interval():
  calls = []
  field = guidance.classifier_free(
    counted(calls), COND, UNCOND, scale=3.0, interval=(0.3, 0.7)
  )
  grid = times.uniform_grid(10)
  sample = jax.jit(
    lambda x: solvers.solve(
      solvers.build("euler", paths.straight()), field, x, grid
    )
  )
  sample(X).block_until_ready()
  jax.effects_barrier()
  inside = (np.float32(0.3) <= grid[:-1]) & (grid[:-1] <= np.float32(0.7))
  assert calls == [2 * B if yes else B for yes in inside]
  assert 0 < sum(inside) < 10


def test_each_example_may_have_its_own_time():
  field = guidance.classifier_free(
    velocity, COND, UNCOND, scale=3.0, interval=(0.25, 0.75)
  )
  t_B = jnp.array([0.1, 0.3, 0.6, 0.9])
  rows = np.stack([field(X, t)[i] for i, t in enumerate(t_B)])
  np.testing.assert_allclose(field(X, t_B), rows, atol=1e-6)


def test_a_traced_scale_may_differ_between_examples():
  @jax.jit
  def guided(scale):
    return guidance.classifier_free(velocity, COND, UNCOND, scale=scale)(X, 0.5)

  for scale in (1.0, 2.5):
    static = guidance.classifier_free(velocity, COND, UNCOND, scale=scale)
    np.testing.assert_allclose(guided(scale), static(X, 0.5), atol=1e-6)
  each = guided(jnp.array([1.0, 2.5, 1.0, 2.5]))
  np.testing.assert_allclose(each[1::2], guided(2.5)[1::2], atol=1e-6)
  np.testing.assert_allclose(each[::2], guided(1.0)[::2], atol=1e-6)


def test_half_precision_is_widened_before_it_is_extrapolated():
  def half(x, t_B, cond):
    return velocity(x, t_B, cond).astype(jnp.bfloat16)

  field = guidance.classifier_free(
    half, COND, UNCOND, scale=3.0, interval=(0.25, 0.75)
  )
  v_c, v_u = (
    half(X, full(0.5), cond).astype(jnp.float32) for cond in (COND, UNCOND)
  )
  np.testing.assert_allclose(field(X, 0.5), v_u + 3.0 * (v_c - v_u), atol=1e-5)
  assert field(X, 0.1).dtype == jnp.float32


def test_an_empty_interval_is_refused():
  with pytest.raises(ValueError, match="nowhere.*low, high"):
    guidance.classifier_free(
      velocity, COND, UNCOND, scale=2.0, interval=(0.7, 0.3)
    )


RULES = {
  "cfg": {},
  "cfg_rescale": {"factor": 0.7},
  "cfg_zero_star": {},
  "apg": {"eta": 0.3, "norm_threshold": 2.5},
}
PATH = paths.straight()


def rule(name, scale, **options):
  return guidance.build(name, scale=scale, **{**RULES[name], **options})


def field_of(name, scale, predict=velocity, **options):
  return guidance.guided(
    predict, COND, UNCOND, rule(name, scale), path=PATH, **options
  )


def worse(x, t_B, cond):
  return 0.5 * velocity(x, t_B, cond) - jnp.cos(x)


def dot(a, b):
  return np.sum(np.asarray(a) * np.asarray(b), axis=(1, 2, 3), keepdims=True)


def test_every_rule_of_the_table_is_tested():
  # One is told to the network, and adds nothing.
  assert {*RULES, "distilled"} == set(guidance.GUIDANCES)


@pytest.mark.parametrize("name", RULES)
def test_scale_one_of_every_rule_is_the_conditional_field(name):
  calls = []
  found = field_of(name, 1.0, counted(calls))(X, 0.5)
  jax.effects_barrier()
  np.testing.assert_array_equal(found, velocity(X, full(0.5), COND))
  assert calls == [B]
  # A scale that is known only later cannot save the evaluation.
  traced = field_of(name, jnp.float32(1.0))(X, 0.5)
  np.testing.assert_allclose(traced, found, atol=1e-6)


@pytest.mark.parametrize("name", RULES)
def test_every_rule_pays_and_acts_within_its_interval_alone(name):
  calls = []
  field = jax.jit(field_of(name, 3.0, counted(calls), interval=(0.25, 0.75)))
  always = jax.jit(field_of(name, 3.0))
  for t in (0.5, 0.9):
    found, everywhere = field(X, jnp.float32(t)), always(X, jnp.float32(t))
    plain = velocity(X, full(t), COND)
    expected = everywhere if t == 0.5 else plain
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert np.abs(everywhere - plain).max() > 0.1
  jax.effects_barrier()
  assert calls == [2 * B, B]


@pytest.mark.parametrize("name", RULES)
def test_every_rule_takes_one_scale_per_example(name):
  scale_B = jnp.array([1.0, 2.0, 3.0, 4.0])
  found = jax.jit(lambda s: field_of(name, s)(X, 0.5))(scale_B)
  for i, scale in enumerate((1.0, 2.0, 3.0, 4.0)):
    np.testing.assert_allclose(
      found[i], field_of(name, scale)(X, 0.5)[i], atol=2e-6
    )


def test_rescaled_guidance_has_the_deviation_of_the_conditional_field():
  strong = velocity(X, full(0.5), COND)
  plain = field_of("cfg", 4.0)(X, 0.5)

  def std(v):
    return np.std(v, axis=(1, 2, 3))

  def deviation(factor):
    chosen = rule("cfg_rescale", 4.0, factor=factor)
    return std(guidance.guided(velocity, COND, UNCOND, chosen)(X, 0.5))

  assert np.all(std(plain) > 1.5 * std(strong))
  np.testing.assert_allclose(deviation(1.0), std(strong), rtol=1e-5)
  np.testing.assert_allclose(deviation(0.0), std(plain), rtol=1e-5)
  middle = 0.7 * std(strong) + 0.3 * std(plain)
  np.testing.assert_allclose(deviation(0.7), middle, rtol=1e-5)


@pytest.mark.parametrize("name", RULES)
def test_a_network_that_begins_as_zero_is_guided_to_zero(name):
  zero = field_of(name, 4.0, lambda x, t_B, cond: jnp.zeros_like(x))
  found = zero(X, 0.5)
  assert np.all(np.isfinite(found))
  np.testing.assert_allclose(found, 0.0, atol=1e-6)


def test_zero_star_guides_from_the_nearest_multiple():
  strong, weak = (velocity(X, full(0.5), cond) for cond in (COND, UNCOND))
  nearest = dot(strong, weak) / dot(weak, weak) * weak
  np.testing.assert_allclose(dot(strong - nearest, weak), 0.0, atol=1e-5)
  expected = nearest + 3.0 * (strong - nearest)
  found = field_of("cfg_zero_star", 3.0)(X, 0.5)
  np.testing.assert_allclose(found, expected, atol=1e-5)
  # Unlike classifier-free guidance it does not see the length of the weak one.
  doubled = guidance.autoguided(
    velocity,
    lambda x, t_B, cond: 2.0 * velocity(x, t_B, UNCOND),
    COND,
    rule("cfg_zero_star", 3.0),
  )
  np.testing.assert_allclose(doubled(X, 0.5), expected, atol=1e-5)


def test_projected_guidance_leaves_the_length_of_the_data_alone():
  t = 0.4

  def data(v):
    return np.asarray(X - t * v)

  strong, weak = (data(velocity(X, full(t), cond)) for cond in (COND, UNCOND))

  def added(**options):
    chosen = guidance.build("apg", scale=3.0, **options)
    field = guidance.guided(velocity, COND, UNCOND, chosen, path=PATH)
    return data(field(X, t)) - strong

  np.testing.assert_allclose(added(eta=1.0), 2 * (strong - weak), atol=1e-5)
  orthogonal = added()
  np.testing.assert_allclose(dot(orthogonal, strong), 0.0, atol=1e-4)
  along = added(eta=1.0) - orthogonal
  np.testing.assert_allclose(
    added(eta=0.3), orthogonal + 0.3 * along, atol=1e-5
  )
  short = added(eta=1.0, norm_threshold=0.7)
  np.testing.assert_allclose(np.sqrt(dot(short, short)), 1.4, rtol=1e-4)
  long = added(eta=1.0, norm_threshold=100.0)
  np.testing.assert_allclose(long, added(eta=1.0), atol=1e-5)


@pytest.mark.parametrize("path", ["straight", "vp"])
@pytest.mark.parametrize("name", ["cfg", "cfg_zero_star", "apg"])
def test_a_rule_is_the_same_for_networks_of_every_prediction(name, path):
  path = paths.PATHS[path]()
  t = jnp.float32(0.6)

  def predicting(target):
    def predict(x, t_B, cond):
      v = velocity(x, t_B, cond)
      return predictions.convert(path, "velocity", target, v, x, t_B)

    return predict

  chosen = rule(name, 3.0)
  expected = guidance.guided(velocity, COND, UNCOND, chosen, path=path)(X, t)
  for target in predictions.PREDICTIONS:
    found = guidance.guided(
      predicting(target), COND, UNCOND, chosen, path=path, prediction=target
    )(X, t)
    found = predictions.convert(path, target, "velocity", found, X, t)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_rounding_is_not_magnified_near_the_data():
  # With eta = 1 this is classifier-free guidance, by way of predicted data.
  chosen = guidance.build("apg", scale=3.0, eta=1.0)
  field = guidance.guided(velocity, COND, UNCOND, chosen, path=PATH)
  for t in (1e-2, 1e-4, 1e-5):
    expected = field_of("cfg", 3.0)(X, t)
    np.testing.assert_allclose(field(X, t), expected, atol=1e-5)
  assert np.all(np.isfinite(field(X, 0.0)))


def test_autoguidance_is_an_extrapolation_from_a_worse_network():
  calls, worse_calls = [], []

  def noted(x, t_B, cond):
    jax.debug.callback(lambda _: worse_calls.append(len(x)), x)
    return worse(x, t_B, cond)

  field = jax.jit(
    guidance.autoguided(
      counted(calls), noted, COND, rule("cfg", 2.5), interval=(0.0, 0.7)
    )
  )
  strong, weak = (f(X, full(0.5), COND) for f in (velocity, worse))
  expected = weak + 2.5 * (strong - weak)
  np.testing.assert_allclose(field(X, jnp.float32(0.5)), expected, atol=1e-5)
  field(X, jnp.float32(0.9)).block_until_ready()
  jax.effects_barrier()
  assert calls == [B, B] and worse_calls == [B]


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_a_push_adds_its_term_within_its_own_interval(scale):
  calls = []

  def noted(x, t_B, cond):
    jax.debug.callback(lambda _: calls.append(len(x)), x)
    return worse(x, t_B, cond)

  def field(**options):
    return guidance.guided(
      velocity, COND, UNCOND, rule("cfg", scale), interval=(0.0, 0.9), **options
    )

  push = guidance.Push(noted, 2.5, (0.7, 0.99))
  pushed = jax.jit(field(pushes=[push]))
  for t in (0.5, 0.8, 0.95, 1.0):
    t = jnp.float32(t)
    strong = velocity(X, full(t), COND)
    skipped = worse(X, full(t), COND)
    added = 2.5 * (strong - skipped) if 0.7 <= t <= 0.99 else 0.0
    np.testing.assert_allclose(
      pushed(X, t), field()(X, t) + added, atol=1e-5, rtol=1e-5
    )
  jax.effects_barrier()
  assert calls == [B, B]
  silent = field(pushes=[guidance.Push(noted, 0.0)])
  np.testing.assert_array_equal(silent(X, 0.8), field()(X, 0.8))
  jax.effects_barrier()
  assert calls == [B, B]


# Of one step, of several stages, with a past, and with a first step apart.
@pytest.mark.slow
@pytest.mark.parametrize(
  "name", ["euler", "midpoint", "heun", "rk4", "ab3", "dpmpp_3m", "unipc"]
)
def test_the_first_steps_stand_still_and_cost_nothing(name):
  calls = []
  grid = times.uniform_grid(8, shift=3.0)
  inner = solvers.build(name, PATH)
  field = field_of(
    "cfg", 3.0, counted(calls), prediction="velocity", target=inner.prediction
  )
  solver = wrapped.Resting(inner, 2)
  states = jax.jit(
    lambda x: solvers.solve(solver, field, x, grid, trajectory=True)
  )(X)
  jax.effects_barrier()
  assert calls == [2 * B] * solver.evaluations(8)
  assert solver.evaluations(8) == inner.evaluations(6)
  np.testing.assert_array_equal(states[2], X)
  # From there on it is as if it had begun there.
  alone = solvers.solve(inner, field, X, grid[2:], trajectory=True)
  np.testing.assert_allclose(states[2:], alone, atol=1e-4, rtol=1e-4)


def test_what_cannot_stand_still_is_refused():
  inner = solvers.build("euler", PATH)
  assert wrapped.Resting(inner, 1).name == "euler"
  with pytest.raises(ValueError, match="steps = -1"):
    wrapped.Resting(inner, -1)
  pytest.importorskip("diffrax")
  with pytest.raises(ValueError, match="chooses its own steps"):
    wrapped.Resting(solvers.build("dopri5", PATH), 1)


def test_the_field_is_of_the_prediction_that_is_asked_for():
  plain = field_of("cfg", 3.0)(X, 0.5)
  expected = predictions.convert(PATH, "velocity", "data", plain, X, 0.5)
  found = field_of("cfg", 3.0, target="data")(X, 0.5)
  np.testing.assert_allclose(found, expected, atol=1e-6)
  with pytest.raises(ValueError, match="followed by its 'data'.*path="):
    guidance.guided(velocity, COND, UNCOND, rule("cfg", 3.0), target="data")


@pytest.mark.parametrize("start, stop", [(0, 1), (0, 10), (2, 5), (9, 10)])
def test_an_interval_holds_exactly_the_steps_it_is_made_of(start, stop):
  grid = times.uniform_grid(10, shift=3.0)
  low, high = guidance.during(grid, start, stop)
  inside = [i for i, t in enumerate(grid[:-1]) if low <= t <= high]
  assert inside == list(range(start, stop))


def test_steps_beyond_the_grid_are_refused():
  grid = times.uniform_grid(10)
  for start, stop in ((-1, 2), (3, 3), (0, 11)):
    with pytest.raises(ValueError, match="10 of this grid"):
      guidance.during(grid, start, stop)


def remembered(momentum, interval=(0.0, 1.0)):
  chosen = guidance.build(
    "apg", scale=3.0, norm_threshold=2.0, momentum=momentum
  )
  return guidance.guided(
    velocity, COND, UNCOND, chosen, path=PATH, interval=interval
  )


def test_momentum_is_carried_by_the_solver():
  grid = times.uniform_grid(5)
  solver = wrapped.Remembering(solvers.build("euler", PATH))
  found = solvers.solve(solver, remembered(-0.5, (0.3, 1.0)), X, grid)

  x, total = np.asarray(X, np.float64), 0.0
  for t, t_next in zip(grid[:-1], grid[1:], strict=True):
    strong, weak = (
      np.asarray(velocity(jnp.asarray(x, "f4"), full(t), cond), np.float64)
      for cond in (COND, UNCOND)
    )
    data, change = x - t * strong, 0.0
    if t >= 0.3:
      total = (x - t * strong) - (x - t * weak) - 0.5 * total
      short = total * np.minimum(1, 2.0 / np.sqrt(dot(total, total)))
      unit = data / np.sqrt(dot(data, data))
      change = 2.0 * (short - dot(short, unit) * unit)
    # d x / dt = (x - data) / t on the straight path.
    x = x + (t_next - t) * (x - (data + change)) / t
  np.testing.assert_allclose(found, x, atol=1e-4)
  assert (solver.name, solver.prediction) == ("euler", "velocity")
  assert solver.evaluations(5) == 5


@pytest.mark.parametrize("name", ["euler", "heun"])
def test_no_momentum_needs_no_memory(name):
  grid = times.uniform_grid(4)
  solver = solvers.build(name, PATH)
  plain = solvers.solve(solver, remembered(0.0), X, grid)
  carried = solvers.solve(wrapped.Remembering(solver), remembered(0.0), X, grid)
  np.testing.assert_allclose(carried, plain, atol=1e-5)
  with_momentum = solvers.solve(
    wrapped.Remembering(solver), remembered(-0.5), X, grid
  )
  assert np.abs(with_momentum - plain).max() > 1e-3
  with pytest.raises(ValueError, match="momentum=-0.5.*Remembering"):
    solvers.solve(solver, remembered(-0.5), X, grid)


def test_a_distilled_network_reads_the_scale_of_each_example():
  def flux(x, t_B, cond):
    assert cond["guidance"].dtype == jnp.float32
    return velocity(x, t_B, cond) * cond["guidance"][:, None, None, None]

  cond = guidance.distilled(COND, 3.5)
  plain = guidance.guided(flux, cond, None, rule("cfg", 1.0))
  expected = 3.5 * velocity(X, full(0.5), COND)
  np.testing.assert_allclose(plain(X, 0.5), expected, rtol=1e-6)
  scale_B = jnp.arange(4.0)
  each = guidance.distilled(COND, scale_B)
  assert set(each) == {*COND, "guidance"} and "guidance" not in COND
  np.testing.assert_array_equal(each["guidance"], scale_B)
  # True guidance on top of it: both halves of the call have their scale.
  both = guidance.guided(
    flux, each, guidance.distilled(UNCOND, scale_B), rule("cfg", 2.0)
  )
  plainly = field_of("cfg", 2.0)(X, 0.5) * scale_B[:, None, None, None]
  np.testing.assert_allclose(both(X, 0.5), plainly, atol=1e-5)
  with pytest.raises(ValueError, match="the condition is empty"):
    guidance.distilled({}, 3.5)


@pytest.mark.parametrize(
  "call, message",
  [
    (lambda: guidance.build("apq", scale=2.0), "'apq'.*'apg'"),
    (lambda: guidance.build("cfg", scle=2.0), "no option 'scle'.*scale"),
    (lambda: rule("cfg_rescale", 2.0, factor=1.5), "1.5 is not within 0"),
    (lambda: rule("apg", 2.0, momentum=1.0), "momentum of 1.0"),
    (lambda: rule("apg", 2.0, norm_threshold=-1.0), "norm_threshold=-1.0"),
    (lambda: guidance.Push(worse, 1.0, (0.5, 0.1)), "nowhere"),
    (
      lambda: guidance.guided(velocity, COND, UNCOND, rule("apg", 2.0)),
      "prediction 'data'.*'velocity'.*path=",
    ),
    (
      lambda: guidance.guided(velocity, {}, {}, rule("cfg", 2.0)),
      "needs a condition.*label",
    ),
    (
      lambda: guidance.classifier_free(
        velocity, COND, {"label": UNCOND["label"]}, scale=2.0
      ),
      "the same entries",
    ),
  ],
)
def test_what_cannot_guide_is_refused(call, message):
  with pytest.raises(ValueError, match=message):
    call()


@pytest.mark.slow
@pytest.mark.parametrize("factor", [0.0, 0.7])
def test_the_rules_are_those_of_diffusers(factor):
  torch = pytest.importorskip("torch")
  guiders = pytest.importorskip("diffusers.guiders")
  strong, weak, skipped = (
    f(X, full(0.5), cond)
    for f, cond in ((velocity, COND), (velocity, UNCOND), (worse, COND))
  )

  def theirs(guider, *values):
    values = [torch.tensor(np.asarray(value)) for value in values]
    return guider.forward(*values).pred.numpy()

  def ours(chosen, **options):
    return guidance.guided(velocity, COND, UNCOND, chosen, **options)(X, 0.5)

  cfg = guiders.ClassifierFreeGuidance(4.0, guidance_rescale=factor)
  np.testing.assert_allclose(
    ours(rule("cfg_rescale", 4.0, factor=factor)),
    theirs(cfg, strong, weak),
    atol=2e-6,
  )
  if factor:
    return
  star = guiders.ClassifierFreeZeroStarGuidance(4.0, zero_init_steps=0)
  star._step = 1
  np.testing.assert_allclose(
    ours(rule("cfg_zero_star", 4.0)), theirs(star, strong, weak), atol=2e-6
  )
  auto = guiders.AutoGuidance(4.0, auto_guidance_layers=[0], dropout=1.0)
  found = guidance.autoguided(velocity, worse, COND, rule("cfg", 4.0))(X, 0.5)
  np.testing.assert_allclose(found, theirs(auto, strong, skipped), atol=2e-6)
  skip = guiders.SkipLayerGuidance(
    4.0, 2.5, 0.0, 1.0, skip_layer_guidance_layers=[0], start=0.0, stop=1.0
  )
  np.testing.assert_allclose(
    ours(rule("cfg", 4.0), pushes=[guidance.Push(worse, 2.5)]),
    theirs(skip, strong, weak, skipped),
    atol=4e-6,
  )


@pytest.mark.slow
@pytest.mark.parametrize("momentum", [0.0, -0.5])
def test_projected_guidance_is_that_of_diffusers(momentum):
  torch = pytest.importorskip("torch")
  guiders = pytest.importorskip("diffusers.guiders")
  # There the scale counts from 0, and what the network gives is projected.
  apg = guiders.AdaptiveProjectedGuidance(
    3.0,
    adaptive_projected_guidance_momentum=momentum,
    adaptive_projected_guidance_rescale=2.0,
    eta=0.3,
    use_original_formulation=True,
  )
  apg._step = 0
  # Where it makes its momentum.
  apg.prepare_inputs({})
  chosen = guidance.build(
    "apg", scale=4.0, eta=0.3, norm_threshold=2.0, momentum=momentum, space=None
  )
  field = guidance.guided(velocity, COND, UNCOND, chosen)
  total = jnp.zeros_like(X)
  for t in (1.0, 0.6, 0.3):
    strong, weak = (
      torch.tensor(np.asarray(velocity(X, full(t), cond)))
      for cond in (COND, UNCOND)
    )
    expected = apg.forward(strong, weak).pred.numpy()
    found, total = field.remember(X, t, total)
    np.testing.assert_allclose(found, expected, atol=4e-6)
