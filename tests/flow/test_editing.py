"""Images that sampling starts from, and pixels that are kept."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowjax.flow import editing, grids, guidance, paths, sampling, solvers

MEAN, STD = 0.4, 0.7
RNG = np.random.default_rng(0)
IMAGE, NOISE = RNG.standard_normal((2, 5, 3, 2)).astype(np.float32)
MASK = (RNG.random((5, 3, 1)) < 0.5).astype(np.float32)
CHOOSE = {"dopri5": {"rtol": 1e-4}, "tsit5": {"rtol": 1e-4}}


def method(
  path=None, solver="dpmpp_2m", steps=20, grid="uniform", **options
) -> sampling.Method:
  path = path or paths.straight()
  return sampling.Method(
    path=path,
    prediction="data",
    solver=solvers.build(solver, path, **options),
    grid=grids.build(grid, path, steps),
    rule=guidance.build("cfg", scale=1.0),
  )


def gaussian(path):
  """The network that knows data of N(MEAN, STD^2)."""

  def predict(x, t_B, cond):
    c = path.at(t_B, x)
    gain = c.alpha * STD**2 / (c.alpha**2 * STD**2 + c.sigma**2)
    return MEAN + gain * (x - c.alpha * MEAN)

  return predict


def levels(path, t):
  alpha, sigma = (float(f(jnp.float32(t))) for f in (path.alpha, path.sigma))
  return alpha, np.sqrt(alpha**2 * STD**2 + sigma**2), sigma


def key(seed=0):
  # Compiles in a fifth of the time that threefry takes.
  return jax.random.key(seed, impl="rbg")


def draw(made, predict, edit=None, *, start=NOISE, rng=None):
  run = jax.jit(lambda edit, x: made.sample(predict, {}, {}, x, rng, edit))
  return np.asarray(run(edit, start))


@pytest.mark.parametrize("name", ["straight", "vp", "ve"])
def test_of_a_gaussian_what_is_left_of_an_image_is_known(name):
  # The flow keeps (x_t - alpha MEAN) / S, S^2 the variance of x_t.
  path = paths.build(name)
  spacing = "uniform" if name == "straight" else "exponential"
  made = method(path, grid=spacing, steps=40).from_images(0.6)
  assert len(made.grid) == 25
  found = draw(made, gaussian(path), editing.Edit(IMAGE, NOISE))
  alpha, size, sigma = levels(path, made.grid[0])
  end, left, _ = levels(path, made.grid[-1])
  moved = alpha * (IMAGE - MEAN) + sigma * NOISE
  expected = end * MEAN + left / size * moved
  np.testing.assert_allclose(found, expected, atol=0.02)
  assert np.abs(found - IMAGE).max() > 0.2


@pytest.mark.slow
def test_fresh_noise_draws_from_what_x_t_leaves_open():
  path, count = paths.build("ddpm"), 4096
  made = method(path, "ddim", grid="trailing", steps=500, eta=1.0)
  made = made.from_images(0.5)
  noise = RNG.standard_normal((count, 2)).astype(np.float32)
  image = np.broadcast_to(np.float32([2.0, -1.0]), noise.shape)
  edit = editing.Edit(image, noise)
  found = draw(made, gaussian(path), edit, start=noise, rng=key(1))
  alpha, size, sigma = levels(path, made.grid[0])
  shrunk = (alpha * STD / size) ** 2
  np.testing.assert_allclose(
    found.mean(0), MEAN + shrunk * (np.array([2.0, -1.0]) - MEAN), atol=0.03
  )
  variance = (STD * sigma / size) ** 2 * (1 + shrunk)
  np.testing.assert_allclose(found.var(0), variance, rtol=0.08)


@pytest.mark.parametrize("name", ["straight", "ve"])
def test_the_whole_way_is_from_noise_alone(name):
  path = paths.build(name)
  made = method(path)
  assert made.from_images(1.0) is made
  edited = draw(made.from_images(1.0), gaussian(path), None)
  np.testing.assert_array_equal(edited, draw(made, gaussian(path)))


@pytest.mark.parametrize(
  "solver",
  [
    name
    if name in ("euler", "unipc", "edm_heun", "euler_maruyama")
    else pytest.param(name, marks=pytest.mark.slow)
    for name in sorted(solvers.SOLVERS)
  ],
)
def test_every_solver_starts_from_images_and_keeps_pixels(solver):
  path = paths.straight()
  options = CHOOSE.get(solver, {})
  made = method(paths.build("straight", low=1e-3), solver, 8, **options)
  edit = editing.Edit(IMAGE, NOISE, MASK)
  found = draw(made.from_images(0.5), gaussian(path), edit, rng=key())
  kept = np.broadcast_to(MASK == 0.0, IMAGE.shape)
  np.testing.assert_array_equal(found[kept], IMAGE[kept])
  away = np.abs(found - IMAGE)[~kept]
  assert np.all(np.isfinite(found)) and away.max() > 0.1


@pytest.mark.parametrize(
  ("solver", "count"), [("edm_heun", 5), ("heun", 6), ("ab3", 4)]
)
def test_it_is_known_how_often_the_network_is_asked(solver, count):
  calls = []

  def predict(x, t_B, cond):
    jax.debug.callback(lambda x: calls.append(x), x)
    return 0.5 * x

  made = method(paths.build("straight", low=1e-3), solver, 5).from_images(0.5)
  draw(made, predict, editing.Edit(IMAGE, NOISE))
  jax.effects_barrier()
  assert len(calls) == made.evaluations == count


@pytest.mark.parametrize("solver", ["unipc", "ab3"])
def test_pixels_that_nothing_ties_to_the_others_are_drawn_as_ever(solver):
  path = paths.build("straight", low=1e-3)
  made = method(path, solver)
  plain = draw(made, gaussian(path))
  found = draw(made, gaussian(path), editing.Edit(IMAGE, NOISE, MASK))
  new = np.broadcast_to(MASK == 1.0, IMAGE.shape)
  np.testing.assert_allclose(found[new], plain[new], atol=1e-6)


def test_what_is_drawn_anew_follows_what_is_kept():
  # Two pixels of correlation r on x + s eps: of the first, k + s e is known,
  # and the second solves y' = s (p y + q (k + s e)), where p and q are the
  # entries of the inverse of their covariance at s.
  path, r, top = paths.build("ve", sigma_min=1e-3, sigma_max=20.0), 0.8, 20.0
  covariance = np.float32([[1.0, r], [r, 1.0]])

  def predict(x, t_B, cond):
    s = path.sigma(t_B[0])
    inverse = jnp.linalg.inv(covariance + s**2 * jnp.eye(2))
    return x - s**2 * x @ inverse

  known, (e, e_2) = 1.3, (-0.4, 0.7)
  made = method(path, "heun", 100)
  edit = editing.Edit(*np.float32([[[known, 9.0]], [[e, e_2]], [[0.0, 1.0]]]))
  found = draw(made, predict, edit, start=edit.noise)

  # By an integrating factor, in float64.
  s = np.geomspace(1e-3, top, 200_001)
  factor = (((1 + r) + s**2) * ((1 - r) + s**2)) ** 0.25
  q = 0.5 * (1 / (1 + r + s**2) - 1 / (1 - r + s**2))
  inner = s * q * (known + s * e) / factor
  integral = np.sum(0.5 * (inner[1:] + inner[:-1]) * np.diff(s))
  expected = factor[0] * (top * e_2 / factor[-1] - integral)
  np.testing.assert_allclose(found, [[known, expected]], atol=5e-3)
  alone = draw(made, predict, start=edit.noise)
  assert abs(alone[0, 1] - expected) > 0.3


@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_what_is_grey_in_a_mask_is_kept_or_drawn_anew(solver):
  # A network that knows data of 1 alone: each pixel ends there, or as it was.
  made = method(paths.build("straight", low=1e-3), solver, 10)
  grey = np.linspace(0.1, 0.9, 5, dtype=np.float32)[:, None, None]
  edit = editing.Edit(IMAGE, NOISE, grey)
  found = draw(made, lambda x, t_B, cond: 0.0 * x + 1.0, edit)
  np.testing.assert_array_equal(found[:3], IMAGE[:3])
  np.testing.assert_allclose(found[3:], 1.0, atol=0.01)


def test_guidance_with_a_memory_sees_what_is_kept():
  path = paths.straight()
  seen = []

  def predict(x, t_B, cond):
    jax.debug.callback(lambda x: seen.append(x[0]), x)
    return jnp.sin(x) * cond["label"][:, None, None]

  made = sampling.Method(
    path=path,
    prediction="data",
    solver=solvers.build("ddim", path),
    grid=np.float32([1.0, 0.8, 0.7, 0.25, 0.0]),
    rule=guidance.build("apg", scale=3.0, momentum=-0.5),
    still_steps=2,
  ).from_images(0.75)
  assert made.still_steps == 1
  cond, uncond = ({"label": jnp.full(5, v)} for v in (1.0, 0.0))
  edit = editing.Edit(IMAGE, NOISE, jnp.zeros((1, 1, 1)))
  found = made.sample(predict, cond, uncond, NOISE, edit=edit)
  jax.effects_barrier()
  for x, t in zip(seen, [0.7, 0.25], strict=True):
    np.testing.assert_allclose(x, edit.at(path, t)[0], rtol=1e-5)
  np.testing.assert_array_equal(found, IMAGE)


@pytest.mark.slow
def test_the_steps_are_those_of_diffusers():
  pipelines = pytest.importorskip("diffusers")
  img2img = pipelines.StableDiffusion3Img2ImgPipeline
  made = type("Made", (), {})()
  for steps, strength in ((50, 0.6), (10, 0.7), (28, 0.55), (7, 0.01), (4, 1)):
    made.scheduler = pipelines.FlowMatchEulerDiscreteScheduler(shift=3.0)
    made.scheduler.set_timesteps(steps)
    times, count = img2img.get_timesteps(made, steps, strength, "cpu")
    grid = grids.flow_match(paths.straight(), steps, shift=3.0, compat=True)
    found = editing.begun(grid, strength)
    assert len(found) == count + 1
    np.testing.assert_allclose(found[:-1], times.numpy() / 1000, rtol=1e-6)


@pytest.mark.slow
def test_known_pixels_go_the_way_of_diffusers():
  torch = pytest.importorskip("torch")
  pipelines = pytest.importorskip("diffusers")
  theirs = pipelines.FlowMatchEulerDiscreteScheduler(shift=3.0)
  theirs.set_timesteps(6)
  image, noise, mask = map(torch.from_numpy, (IMAGE, NOISE, MASK))
  times = theirs.timesteps[2:]
  theirs.set_begin_index(2)
  # As StableDiffusion3InpaintPipeline has it.
  x = theirs.scale_noise(image, times[:1], noise)
  for i, t in enumerate(times):
    mixed = torch.roll(x, 1, 1)
    x = theirs.step(torch.sin(2 * x) + mixed, t, x, return_dict=False)[0]
    known = image
    if i < len(times) - 1:
      known = theirs.scale_noise(image, times[i + 1 : i + 2], noise)
    x = (1 - mask) * known + mask * x

  path = paths.straight()
  made = sampling.Method(
    path=path,
    prediction="velocity",
    solver=solvers.build("euler", path),
    grid=grids.flow_match(path, 6, shift=3.0, compat=True),
    rule=guidance.build("cfg", scale=1.0),
  ).from_images(4 / 6)
  found = draw(
    made,
    lambda x, t_B, cond: jnp.sin(2 * x) + jnp.roll(x, 1, 1),
    editing.Edit(IMAGE, NOISE, MASK),
  )
  np.testing.assert_allclose(found, x.numpy(), atol=1e-5)


def test_what_cannot_be_is_refused():
  made = method(steps=4)
  for strength in (0.0, -0.1, 1.1, float("nan")):
    with pytest.raises(ValueError, match="strength = .* above 0 and at most 1"):
      made.from_images(strength)
  with pytest.raises(ValueError, match="of 4 steps leaves none"):
    made.from_images(1e-18)
  with pytest.raises(ValueError, match="starts from images at t = 0.5"):
    draw(made.from_images(0.5), gaussian(made.path))
