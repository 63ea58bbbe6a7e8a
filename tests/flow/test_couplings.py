"""Couplings: what meets what, and that all else stays beside it."""

import itertools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowjax.flow import couplings, losses, paths, times

SHAPE = (2, 2, 3)
NEEDS_OTT = ("sinkhorn", "schrodinger_bridge")


def key(seed=0):
  return jax.random.key(seed)


def images(count, seed=0):
  random = np.random.default_rng(seed)
  return random.standard_normal((count, *SHAPE), np.float32)


def build(name, **options):
  if name in NEEDS_OTT:
    pytest.importorskip("ott")
  return couplings.build(name, **options)


def pair(coupling, x, eps, cond=None, mask=None, seed=0):
  return jax.jit(coupling)(key(seed), x, eps, cond or {}, mask=mask)


def squares(x, eps):
  return np.square(x - eps).sum()


def order_of(eps, moved):
  """The index in `eps` of every row of `moved`."""
  same = np.asarray(eps)[None] == np.asarray(moved)[:, None]
  found = same.all(axis=tuple(range(2, same.ndim)))
  assert (found.sum(axis=1) == 1).all()
  return found.argmax(axis=1)


def test_independent_is_what_was_drawn():
  x, eps, cond = images(4), images(4, 1), {"label": np.arange(4)}
  found = couplings.independent()(key(), x, eps, cond)
  assert found[0] is x and found[1] is eps and found[2] is cond


def test_optimal_transport_is_the_best_of_all_permutations():
  x, eps = images(6), images(6, 1)
  same_x, moved, _ = pair(couplings.optimal_transport(), x, eps)
  np.testing.assert_array_equal(same_x, x)
  best = min(
    itertools.permutations(range(6)),
    key=lambda order: squares(x, eps[list(order)]),
  )
  assert tuple(order_of(eps, moved)) == best != tuple(range(6))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["optimal_transport", "sinkhorn"])
def test_labels_stay_with_images_and_the_source_s_move_with_it(name):
  x, eps = images(16), images(16, 1)
  cond = {"label": np.arange(16), "source_label": np.arange(16)}
  same_x, moved, found = pair(build(name), x, eps, cond)
  order = order_of(eps, moved)
  assert (order != np.arange(16)).any()
  np.testing.assert_array_equal(same_x, x)
  np.testing.assert_array_equal(found["label"], np.arange(16))
  np.testing.assert_array_equal(found["source_label"], order)


def test_it_finds_the_pairs_that_were_shuffled():
  x, order = images(32), np.random.default_rng(0).permutation(32)
  eps = (0.9 * x + 0.1 * images(32, 1))[order]
  _, moved, _ = pair(couplings.optimal_transport(), x, eps)
  np.testing.assert_array_equal(order[order_of(eps, moved)], np.arange(32))


@pytest.mark.parametrize("name", ["optimal_transport", "sinkhorn"])
def test_padding_keeps_its_noise_and_changes_nobody_else_s(name):
  x, eps, mask = images(8), images(8, 1), np.arange(8) < 5
  coupling = jax.jit(build(name))
  _, alone, _ = coupling(key(), x[:5], eps[:5], {})
  for fill in (0.0, np.nan):
    x[5:] = fill
    _, moved, _ = coupling(key(), x, eps, {}, mask=mask)
    np.testing.assert_array_equal(moved[:5], alone)
    np.testing.assert_array_equal(moved[5:], eps[5:])


def test_costs_that_are_not_finite_leave_the_pairs_as_drawn():
  x, eps = images(5), images(5, 1)
  x[3] = np.nan
  _, moved, _ = pair(couplings.optimal_transport(), x, eps)
  np.testing.assert_array_equal(moved, eps)


@pytest.mark.slow
def test_the_entropic_plan_has_the_marginals_of_both_ends():
  pytest.importorskip("ott")
  cost = np.random.default_rng(0).uniform(size=(8, 8)).astype(np.float32)
  mask = np.arange(8) < 6
  plan_of = jax.jit(couplings.entropic_plan, static_argnums=2)
  plan = np.exp(plan_of(cost, mask, 0.1))
  for axis in (0, 1):
    np.testing.assert_allclose(plan.sum(axis), mask / 6, atol=1e-3)
  # Optimal: log P + C / epsilon is a sum of one term per row and per column.
  rest = np.log(plan[:6, :6]) + cost[:6, :6] / 0.1
  centred = rest - rest.mean(0) - rest.mean(1, keepdims=True) + rest.mean()
  np.testing.assert_allclose(centred, 0.0, atol=1e-4)


