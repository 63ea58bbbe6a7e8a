"""The same pairs, x_t and targets as torchcfm, and iDDPM's bound by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowjax.flow import (
  couplings,
  distances,
  losses,
  objective,
  paths,
  times,
  variance,
)

SHAPE = (6, 3, 2)
# Not at its ends, where the bridge of torchcfm and ours are as good as 0 / 0.
TIMES = np.linspace(0.05, 0.95, 6, dtype=np.float32)


def images(seed, shape=SHAPE):
  random = np.random.default_rng(seed)
  return random.standard_normal(shape, np.float32)


def matchers():
  return pytest.importorskip("torchcfm.conditional_flow_matching")


def draw(path, coupling, batch):
  """What our loss draws for `batch` at TIMES, and the noise that it spreads."""
  goal = objective.Objective(path, "velocity", coupling)
  rngs = jax.random.split(jax.random.key(0))
  drawn = goal.draw(batch, jnp.asarray(TIMES), *rngs)
  if coupling.spread is None:
    return drawn, np.zeros(SHAPE, np.float32)
  # With nothing at both ends x_t is the spread alone.
  zeros = jnp.zeros(SHAPE)
  alone = couplings.Coupling(couplings.pairs().pair, coupling.spread)
  empty = objective.Objective(paths.straight(), "velocity", alone)
  spread = empty.draw(
    {"image": zeros, "source": zeros}, jnp.asarray(TIMES), *rngs
  )
  std = coupling.spread.std(TIMES)[:, None, None]
  return drawn, np.asarray(spread.x_t / std)


def assert_same(matcher, drawn, x, z):
  """Compares x_t and target: there noise is x0 at t = 0, and data x1 at 1."""
  import torch

  x0, x1 = torch.tensor(np.asarray(drawn.eps)), torch.tensor(np.asarray(x))
  t = torch.tensor(1.0 - TIMES)
  x_t = matcher.sample_xt(x0, x1, t, torch.tensor(z))
  target = matcher.compute_conditional_flow(x0, x1, t, x_t)
  np.testing.assert_allclose(drawn.x_t, x_t, rtol=1e-6, atol=1e-6)
  np.testing.assert_allclose(drawn.target, -target, rtol=2e-6, atol=4e-6)


@pytest.mark.slow
@pytest.mark.parametrize("sigma", [0.0, 0.3])
def test_conditional_flow_matching(sigma):
  x = images(0)
  drawn, z = draw(paths.straight(), couplings.independent(sigma), {"image": x})
  assert_same(matchers().ConditionalFlowMatcher(sigma=sigma), drawn, x, z)


@pytest.mark.slow
def test_target_conditional_flow_matching_by_coupling_and_by_path():
  x = images(0)
  for path, coupling in (
    (paths.straight(), couplings.target(0.1)),
    (paths.straight(sigma_min=0.1), couplings.independent()),
  ):
    drawn, _ = draw(path, coupling, {"image": x})
    # Its epsilon is the noise itself, and it has no other.
    matcher = matchers().TargetConditionalFlowMatcher(sigma=0.1)
    assert_same(matcher, drawn, x, np.asarray(drawn.eps))


@pytest.mark.slow
def test_schrodinger_bridge():
  coupling = couplings.schrodinger_bridge(0.7, "exact")
  x = images(0)
  drawn, z = draw(paths.straight(), coupling, {"image": x})
  matcher = matchers().SchrodingerBridgeConditionalFlowMatcher(sigma=0.7)
  assert np.std(z) > 0.5
  assert_same(matcher, drawn, x, z)


@pytest.mark.slow
def test_variance_preserving_flow_matching():
  x = images(0)
  drawn, z = draw(paths.gvp(), couplings.independent(), {"image": x})
  matcher = matchers().VariancePreservingConditionalFlowMatcher(sigma=0.0)
  assert_same(matcher, drawn, x, z)


@pytest.mark.slow
def test_exact_optimal_transport_is_the_plan_of_torchcfm():
  torch = pytest.importorskip("torch")
  plans = pytest.importorskip("torchcfm.optimal_transport")
  x, eps = images(0, (40, 3, 2)), images(1, (40, 3, 2))
  plan = plans.OTPlanSampler(method="exact").get_map(
    torch.tensor(eps), torch.tensor(x)
  )
  cond = {"source_i": np.arange(40)}
  coupling = couplings.optimal_transport()
  _, moved, found = jax.jit(lambda *ends: coupling(*ends))(
    jax.random.key(0), x, eps, cond
  )
  np.testing.assert_array_equal(found["source_i"], plan.argmax(axis=0))
  np.testing.assert_array_equal(moved, eps[plan.argmax(axis=0)])


@pytest.mark.slow
def test_the_entropic_plan_is_that_of_torchcfm():
  epsilon = 1.0
  pytest.importorskip("ott")
  torch = pytest.importorskip("torch")
  plans = pytest.importorskip("torchcfm.optimal_transport")
  x, eps = images(0, (10, 4)), images(1, (10, 4))
  sampler = plans.OTPlanSampler(method="sinkhorn", reg=epsilon)
  expected = sampler.get_map(torch.tensor(x), torch.tensor(eps))
  cost = np.square(x[:, None] - eps[None]).sum(-1)
  entropic = jax.jit(couplings.entropic_plan, static_argnums=2)
  plan = np.exp(entropic(cost, np.ones(10, bool), epsilon))
  np.testing.assert_allclose(plan, expected, atol=1e-4)


def test_the_cosine_is_that_of_torch():
  torch = pytest.importorskip("torch")
  value, target = images(0), images(1)
  cosine = torch.nn.functional.cosine_similarity(
    torch.tensor(value), torch.tensor(target), dim=-1
  )
  expected = np.mean((value - target) ** 2, axis=(1, 2))
  expected = expected + np.mean(1.0 - cosine.numpy(), axis=1)
  found = distances.l2_cosine()(jnp.asarray(value), jnp.asarray(target))
  np.testing.assert_allclose(found, expected, rtol=1e-6)


# What follows knows of a table of betas, as DDPM writes it.
STEPS = 50
BETAS = np.linspace(1e-4, 0.2, STEPS)
BAR = np.cumprod(1.0 - BETAS)
BEFORE = np.append(1.0, BAR[:-1])
LARGE = BETAS
SMALL = BETAS * (1.0 - BEFORE) / (1.0 - BAR)
SMALL[0] = SMALL[1]
INDICES = np.array([0, 0, 1, 7, 25, 49])


def table():
  return paths.ddpm(steps=STEPS, beta_start=1e-4, beta_end=0.2)


def fixed(law_t):
  class Fixed(times.TimeLaw):
    def sample(self, rng, shape):
      return jnp.asarray(law_t, jnp.float32)

  return Fixed(lambda u: u, jnp.ones_like)


def pixels(seed=0):
  x = np.round(np.random.default_rng(seed).uniform(0, 255, (6, 2, 2, 3)))
  x[0, 0, 0], x[1, 1, 1] = 0.0, 255.0
  return (x / 127.5 - 1.0).astype(np.float32)


def network(params, x_t, t_B, cond, rng):
  value = params["a"] * x_t + params["b"]
  return jnp.concatenate([value, params["c"] * jnp.sin(3.0 * x_t)], axis=-1)


def network_by_hand(params, x_t):
  value = params["a"] * x_t + params["b"]
  return value, params["c"] * np.sin(3.0 * x_t)


PARAMS = {"a": 0.8, "b": 0.1, "c": 1.2}


def bits_by_hand(x, eps, params):
  """-log2 p per dimension: torch's divergence, scipy's cumulative function."""
  torch = pytest.importorskip("torch")
  from scipy import stats

  i = INDICES
  bar, before, beta = (a[i][:, None, None, None] for a in (BAR, BEFORE, BETAS))
  x, eps = x.astype(np.float64), eps.astype(np.float64)
  x_t = np.sqrt(bar) * x + np.sqrt(1 - bar) * eps
  value, v = network_by_hand(params, x_t)
  guess = (x_t - np.sqrt(1 - bar) * value) / np.sqrt(bar)

  def mean(x):
    first = np.sqrt(before) * beta / (1 - bar) * x
    return first + np.sqrt(1 - beta) * (1 - before) / (1 - bar) * x_t

  large, small = (np.log(a[i])[:, None, None, None] for a in (LARGE, SMALL))
  std = np.exp(0.25 * ((1 + v) * large + (1 - v) * small))
  q = torch.distributions.Normal(
    torch.tensor(mean(x)), torch.tensor(np.exp(0.5 * small))
  )
  p = torch.distributions.Normal(torch.tensor(mean(guess)), torch.tensor(std))
  nats = torch.distributions.kl_divergence(q, p).numpy()
  normal = stats.norm(mean(guess), std)
  upper = np.where(x > 0.999, 1.0, normal.cdf(x + 1 / 255))
  lower = np.where(x < -0.999, 0.0, normal.cdf(x - 1 / 255))
  first = (i == 0)[:, None, None, None]
  nats = np.where(first, -np.log(np.where(first, upper - lower, 1.0)), nats)
  return nats.mean(axis=(1, 2, 3)) / np.log(2.0), (value - eps) ** 2


@pytest.mark.slow
def test_the_hybrid_loss_is_its_closed_form():
  path, batch = table(), {"image": pixels()}
  # Anywhere within a step, or on its entry: the step's own index.
  t_B = (INDICES + np.array([0.5, 1.0, 1.0, 0.2, 1.0, 1.0])) / STEPS
  loss = losses.hybrid(network, path, fixed(t_B))
  value, metrics = jax.jit(loss)(PARAMS, batch, jax.random.key(0))
  np.testing.assert_allclose(metrics["t"], (INDICES + 1) / STEPS, rtol=1e-6)

  rngs = jax.random.split(jax.random.key(0), 3)
  goal = objective.Objective(path, "noise")
  eps = jax.jit(goal.draw)(batch, metrics["t"], rngs[1], rngs[2]).eps
  bits, squares = bits_by_hand(batch["image"], np.asarray(eps), PARAMS)
  simple = squares.mean(axis=(1, 2, 3))
  np.testing.assert_allclose(metrics["loss_by_example"], simple, rtol=1e-5)
  np.testing.assert_allclose(
    metrics["bound_by_example"], STEPS * bits, rtol=1e-4
  )
  expected = np.mean(simple + 1e-3 * STEPS * bits)
  assert float(value) == pytest.approx(expected, rel=1e-5)


def test_the_tables_are_those_of_the_betas():
  for path, betas in (
    (table(), BETAS),
    (paths.ddpm(), np.linspace(1e-4, 2e-2, 1000)),
  ):
    found = variance.posterior(path)
    bar = np.cumprod(1.0 - betas)
    before = np.append(1.0, bar[:-1])
    small = betas * (1.0 - before) / (1.0 - bar)
    np.testing.assert_allclose(found.log_large_N, np.log(betas), rtol=1e-6)
    np.testing.assert_allclose(
      found.log_small_N[1:], np.log(small[1:]), rtol=1e-6
    )
    assert found.log_small_N[0] == found.log_small_N[1]
    # The mean leads from x_i to x_{i-1} if there is no noise in either.
    one = np.sqrt(bar)
    lead = found.data_N + found.noisy_N * one
    np.testing.assert_allclose(lead, np.sqrt(before), rtol=1e-6)


@pytest.mark.slow
def test_the_bound_trains_the_variance_alone():
  path, batch = table(), {"image": pixels()}
  law = fixed((INDICES + 1) / STEPS)
  simple = losses.hybrid(network, path, law, scale=0.0)
  hybrid = losses.hybrid(network, path, law, scale=1.0)
  rng = jax.random.key(0)
  plain, both = (
    jax.device_get(jax.jit(jax.grad(loss, has_aux=True))(PARAMS, batch, rng)[0])
    for loss in (simple, hybrid)
  )
  for name in ("a", "b"):
    np.testing.assert_allclose(both[name], plain[name], rtol=1e-6)
  assert plain["c"] == 0.0 and abs(both["c"]) > 0.01


@pytest.mark.slow
@pytest.mark.parametrize(
  "kind, dtype",
  [(kind, jnp.float32) for kind in ("noise", "v", "data")]
  + [("v", jnp.bfloat16)],
)
def test_gradients_of_the_bound_are_finite_at_both_ends(kind, dtype):
  path = {
    "noise": lambda: paths.ddpm(),
    "v": lambda: paths.ddpm(zero_terminal_snr=True),
    "data": lambda: paths.cosine(steps=100),
  }[kind]()

  def half(params, x_t, t_B, cond, rng):
    both = network(params, x_t, t_B, cond, rng)
    return (both * params["a"]).astype(dtype)

  law = fixed([0.0, 1e-3, 0.5, 0.999, 1.0, 1.0])
  loss = losses.hybrid(half, path, law, prediction=kind)
  grad = jax.jit(jax.value_and_grad(loss, has_aux=True))
  for a in (0.0, 0.7):
    (value, _), slope = grad({**PARAMS, "a": a}, {"image": pixels()}, key())
    assert np.isfinite(value) and all(map(np.isfinite, slope.values()))


def key():
  return jax.random.key(0)


likelihood = jax.jit(variance.log_likelihood)


@pytest.mark.parametrize("mean", [0.0, 0.3, 5.0, -40.0])
@pytest.mark.parametrize("std", [1e-3, 0.1, 2.0])
def test_the_likelihood_of_8_bits_sums_to_one_and_has_exact_tails(mean, std):
  from scipy import stats

  x = np.arange(256) / 127.5 - 1.0
  found = likelihood(
    x.astype(np.float32), np.float32(mean), np.float32(2 * np.log(std))
  )
  found = np.asarray(found)
  assert np.sum(np.exp(found)) == pytest.approx(1.0, rel=1e-3)
  inner = slice(1, 255)
  low, high = ((x[inner] + s / 255 - mean) / std for s in (-1, 1))
  flip = low + high > 0
  low, high = np.where(flip, -high, low), np.where(flip, -low, high)
  expected = stats.norm.logcdf(high) + np.log(
    -np.expm1(stats.norm.logcdf(low) - stats.norm.logcdf(high))
  )
  np.testing.assert_allclose(found[inner], expected, rtol=2e-3, atol=2e-4)


@pytest.mark.slow(1)
def test_a_learned_variance_needs_steps_and_twice_the_channels():
  with pytest.raises(ValueError, match="'vp' does not have"):
    losses.hybrid(network, paths.vp(), times.uniform())

  def single(params, x_t, t_B, cond, rng):
    return x_t

  loss = losses.hybrid(single, table(), times.uniform())
  with pytest.raises(ValueError, match="twice the channels"):
    loss({}, {"image": pixels()}, key())


def test_validation_of_a_network_that_learns_its_variance():
  predict = variance.predicted(network)
  loss = losses.fixed_time(predict, table(), (0.5,), prediction="noise")

  def plain(params, x_t, t_B, cond, rng):
    return params["a"] * x_t + params["b"]

  expected = losses.fixed_time(plain, table(), (0.5,), prediction="noise")
  batch = {"image": pixels()}
  found, wanted = (
    jax.jit(loss)(PARAMS, batch, key())[0] for loss in (loss, expected)
  )
  np.testing.assert_allclose(found, wanted, rtol=1e-6)
