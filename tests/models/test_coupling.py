"""Coupling flows: both directions, and what they do to volumes."""

# Shape suffixes: B batch, H height, W width, C channels; D all values of an
# image in a row, L layers.

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flowjax import models, schema
from flowjax.flow import maximum_likelihood
from flowjax.models import coupling

AFFINE = coupling.CouplingConfig(
  image_size=(4, 3), channels=2, num_classes=5, width=16, depth=6
)
ADDITIVE = dataclasses.replace(AFFINE, kind="additive")
BOTH = pytest.mark.parametrize("config", [AFFINE, ADDITIVE], ids=["s", "b"])
B = 4


def draw(config, seed=0):
  rng = np.random.default_rng(seed)
  shape = (B, *config.image_size, config.channels)
  x_BHWC = rng.standard_normal(shape).astype(np.float32)
  return x_BHWC, {"label": np.arange(B, dtype=np.int32)}


def parameters(config, size=0.1):
  """Draws parameters, none of which is zero."""
  rng = np.random.default_rng(1)
  shapes = jax.eval_shape(models.build(config).init, jax.random.key(0))
  return jax.tree.map(
    lambda leaf: size * rng.standard_normal(leaf.shape).astype(np.float32),
    shapes,
  )


@BOTH
def test_the_log_determinant_is_that_of_the_jacobian(config):
  net, params = models.build(config), parameters(config)
  x_BHWC, cond = draw(config)
  _, log_det_B = jax.device_get(jax.jit(net.forward)(params, x_BHWC, cond))

  @jax.jit
  @jax.vmap
  def jacobian(x_HWC, label):
    def flow(x_D):
      x_1HWC = x_D.reshape(1, *x_HWC.shape)
      return net.forward(params, x_1HWC, {"label": label[None]})[0].ravel()

    return jax.jacobian(flow)(x_HWC.ravel())

  found = np.asarray(jacobian(x_BHWC, cond["label"]))
  _, expected_B = np.linalg.slogdet(found)
  np.testing.assert_allclose(log_det_B, expected_B, atol=1e-4)
  assert np.abs(log_det_B).min() > 0.1
  # Only an affine flow changes volumes here and there differently.
  assert (np.ptp(log_det_B) > 0.1) == (config.kind == "affine")


@BOTH
def test_there_and_back_again(config):
  net, params = models.build(config), parameters(config)
  x_BHWC, cond = draw(config)
  forward, inverse = jax.jit(net.forward), jax.jit(net.inverse)
  z_BHWC, _ = forward(params, x_BHWC, cond)
  assert np.abs(z_BHWC - x_BHWC).max() > 0.5
  np.testing.assert_allclose(inverse(params, z_BHWC, cond), x_BHWC, atol=1e-5)
  back_BHWC, _ = forward(params, inverse(params, x_BHWC, cond), cond)
  np.testing.assert_allclose(back_BHWC, x_BHWC, atol=1e-5)


def test_bfloat16_comes_back_to_three_digits():
  config = dataclasses.replace(AFFINE, dtype="bfloat16")
  net, params = models.build(config), parameters(config)
  x_BHWC, cond = draw(config)
  z_BHWC, log_det_B = jax.jit(net.forward)(params, x_BHWC, cond)
  assert z_BHWC.dtype == log_det_B.dtype == jnp.float32
  exact_BHWC, _ = jax.jit(models.build(AFFINE).forward)(params, x_BHWC, cond)
  assert 1e-4 < np.abs(z_BHWC - exact_BHWC).max() < 0.2
  back_BHWC = jax.jit(net.inverse)(params, z_BHWC, cond)
  np.testing.assert_allclose(back_BHWC, x_BHWC, atol=0.05)


@BOTH
def test_it_begins_as_the_identity(config):
  net = models.build(config)
  # rbg compiles in a fifth of the time that threefry takes.
  params = jax.jit(net.init)(jax.random.key(0, impl="rbg"))
  params = jax.device_get(params)
  x_BHWC, cond = draw(config)
  z_BHWC, log_det_B = jax.jit(net.forward)(params, x_BHWC, cond)
  np.testing.assert_array_equal(z_BHWC, x_BHWC)
  np.testing.assert_array_equal(log_det_B, np.zeros(B))
  kernel = params["blocks"]["hidden"]["kernel"]
  assert not np.array_equal(kernel[0], kernel[1])
  # A label weighs what the pixels do, or training would pass it over.
  assert 0.7 < np.std(params["label_embed"]["embedding"]) < 1.3