@pytest.mark.slow
def test_draws_follow_the_plan():
  # Of the bridge, 2 sigma^2 is the epsilon of its plan.
  coupling = build("schrodinger_bridge", sigma=2.0)
  x, eps = images(4), images(4, 1)
  cost = np.square(x[:, None] - eps[None]).sum((2, 3, 4))
  plan_of = jax.jit(couplings.entropic_plan, static_argnums=2)
  log_plan = plan_of(cost, np.ones(4, bool), 8.0)

  @jax.jit
  def draw(x, eps):
    cond = {"source_i": jnp.arange(4)}
    rngs = jax.random.split(key(), 4000)
    return jax.vmap(lambda rng: coupling(rng, x, eps, cond)[2])(rngs)

  drawn = np.asarray(draw(x, eps)["source_i"])
  found = [np.bincount(drawn[:, i], minlength=4) / 4000 for i in range(4)]
  np.testing.assert_allclose(found, 4 * np.exp(log_plan), atol=0.03)


def test_target_is_the_path_that_keeps_a_little_noise():
  plain, lipman = paths.straight(), paths.straight(sigma_min=0.1)

  @jax.jit
  def both(x, eps, t_B):
    jittered, same, _ = couplings.target(0.1)(key(), x, eps, {})
    return [
      (path.interpolate(*ends, t_B), path.velocity(*ends, t_B))
      for path, ends in ((plain, (jittered, same)), (lipman, (x, eps)))
    ]

  found, expected = both(
    images(5), images(5, 1), np.linspace(0.0, 1.0, 5, dtype=np.float32)
  )
  np.testing.assert_allclose(found, expected, atol=1e-6)


def flowing(predict, coupling, **options):
  return losses.matching(
    predict, paths.straight(), times.uniform(), coupling=coupling, **options
  )


def test_pairs_flow_from_one_image_to_the_other():
  batch = {"image": images(6), "source": images(6, 1), "label": np.arange(6)}

  @jax.jit
  def run(batch):
    seen = []

    def predict(params, x_t, t_B, cond, rng):
      seen.append((x_t, t_B, cond))
      return batch["source"] - batch["image"]

    loss = flowing(predict, couplings.pairs())({}, batch, key())[0]
    return loss, *seen

  loss, (x_t, t_B, cond) = run(batch)
  assert float(loss) == 0.0
  t = np.asarray(t_B)[:, None, None, None]
  expected = (1 - t) * batch["image"] + t * batch["source"]
  np.testing.assert_allclose(x_t, expected, atol=1e-6)
  assert set(cond) == {"label"}  # The network is not shown the answer.


def test_a_chain_couples_two_domains():
  x = images(8)
  order = np.random.default_rng(0).permutation(8)
  cond = {"source": x[order] + 3.0, "source_label": order}
  both = couplings.chain(couplings.pairs(), couplings.optimal_transport())
  _, eps, found = pair(both, x, np.zeros_like(x), cond)
  np.testing.assert_array_equal(eps, x + 3.0)
  np.testing.assert_array_equal(found["source_label"], np.arange(8))
  assert set(found) == {"source_label"}


@pytest.mark.parametrize(
  "coupling",
  [couplings.independent(0.3), couplings.schrodinger_bridge(0.7, "exact")],
  ids=["constant", "bridge"],
)
def test_a_spread_has_its_own_derivative(coupling):

  @jax.jit
  def slopes(t):
    _, slope = jax.jvp(coupling.spread.std, (t,), (jnp.ones_like(t),))
    return coupling.spread.std_dot(t), slope

  inner = np.linspace(0.02, 0.98, 20, dtype=np.float32)
  found, slope = slopes(np.append(inner, np.float32([0.0, 1e-30, 1.0])))
  np.testing.assert_allclose(found[:20], slope[:20], atol=1e-5)
  assert np.isfinite(found).all()


def test_the_best_velocity_of_a_bridge_is_its_closed_form():
  # x ~ N(0, 1/4), eps ~ N(0, 1), z: all normal, so is the best velocity.
  bridge = couplings.schrodinger_bridge(0.8, "exact").spread
  coupling = couplings.Coupling(couplings.independent().pair, bridge)
  t = 0.8
  std, std_dot = map(
    float, jax.jit(lambda t: (bridge.std(t), bridge.std_dot(t)))(t)
  )
  variance = (1 - t) ** 2 / 4 + t**2 + std**2
  covariance = -(1 - t) / 4 + t + std * std_dot
  least = 1 / 4 + 1 + std_dot**2 - covariance**2 / variance

  def predict(params, x_t, t_B, cond, rng):
    return covariance / variance * x_t

  loss = losses.fixed_time(predict, paths.straight(), (t,), coupling=coupling)
  value, _ = jax.jit(loss)({}, {"image": 0.5 * images(4000)}, key())
  assert float(value) == pytest.approx(least, rel=0.03)


