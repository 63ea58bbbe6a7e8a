"""Every path: its ends, its derivative, its signal-to-noise ratio."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowjax.flow import paths

# (alpha, sigma) at t = 0 and at t = 1, from the papers' formulas.
B = 0.1 + 19.9 / 2
DDPM_END = math.sqrt(np.prod(1.0 - np.linspace(1e-4, 2e-2, 1000)))
LDM_END = math.sqrt(
  np.prod(1.0 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
)
CLEAN, NOISE = (1.0, 0.0), (0.0, 1.0)
ENDS = {
  "straight": (CLEAN, NOISE),
  "straight sigma_min=0.1": ((1.0, 0.1), NOISE),
  "polynomial": (CLEAN, NOISE),
  "polynomial power=1.5": (CLEAN, NOISE),
  "gvp": (CLEAN, NOISE),
  "vp": (CLEAN, (math.exp(-B / 2), math.sqrt(1 - math.exp(-B)))),
  "sub_vp": (CLEAN, (math.exp(-B / 2), 1 - math.exp(-B))),
  "cosine": (CLEAN, NOISE),
  "cosine steps=50": (CLEAN, None),
  "ddpm": (CLEAN, (DDPM_END, math.sqrt(1 - DDPM_END**2))),
  "ddpm zero_terminal_snr=True": (CLEAN, NOISE),
  "scaled_linear": (CLEAN, (LDM_END, math.sqrt(1 - LDM_END**2))),
  "scaled_linear steps=10 zero_terminal_snr=True": (CLEAN, NOISE),
  "ve": ((1.0, 0.01), (1.0, 50.0)),
  "edm": ((1.0, 0.002), (1.0, 80.0)),
}


def build(case):
  name, *words = case.split()
  pairs = (word.split("=") for word in words)
  return paths.build(name, **{key: eval(value) for key, value in pairs})


PATHS = {case: build(case) for case in ENDS}
every_path = pytest.mark.parametrize("case", PATHS)
# bfloat16 is widened before a formula is asked: one path of each kind.
HALF = ("straight", "polynomial", "vp", "ddpm zero_terminal_snr=True", "edm")
IN_EITHER = [(case, jnp.float32) for case in PATHS]
IN_EITHER += [(case, jnp.bfloat16) for case in HALF]
in_either = pytest.mark.parametrize("case, dtype", IN_EITHER)


def draw():
  return np.random.default_rng(0).standard_normal((2, 5, 3, 2, 2), np.float32)


def of_all(function):
  """Returns function(path, t) for every path, all in one program."""
  return jax.jit(
    lambda times: {case: function(PATHS[case], t) for case, t in times.items()}
  )


def within(path):
  """Returns 103 times of the path, both ends among them, in float64."""
  return np.linspace(path.low, path.high, 103)


@functools.cache
def meter(dtype):
  """Returns a program that measures every path at its times, in `dtype`."""
  x, eps = np.random.default_rng(0).standard_normal((2, 103, 2))

  def measure(path, t):
    log_snr = path.log_snr(t)
    found = {
      "t": t,
      "at": path.at(t, t),
      "log_snr": log_snr,
      "t of it": path.log_snr_inverse(log_snr),
    }
    if dtype == np.float32:
      return found
    _, tangent = jax.jvp(
      lambda t: path.interpolate(x, eps, t), (t,), (jnp.ones_like(t),)
    )
    levels = jnp.linspace(
      jnp.minimum(log_snr[0], 15.0), jnp.maximum(log_snr[-1], -20.0), 103
    )
    return found | {
      "velocity": path.velocity(x, eps, t),
      "tangent": tangent,
      "levels": levels,
      "levels again": path.log_snr(path.log_snr_inverse(levels)),
    }

  return of_all(measure)


@functools.cache
def measured(dtype, *, rounded=False):
  """Returns what there is to know of every path in float32 or in float64."""
  first = np.float32 if rounded else dtype
  times = {
    case: within(path).astype(first).astype(dtype)
    for case, path in PATHS.items()
  }
  with jax.enable_x64(dtype == np.float64):
    return jax.tree.map(np.asarray, meter(dtype)(times))


@functools.cache
def interpolated():
  """Returns x_t of both, of eps alone, of x alone: at t = 0 and at t = 1."""
  x, eps = draw()
  parts = np.stack([x, 0.0 * x, x]), np.stack([eps, eps, 0.0 * eps])

  def interpolate(path, times):
    return [
      jax.vmap(lambda x, eps, t=t: path.interpolate(x, eps, t))(*parts)
      for t in times
    ]

  times = dict.fromkeys(PATHS, np.float32([0.0, 1.0]))
  return jax.tree.map(np.asarray, of_all(interpolate)(times))


def test_every_path_is_tested():
  assert {case.split()[0] for case in PATHS} == set(paths.PATHS)
  assert all(path.name == case.split()[0] for case, path in PATHS.items())


@pytest.mark.parametrize("case", ENDS)
def test_the_ends_are_data_and_noise(case):
  x, eps = draw()
  for t, end in zip((0.0, 1.0), ENDS[case], strict=True):
    if end is None:
      continue
    (found, of_eps, of_x), (alpha, sigma) = interpolated()[case][int(t)], end
    np.testing.assert_allclose(found, alpha * x + sigma * eps, rtol=3e-6)
    # What is not there leaves no trace, not even of rounding.
    if end in (CLEAN, NOISE):
      rest = of_eps if end == CLEAN else of_x
      np.testing.assert_array_equal(rest, np.zeros_like(x))
  if ENDS[case][1] is not None:
    prior = ENDS[case][1][1]
    assert PATHS[case].prior_scale == pytest.approx(prior, rel=1e-6)


def test_the_prior_scale_is_known_while_tracing():
  scaled = jax.jit(lambda x: x * PATHS["edm"].prior_scale)
  assert scaled(1.0) == pytest.approx(80.0, rel=1e-6)


@every_path
def test_velocity_is_the_derivative_of_the_path(case):
  found = measured(np.float64)[case]
  np.testing.assert_allclose(
    found["velocity"], found["tangent"], rtol=1e-10, atol=1e-10
  )


@every_path
def test_float32_loses_no_more_than_its_rounding(case):
  exact = measured(np.float64, rounded=True)[case]["at"]
  single = measured(np.float32)[case]["at"]
  for found, expected in zip(single, exact, strict=True):
    assert found.dtype == np.float32 and expected.dtype == np.float64
    # Near 0 and 1 the times themselves are rounded: hence the absolute part.
    atol = 3e-7 * np.max(np.abs(expected))
    np.testing.assert_allclose(found, expected, rtol=5e-6, atol=atol)
  np.testing.assert_allclose(single.sigma[:-1], exact.sigma[:-1], rtol=3e-6)


@pytest.mark.parametrize("name", ["straight", "ddpm"])
def test_each_example_has_its_own_time(name):
  path, (x, eps) = PATHS[name], draw()
  t_B = np.linspace(0.1, 0.9, 5, dtype=np.float32)
  for method in (jax.jit(path.interpolate), jax.jit(path.velocity)):
    rows = [method(x[i], eps[i], t_B[i]) for i in range(5)]
    np.testing.assert_allclose(method(x, eps, t_B), np.stack(rows), rtol=1e-6)


@every_path
def test_log_snr_is_that_of_the_coefficients_and_falls(case):
  found = measured(np.float64)[case]["log_snr"]
  alpha, sigma, *_ = measured(np.float64)[case]["at"]
  with np.errstate(divide="ignore"):
    expected = 2.0 * (np.log(alpha) - np.log(sigma))
  np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-10)
  assert np.all(np.diff(found) < 0.0)


@every_path
def test_log_snr_and_its_inverse(case):
  for dtype, atol in ((np.float32, 2e-7), (np.float64, 1e-13)):
    found = measured(dtype)[case]
    assert found["t of it"].dtype == dtype
    np.testing.assert_allclose(found["t of it"], found["t"], atol=atol)
  # Near t = 1 lambda depends on 1 - t, of which t has rounded a part away.
  np.testing.assert_allclose(
    found["levels again"], found["levels"], rtol=1e-9, atol=1e-9
  )


OUTSIDE = np.float32([-1.0, -1e-9, 0.0, 1e-30, 1.0, 1.01, 7.0])


@functools.cache
def anywhere(dtype):
  """Returns the schedules, and their slopes, within every path and outside."""

  def evaluate(path, t):
    return {
      "schedules": [
        jax.jvp(schedule, (t,), (jnp.ones_like(t),))
        for schedule in (path.alpha, path.sigma, path.alpha_dot, path.sigma_dot)
      ],
      "log_snr": path.log_snr(t),
      "inverse": path.log_snr_inverse(
        jnp.float32([-np.inf, -1e3, -60.0, 60.0, 1e3, np.inf])
      ),
    }

  times = {
    case: np.append(np.float32(within(PATHS[case])), OUTSIDE).astype(dtype)
    for case, of in IN_EITHER
    if of == dtype
  }
  return jax.tree.map(np.asarray, of_all(evaluate)(times))


@in_either
def test_finite_within_and_never_nan_outside(case, dtype):
  found = anywhere(dtype)[case]
  for value, slope in found["schedules"]:
    assert np.all(np.isfinite(value)) and np.all(np.isfinite(slope))
  assert not np.any(np.isnan(found["log_snr"]))
  t = found["inverse"]
  assert np.all((0.0 <= t) & (t <= 1.0)) and np.all(np.diff(t) <= 0.0)


@functools.cache
def slopes(dtype):
  """Returns the gradients of a loss on every path, its ends among the times."""

  def grads(path, t_B):
    def loss(t_B, scale):
      x, eps = draw().astype(scale.dtype)
      x_t = path.interpolate(x, eps, t_B)
      v = scale * x_t.astype(scale.dtype)
      return jnp.mean((v - path.velocity(x, eps, t_B)) ** 2)

    return jax.grad(loss, (0, 1))(t_B, jnp.ones((), dtype))

  times = {
    case: np.float32([0.0, PATHS[case].low, 0.5, PATHS[case].high, 1.0])
    for case, of in IN_EITHER
    if of == dtype
  }
  return jax.tree.map(np.asarray, of_all(grads)(times))


@in_either
def test_the_gradient_of_a_loss_is_finite_at_both_ends(case, dtype):
  for grad in slopes(dtype)[case]:
    assert np.all(np.isfinite(grad.astype(np.float32)))


def test_half_precision_is_widened():
  half = draw().astype(jnp.bfloat16)
  path = paths.straight()
  for t in (0.3, np.full(5, 0.3, np.float32)):
    for method in (path.interpolate, path.velocity):
      assert jax.eval_shape(method, *half, t).dtype == jnp.float32


def test_the_straight_path_is_that_of_rectified_flow():
  x, eps = draw()
  path = paths.straight()

  @jax.jit
  def at_a_quarter(x, eps):
    v = path.velocity(x, eps, 0.25)
    return path.interpolate(x, eps, 0.25), v, path.log_snr(0.25)

  x_t, v, log_snr = at_a_quarter(x, eps)
  np.testing.assert_allclose(x_t, 0.75 * x + 0.25 * eps, rtol=1e-6)
  np.testing.assert_allclose(v, eps - x, rtol=1e-6)
  np.testing.assert_allclose(log_snr, 2 * np.log(3.0), rtol=1e-6)


# What the papers write, at 1 - t where they run from noise to data.
def sit_vp(t):
  log_alpha = -0.25 * t**2 * 19.9 - 0.5 * t * 0.1
  alpha = np.exp(log_alpha)
  return alpha, np.sqrt(1.0 - alpha**2), -(0.5 * t * 19.9 + 0.05) * alpha


def sit_gvp(t):
  turn = np.pi / 2
  return (
    np.sin(turn * (1 - t)),
    np.cos(turn * (1 - t)),
    -turn * np.sin(turn * t),
  )


def score_sde_vp(t):
  log_mean = -0.25 * t**2 * (20.0 - 0.1) - 0.5 * t * 0.1
  return np.exp(log_mean), np.sqrt(1.0 - np.exp(2.0 * log_mean)), None


def score_sde_sub_vp(t):
  log_mean = -0.25 * t**2 * (20.0 - 0.1) - 0.5 * t * 0.1
  return np.exp(log_mean), 1.0 - np.exp(2.0 * log_mean), None


def score_sde_ve(t):
  return np.ones_like(t), 0.01 * (50.0 / 0.01) ** t, np.zeros_like(t)


def edm(t):
  first, last = 0.002 ** (1 / 7), 80.0 ** (1 / 7)
  return np.ones_like(t), (last + (1 - t) * (first - last)) ** 7, None


def iddpm(t):
  def f(t):
    return np.cos((t + 0.008) / 1.008 * np.pi / 2) ** 2

  alpha_bar = f(t) / f(0.0)
  return np.sqrt(alpha_bar), np.sqrt(1.0 - alpha_bar), None


def lipman(t):
  return 1 - t, 1 - (1 - 0.1) * (1 - t), -np.ones_like(t)


def convex(t):
  return (1 - t) ** 1.5, 1 - (1 - t) ** 1.5, -1.5 * (1 - t) ** 0.5


FORMULAS = [
  ("vp", sit_vp),
  ("vp", score_sde_vp),
  ("sub_vp", score_sde_sub_vp),
  ("ve", score_sde_ve),
  ("gvp", sit_gvp),
  ("edm", edm),
  ("cosine", iddpm),
  ("straight sigma_min=0.1", lipman),
  ("polynomial power=1.5", convex),
]


@functools.cache
def late():
  """Returns times from 0.01 on, and the coefficients of every path at them."""
  t = np.linspace(0.01, 1.0, 103)
  with jax.enable_x64(True):
    times = dict.fromkeys(PATHS, t)
    found = of_all(lambda path, t: path.at(t, t))(times)
  return t, jax.tree.map(np.asarray, found)


@pytest.mark.parametrize("case, formula", FORMULAS)
def test_the_formulas_of_the_papers(case, formula):
  t, found = late()
  alpha, sigma, alpha_dot, _ = found[case]
  for found, expected in zip(
    (alpha, sigma, alpha_dot), formula(t), strict=True
  ):
    if expected is not None:
      np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("zero", [False, True])
def test_a_table_is_met_at_each_entry(zero):
  root = np.cos(np.linspace(0.05, 1.5, 8))
  root[-1] = 0.0 if zero else root[-1]
  path = paths.table(root**2, "mine")
  assert (path.name, path.steps) == ("mine", 8)

  @jax.jit
  def schedules(t):
    return {f: getattr(path, f)(t) for f in ("alpha", "sigma", "log_snr")}

  def at(schedule, t):
    return np.asarray(schedules(np.resize(t, 8))[schedule])[: len(t)]

  t = np.arange(1, 9) / 8
  with jax.enable_x64(True):
    np.testing.assert_allclose(at("alpha", t), root, atol=1e-15)
    np.testing.assert_allclose(at("sigma", t), np.sqrt(1 - root**2), rtol=1e-14)
    # Continuous: the same from both sides of every entry.
    for schedule in ("alpha", "sigma"):
      jump = at(schedule, t - 1e-12) - at(schedule, t + 1e-12)
      np.testing.assert_allclose(jump, 0.0, atol=1e-10)
    # Halfway between two entries so is lambda.
    nodes = at("log_snr", t[:-1])
    between = at("log_snr", t[:-2] + 1 / 16)
    np.testing.assert_allclose(between, (nodes[1:] + nodes[:-1]) / 2)
    # Before the first, sigma is linear; before a last of 0, alpha.
    half = at("sigma", [1 / 16])
    np.testing.assert_allclose(half, np.sqrt(1 - root[0] ** 2) / 2)
    if zero:
      np.testing.assert_allclose(at("alpha", [15 / 16]), root[-2] / 2)


def test_float32_times_find_their_entries():
  path, i = PATHS["ddpm"], np.r_[:51, 473:500, 975:1000]
  alpha_bar = np.cumprod(1.0 - np.linspace(1e-4, 2e-2, 1000))[i]
  t = jnp.asarray((i + 1) / 1000, jnp.float32)
  np.testing.assert_allclose(path.alpha(t), np.sqrt(alpha_bar), rtol=1e-6)
  np.testing.assert_allclose(path.sigma(t), np.sqrt(1 - alpha_bar), rtol=1e-6)
  # A compiler may compute the place of a time twice, and not to the last bit.
  alpha, sigma = jax.jit(lambda t: (path.alpha(t), path.sigma(t)))(t)
  np.testing.assert_allclose(alpha, np.sqrt(alpha_bar), rtol=1e-6)
  np.testing.assert_allclose(sigma, np.sqrt(1 - alpha_bar), rtol=1e-6)


def test_tables_and_continuous_time_agree():
  # beta_i = beta(i / 999) / 1000, and the sum of log(1 - beta_i) is the
  # integral of -beta(t) but for its second order: 0.07 of lambda at t = 1.
  t = np.linspace(0.01, 1.0, 103, dtype=np.float32)

  def of(t, *found):
    @jax.jit
    def evaluate(t):
      return [(*path.at(t, t)[:2], path.log_snr(t)) for path in found]

    return np.asarray(evaluate(t))

  # With steps of half the size and half the betas, half as far.
  finer = paths.build("ddpm", steps=2000, beta_start=5e-5, beta_end=1e-2)
  table, half, continuous = of(t, PATHS["ddpm"], finer, PATHS["vp"])
  np.testing.assert_allclose(table[0], continuous[0], atol=1.5e-3)
  np.testing.assert_allclose(table[1], continuous[1], atol=2e-3)
  difference = table[2] - continuous[2]
  np.testing.assert_allclose(difference, 0.0, atol=0.08)
  ratio = half[2][50:] - continuous[2][50:]
  np.testing.assert_allclose(ratio / difference[50:], 0.5, atol=0.02)
  # The betas of the cosine table are made of its curve: exact at the entries,
  # 3e-5 between them, but for the cap of the last.
  entries = np.float32(np.linspace(0.01, 0.99, 99))
  pair = paths.build("cosine", steps=1000), PATHS["cosine"]
  table, continuous = of(np.append(entries, t[:-2]), *pair)[:, :2]
  np.testing.assert_allclose(table[:, :99], continuous[:, :99], atol=2e-6)
  np.testing.assert_allclose(table, continuous, atol=3e-5)


def test_narrowed_keeps_away_from_the_ends():
  path = paths.build("straight", low=1e-3, high=0.999)
  assert (path.low, path.high) == (1e-3, 0.999)
  assert path.prior_scale == pytest.approx(0.999)
  with pytest.raises(ValueError, match=r"'vp'.*1e-05 to 1.0.*\[0.0, 1.0\]"):
    paths.build("vp", low=0.0)
  with pytest.raises(ValueError, match="narrowed"):
    paths.narrowed(path, low=0.5, high=0.4)


def test_an_unknown_path_or_option_says_what_there_is():
  with pytest.raises(ValueError, match="'strait'.*did you mean 'straight'"):
    paths.build("strait")
  with pytest.raises(ValueError, match="'vp' has no option 'rho'.*beta_min"):
    paths.build("vp", rho=7.0)


@pytest.mark.parametrize(
  "name, options, reason",
  [
    ("straight", {"sigma_min": 1.0}, "not 1.0"),
    ("polynomial", {"power": 0.5}, "infinite.*straight"),
    ("vp", {"beta_min": 0.0}, "above 0"),
    ("sub_vp", {"beta_min": 3.0, "beta_max": 2.0}, "from 3.0 to 2.0"),
    ("cosine", {"s": 0.0}, "not 0.0"),
    ("cosine", {"steps": 1}, "at least 2 steps, not 1"),
    ("ddpm", {"steps": 0}, "at least 2 steps, not 0"),
    ("ddpm", {"beta_end": 1.0}, "within"),
    ("scaled_linear", {"beta_start": 0.1}, "from 0.1 to 0.012"),
    ("ve", {"sigma_min": 0.0}, "above 0"),
    ("edm", {"sigma_max": math.inf}, "inf"),
    ("edm", {"rho": 0.5}, "not 0.5"),
  ],
)
def test_values_out_of_range_are_refused(name, options, reason):
  with pytest.raises(ValueError, match=reason):
    paths.build(name, **options)


@pytest.mark.parametrize(
  "table",
  [[0.5], [0.5, 0.6], [1.0, 0.5], [0.5, 0.4, -0.1], [0.5, 0.0], [[0.5, 0.1]]],
)
def test_a_table_that_does_not_fall_is_refused(table):
  with pytest.raises(ValueError, match="fall within"):
    paths.table(np.array(table))