def test_the_tree_is_the_one_that_others_build_on():
  shapes = jax.eval_shape(models.build(AFFINE).init, jax.random.key(0))
  leaves = jax.tree_util.tree_leaves_with_path(shapes)
  assert {
    jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape
    for path, leaf in leaves
  } == {
    "label_embed/embedding": (6, 16),
    "blocks/in/kernel": (6, 24, 16),
    "blocks/in/bias": (6, 16),
    "blocks/hidden/kernel": (6, 16, 16),
    "blocks/hidden/bias": (6, 16),
    "blocks/out/kernel": (6, 16, 2, 24),
    "blocks/out/bias": (6, 2, 24),
    "final/scale": (24,),
  }
  assert {leaf.dtype for _, leaf in leaves} == {jnp.dtype("float32")}


@BOTH
def test_a_gradient_reaches_every_parameter(config):
  net, params = models.build(config), parameters(config)
  x_BHWC, cond = draw(config)

  @jax.jit
  @jax.grad
  def gradient(params):
    z_BHWC, log_det_B = net.forward(params, x_BHWC, cond)
    weight = jnp.cos(jnp.arange(float(z_BHWC.size))).reshape(z_BHWC.shape)
    return jnp.sum(weight * z_BHWC) + jnp.sum(log_det_B)

  found = jax.device_get(gradient(params))
  for path, leaf in jax.tree_util.tree_leaves_with_path(found):
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    if name == "label_embed/embedding":
      # Only the rows of labels that were seen.
      assert np.all(leaf[:4]) and not np.any(leaf[4:])
    elif name == "blocks/in/kernel":
      # A layer does not see what it moves.
      np.testing.assert_array_equal(
        np.any(leaf, axis=-1), coupling.masks(config) == 1
      )
    elif name.startswith("blocks/out"):
      # Nor is it asked about what it keeps.
      kept_LD = coupling.masks(config) == 1
      np.testing.assert_array_equal(
        np.any(leaf, axis=(1, 2))
        if (name.endswith("kernel"))
        else np.any(leaf, axis=1),
        ~kept_LD,
      )
    else:
      assert np.all(leaf), name


@pytest.mark.parametrize(
  "size, channels", [((8, 8), 1), ((5, 7), 3), ((1, 6), 1), ((1, 1), 2)]
)
def test_every_value_is_moved_and_is_kept(size, channels):
  config = coupling.CouplingConfig(image_size=size, channels=channels, depth=6)
  masks_LD = coupling.masks(config)
  assert masks_LD.shape == (6, math.prod(size) * channels)
  assert set(np.unique(masks_LD)) == {0.0, 1.0}
  assert np.all(masks_LD.max(axis=0) == 1) and np.all(masks_LD.min(axis=0) == 0)
  assert np.all(masks_LD.max(axis=1) == 1) and np.all(masks_LD.min(axis=1) == 0)


def test_a_layer_keeps_exactly_its_mask():
  config = dataclasses.replace(AFFINE, depth=1)
  params = parameters(config)
  params["final"]["scale"][:] = 0.0
  x_BHWC, cond = draw(config)
  z_BHWC, _ = jax.jit(models.build(config).forward)(params, x_BHWC, cond)
  same_BD = (np.asarray(z_BHWC) == x_BHWC).reshape(B, -1)
  kept_D = coupling.masks(config)[0] == 1
  np.testing.assert_array_equal(same_BD, np.tile(kept_D, (B, 1)))


def test_labels_are_read_and_dropped_in_training_alone():
  config = dataclasses.replace(AFFINE, label_dropout=0.5)
  net, params = models.build(config), parameters(config)
  x_BHWC, cond = draw(config)
  program = jax.jit(net.forward)

  def forward(*inputs):
    return jax.device_get(program(*inputs))

  with_label_BHWC, _ = forward(params, x_BHWC, cond)
  none = net.unconditional(cond)
  assert set(np.asarray(none["label"])) == {config.num_classes}
  without_BHWC, _ = forward(params, x_BHWC, none)
  assert np.all(np.any(with_label_BHWC != without_BHWC, axis=(1, 2, 3)))
  seen = set()
  for seed in range(4):
    dropped, _ = forward(params, x_BHWC, cond, jax.random.key(seed))
    for i in range(B):
      kept = np.array_equal(dropped[i], with_label_BHWC[i])
      assert kept or np.array_equal(dropped[i], without_BHWC[i])
      seen.add(kept)
  assert seen == {True, False}