def wavy(params, x_t, t_B, cond, rng):
  return jnp.sin(params * x_t) + cond["label"][:, None, None, None]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["optimal_transport", "sinkhorn"])
def test_eight_devices_are_one(name):
  loss = jax.jit(jax.value_and_grad(flowing(wavy, build(name)), has_aux=True))
  batch = {"image": images(16), "label": np.arange(16, dtype=np.float32)}
  mesh = jax.make_mesh(
    (8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,)
  )
  sharding = jax.NamedSharding(mesh, jax.P("data"))
  (one, metrics), slope = loss(3.0, batch, key())
  (eight, sharded), sharded_slope = loss(
    3.0, jax.device_put(batch, sharding), key()
  )
  np.testing.assert_allclose(one, eight, rtol=1e-5)
  np.testing.assert_allclose(slope, sharded_slope, rtol=1e-4)
  by_example = metrics["loss_by_example"], sharded["loss_by_example"]
  np.testing.assert_allclose(*by_example, rtol=1e-4)
  # And it is another loss than that of independent ends.
  other, _ = jax.jit(flowing(wavy, couplings.independent()))(3.0, batch, key())
  assert abs(float(other - one)) > 1e-3


def test_assignment_within_a_scan_and_beside_a_gradient():
  coupling = couplings.optimal_transport()
  x, eps = images(12).reshape(3, 4, *SHAPE), images(12, 1).reshape(3, 4, *SHAPE)

  def total(scale):
    def add(sum, ends):
      # The encoder of a latent is differentiated; the pairing is not.
      a, b, _ = coupling(key(), scale * ends[0], ends[1], {})
      return sum + jnp.sum(jnp.square(a - b)), None

    return jax.lax.scan(add, 0.0, (x, eps))[0]

  moved = np.stack([pair(coupling, x[i], eps[i])[1] for i in range(3)])
  value, slope = jax.jit(jax.value_and_grad(total))(1.0)
  np.testing.assert_allclose(value, np.square(x - moved).sum(), rtol=1e-5)
  expected = 2.0 * np.sum((x - moved) * x)
  np.testing.assert_allclose(slope, expected, rtol=1e-5)


def test_each_name_is_built_and_a_wrong_one_is_answered_with_the_nearest():
  for name in couplings.COUPLINGS:
    assert callable(build(name))
  with pytest.raises(ValueError, match="did you mean 'optimal_transport'"):
    couplings.build("optimal_transprot")
  with pytest.raises(ValueError, match="no option 'epsilon'"):
    couplings.build("optimal_transport", epsilon=1.0)


@pytest.mark.parametrize(
  "name, options",
  [
    ("independent", {"sigma": -0.1}),
    ("target", {"sigma_min": 1.0}),
    ("sinkhorn", {"epsilon": 0.0}),
    ("schrodinger_bridge", {"sigma": 0.0}),
    ("schrodinger_bridge", {"plan": "exakt"}),
  ],
)
def test_values_out_of_range_are_refused(name, options):
  with pytest.raises(ValueError, match=str(next(iter(options.values())))):
    couplings.build(name, **options)


def test_a_spread_goes_with_velocity_alone():
  for coupling in (
    couplings.independent(0.1),
    couplings.schrodinger_bridge(1.0, "exact"),
  ):
    with pytest.raises(ValueError, match="three sources"):
      flowing(wavy, coupling, prediction="noise")
  with pytest.raises(ValueError, match="only one"):
    couplings.chain(couplings.independent(0.1), couplings.independent(0.1))


def test_pairs_need_a_source_of_the_same_shape():
  loss = flowing(wavy, couplings.pairs())
  batch = {"image": images(4), "label": np.arange(4, dtype=np.float32)}
  with pytest.raises(ValueError, match=r'batch\["source"\].*label'):
    jax.eval_shape(loss, 1.0, batch, key())
  with pytest.raises(ValueError, match="found"):
    jax.eval_shape(loss, 1.0, {**batch, "source": images(3)}, key())


@pytest.mark.parametrize(
  "name, module",
  [("optimal_transport", "scipy.optimize"), ("sinkhorn", "ott")],
)
def test_what_is_not_installed_is_named(name, module, monkeypatch):
  monkeypatch.setitem(sys.modules, module, None)
  with pytest.raises(ValueError, match=r"'\.\[couplings\]'"):
    couplings.build(name)