@BOTH
def test_it_counts_the_matmuls_of_the_compiled_program(config):
  net, params = models.build(config), parameters(config)
  x_BHWC, cond = draw(config)

  # A scan is counted once, however often it turns: one layer at a time.
  one = dataclasses.replace(config, depth=1)
  first = {**params, "blocks": jax.tree.map(lambda p: p[:1], params["blocks"])}
  cost = (
    jax.jit(models.build(one).forward).lower(first, x_BHWC, cond).compile()
  ).cost_analysis()
  assert net.flops == config.depth * models.build(one).flops
  assert B * models.build(one).flops <= cost["flops"]
  assert cost["flops"] <= 1.3 * B * models.build(one).flops


def test_the_seam_gives_both_directions_and_refuses_a_velocity():
  net = models.build(AFFINE)
  with pytest.raises(ValueError, match="'coupling'.*no velocity.*likelihood"):
    net.apply({}, jnp.zeros((1, 4, 3, 2)), jnp.zeros(1), {})
  transformer = models.build(models.CONFIGS["dit"]())
  assert transformer.forward is None and transformer.inverse is None
  config = schema.build(
    models.CONFIGS["coupling"], {"image_size": [4, 4]}, "config.model"
  )
  assert config.image_size == (4, 4) and config.values == 16


@pytest.mark.parametrize(
  "change, message",
  [
    (dict(kind="afine"), "kind='afine'.*'affine'"),
    (dict(dtype="bf16"), "dtype='bf16'.*'bfloat16'"),
    (dict(name="copling"), "'coupling'"),
    (dict(depth=0), "depth=0 must be positive"),
    (dict(image_size=(0, 8)), r"image_size=\(0, 8\)"),
    (dict(image_size=(1, 1)), "one value"),
    (dict(label_dropout=1.0), "label_dropout=1.0.*below 1"),
  ],
)
def test_an_impossible_value_is_refused_with_a_remedy(change, message):
  with pytest.raises(ValueError, match=message):
    coupling.CouplingConfig(**change)


def test_what_is_no_image_or_label_is_refused():
  net, params = models.build(AFFINE), parameters(AFFINE)
  x_BHWC, cond = draw(AFFINE)
  with pytest.raises(ValueError, match=r"\[B, 4, 3, 2\].*\(4, 3, 4, 2\)"):
    net.forward(params, x_BHWC.swapaxes(1, 2), cond)
  with pytest.raises(ValueError, match="'label'.*got the keys"):
    net.inverse(params, x_BHWC, {})
  with pytest.raises(ValueError, match=r"label has shape \(3,\).*\(4,\)"):
    net.forward(params, x_BHWC, {"label": cond["label"][:3]})


@pytest.mark.slow
def test_it_learns_a_density_that_is_known():
  """Correlated normal data: the loss falls to their entropy."""
  config = coupling.CouplingConfig(
    image_size=(1, 2), num_classes=1, width=16, depth=4, label_dropout=0.0
  )
  net = models.build(config)
  loss = maximum_likelihood.maximum_likelihood(net.forward)
  factor = jnp.array([[0.5, 0.0], [0.4, 0.2]])
  entropy = math.log2(2 * math.pi * math.e) + math.log2(0.5 * 0.2)
  optimizer = optax.adam(5e-3)

  def batch(rng, count=256):
    x_BD = jax.random.normal(rng, (count, 2)) @ factor.T
    return {
      "image": x_BD.reshape(-1, 1, 2, 1),
      "label": jnp.zeros(count, jnp.int32),
    }

  def step(carry, rng):
    params, state = carry
    rng_batch, rng_loss = jax.random.split(rng)
    value, grads = jax.value_and_grad(
      lambda p: loss(p, batch(rng_batch), rng)[0]
    )(params)
    updates, state = optimizer.update(grads, state, params)
    return (optax.apply_updates(params, updates), state), value

  @jax.jit
  def train(rng):
    params = net.init(rng)
    (params, _), losses = jax.lax.scan(
      step, (params, optimizer.init(params)), jax.random.split(rng, 400)
    )
    final, _ = loss(params, batch(jax.random.key(7), 8192), rng)
    z = jax.random.normal(jax.random.key(8), (8192, 1, 2, 1))
    x = net.inverse(params, z, {"label": jnp.zeros(8192, jnp.int32)})
    return losses[0], final, jnp.cov(x.reshape(-1, 2).T)

  first, final, covariance = train(jax.random.key(0))
  assert first > entropy / 2 + 0.5
  np.testing.assert_allclose(final, entropy / 2, atol=0.03)
  np.testing.assert_allclose(covariance, factor @ factor.T, atol=0.02)
