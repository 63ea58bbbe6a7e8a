"""What a DiT computes, on small shapes."""

# Shape suffixes: B batch, H height, W width, C channels.

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowjax import models
from flowjax.models import blocks, dit

SMALL = dit.DiTConfig(
  image_size=(8, 12),
  channels=3,
  width=32,
  depth=2,
  heads=4,
  num_classes=10,
)


def draw(config, batch=4, seed=0):
  rng = np.random.default_rng(seed)
  shape = (batch, *config.image_size, config.channels)
  x_BHWC = rng.standard_normal(shape).astype(np.float32)
  t_B = rng.random(batch).astype(np.float32)
  label_B = np.arange(batch, dtype=np.int32) % config.num_classes
  return x_BHWC, t_B, {"label": label_B}


@functools.lru_cache
def parameters(config):
  """Draws parameters, none of which is zero."""
  rng = np.random.default_rng(1)
  shapes = jax.eval_shape(models.build(config).init, jax.random.key(0))
  return jax.tree.map(
    lambda leaf: 0.1 * rng.standard_normal(leaf.shape).astype(np.float32),
    shapes,
  )


@functools.lru_cache
def value_and_gradient(config, shared=None):
  """Returns the velocity and the gradient of an uneven sum of it."""
  net = models.build(config)
  x_BHWC, t_B, cond = draw(config)

  def scalar(params):
    v_BHWC = net.apply(params, x_BHWC, t_B, cond)
    weight = jnp.cos(jnp.arange(float(v_BHWC.size))).reshape(v_BHWC.shape)
    return jnp.sum(weight * v_BHWC), v_BHWC

  program = jax.jit(jax.grad(scalar, has_aux=True))
  gradient, v_BHWC = jax.device_get(program(parameters(shared or config)))
  return v_BHWC, gradient


def assert_same(ours, wanted, relative=1e-5):
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(
      a, b, atol=relative * np.abs(b).max()
    ),
    ours,
    wanted,
  )


VARIANTS = [
  dict(),
  dict(mlp="swiglu", qk_norm=True),
  dict(position="sincos2d", out_channels=6),
  dict(position="learned", patch_size=4),
]


def test_the_tree_is_the_one_that_others_build_on():
  config = dataclasses.replace(
    SMALL, position="learned", qk_norm=True, mlp="swiglu", out_channels=5
  )
  shapes = jax.eval_shape(models.build(config).init, jax.random.key(0))
  leaves = jax.tree_util.tree_leaves_with_path(shapes)
  hidden = config.mlp_width
  assert {
    jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape
    for path, leaf in leaves
  } == {
    "patch_embed/kernel": (12, 32),
    "patch_embed/bias": (32,),
    "time_embed/in/kernel": (256, 32),
    "time_embed/in/bias": (32,),
    "time_embed/out/kernel": (32, 32),
    "time_embed/out/bias": (32,),
    "label_embed/embedding": (11, 32),
    "pos_embed/embedding": (24, 32),
    "blocks/modulation/kernel": (2, 32, 6, 32),
    "blocks/modulation/bias": (2, 6, 32),
    "blocks/attention/qkv/kernel": (2, 32, 3, 4, 8),
    "blocks/attention/qkv/bias": (2, 3, 4, 8),
    "blocks/attention/query_norm/scale": (2, 8),
    "blocks/attention/key_norm/scale": (2, 8),
    "blocks/attention/out/kernel": (2, 4, 8, 32),
    "blocks/attention/out/bias": (2, 32),
    "blocks/mlp/in/kernel": (2, 32, 2, hidden),
    "blocks/mlp/in/bias": (2, 2, hidden),
    "blocks/mlp/out/kernel": (2, hidden, 32),
    "blocks/mlp/out/bias": (2, 32),
    "final/modulation/kernel": (32, 2, 32),
    "final/modulation/bias": (2, 32),
    "final/out/kernel": (32, 20),
    "final/out/bias": (20,),
  }
  assert {leaf.dtype for _, leaf in leaves} == {jnp.dtype("float32")}


@pytest.mark.slow
def test_it_begins_as_the_paper_says():
  net = models.build(SMALL)
  inputs = draw(SMALL)

  @jax.jit
  def begin(rng):
    params = net.init(rng)
    return params, net.apply(params, *inputs)

  # rbg compiles in a fifth of the time that threefry takes.
  params, v_BHWC = jax.device_get(begin(jax.random.key(0, impl="rbg")))
  zero = [params["blocks"]["modulation"], params["final"]]
  assert all(not leaf.any() for leaf in jax.tree.leaves(zero))
  qkv = params["blocks"]["attention"]["qkv"]["kernel"]
  assert np.abs(qkv).max() <= np.sqrt(6 / (32 + 96))
  assert np.isclose(np.std(qkv), np.sqrt(2 / (32 + 96)), rtol=0.05)
  assert not np.array_equal(qkv[0], qkv[1])
  for table in (
    params["label_embed"]["embedding"],
    params["time_embed"]["in"]["kernel"],
    params["time_embed"]["out"]["kernel"],
  ):
    assert np.isclose(np.std(table), 0.02, rtol=0.2)
  assert v_BHWC.dtype == jnp.float32 and not v_BHWC.any()


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_gradient_reaches_every_parameter(variant):
  config = dataclasses.replace(SMALL, **variant)
  v_BHWC, gradient = value_and_gradient(config)
  assert v_BHWC.shape == (4, 8, 12, config.channels_out)
  biases = np.abs(gradient["blocks"]["attention"]["qkv"]["bias"])
  if config.position != "rope2d" and not config.qk_norm:
    # Shifting all keys alike shifts a query's scores alike: softmax is blind
    # to the bias of keys, and its gradient is rounding.
    assert biases[:, 1].max() < 1e-4 * biases[:, 0].max()
  for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    if name == "label_embed/embedding":
      # Only the rows of labels that were seen.
      assert np.all(leaf[:4]) and not np.any(leaf[4:])
    elif name != "blocks/attention/qkv/bias":
      assert np.all(leaf), name
  assert np.all(biases[:, 0]) and np.all(biases[:, 2])


# In the loop and out of it, where `prevent_cse` differs; with most of the names
# that are kept, and with none. Every policy has its turn in `test_joint.py`.
@pytest.mark.slow(1)
@pytest.mark.parametrize(
  "change",
  [dict(remat="offload_matmuls"), dict(scan=False, remat="full")],
  ids=str,
)
def test_scanned_unrolled_and_remade_are_the_same(change):
  changed = dataclasses.replace(SMALL, **change)
  assert_same(value_and_gradient(changed), value_and_gradient(SMALL))
  shapes = jax.eval_shape(models.build(changed).init, jax.random.key(0))
  jax.tree.map(
    np.testing.assert_equal,
    jax.tree.map(np.shape, shapes),
    jax.tree.map(np.shape, parameters(SMALL)),
  )


@pytest.mark.slow
def test_bfloat16_is_close_to_float32():
  low = dataclasses.replace(SMALL, dtype="bfloat16")
  ours = value_and_gradient(low, shared=SMALL)
  wanted = value_and_gradient(SMALL)
  assert ours[0].dtype == jnp.float32
  assert {g.dtype for g in jax.tree.leaves(ours[1])} == {jnp.dtype("float32")}
  assert np.any(ours[0] != wanted[0])

  def error(low, exact):
    return np.linalg.norm(low - exact) / np.linalg.norm(exact)

  # bfloat16 has 8 bits: each value is rounded by up to 0.4%.
  assert 1e-4 < error(ours[0], wanted[0]) < 0.02
  errors = jax.tree.map(error, ours[1], wanted[1])
  assert max(jax.tree.leaves(errors)) < 0.05


def test_the_end_of_a_bfloat16_network_is_in_float32():
  rng = np.random.default_rng(0)
  x_BTD = jnp.asarray(rng.standard_normal((2, 5, 32)), jnp.bfloat16)
  c_BD = rng.standard_normal((2, 32)).astype(np.float32)
  params = parameters(SMALL)["final"]
  final = jax.jit(blocks.Final(12, "layernorm").apply)
  np.testing.assert_array_equal(
    final({"params": params}, x_BTD, c_BD),
    final({"params": params}, x_BTD.astype(jnp.float32), c_BD),
  )


def test_attention_sees_the_whole_image_and_the_position():
  net = models.build(SMALL)
  params = parameters(SMALL)
  x_BHWC, t_B, cond = draw(SMALL)

  @jax.jit
  @jax.value_and_grad
  def corner(x_BHWC):
    return jnp.sum(net.apply(params, x_BHWC, t_B, cond)[:, 0, 0])

  value, influence = corner(x_BHWC)
  assert np.all(np.any(influence, axis=-1))
  # Were there no positions, swapping two other patches would change nothing.
  swapped = x_BHWC.copy()
  swapped[:, 2:4, 2:4] = x_BHWC[:, 6:8, 6:8]
  swapped[:, 6:8, 6:8] = x_BHWC[:, 2:4, 2:4]
  assert abs(corner(swapped)[0] - value) > 1e-3


@pytest.mark.parametrize("position", ["rope2d", "sincos2d"])
def test_images_of_another_size_need_no_new_parameters(position):
  config = dataclasses.replace(SMALL, position=position)
  other = dataclasses.replace(config, image_size=(4, 16))
  net = models.build(config)
  apply = jax.jit(net.apply)
  v_BHWC = apply(parameters(config), *draw(other))
  assert v_BHWC.shape == (4, 4, 16, 3)
  same = jax.jit(models.build(other).apply)(parameters(config), *draw(other))
  np.testing.assert_array_equal(v_BHWC, same)


def test_without_an_rng_it_is_deterministic_and_drops_nothing():
  net = models.build(dataclasses.replace(SMALL, label_dropout=0.999))
  params = parameters(SMALL)
  apply = jax.jit(net.apply)
  x_BHWC, t_B, cond = draw(SMALL)
  v_BHWC = apply(params, x_BHWC, t_B, cond)
  np.testing.assert_array_equal(apply(params, x_BHWC, t_B, cond), v_BHWC)
  without = apply(params, x_BHWC, t_B, net.unconditional(cond))
  assert np.all(np.any(v_BHWC != without, axis=(1, 2, 3)))


def test_labels_are_dropped_at_the_rate_of_the_config():
  config = dataclasses.replace(
    SMALL, image_size=(4, 4), patch_size=4, depth=1, label_dropout=0.3
  )
  net = models.build(config)
  params = parameters(config)
  apply = jax.jit(net.apply)
  x_BHWC, t_B, cond = draw(config, batch=1000)
  rng = jax.random.key(0)
  v_BHWC = np.asarray(apply(params, x_BHWC, t_B, cond, rng))
  with_label = np.asarray(apply(params, x_BHWC, t_B, cond))
  without = np.asarray(apply(params, x_BHWC, t_B, net.unconditional(cond)))
  difference = [
    np.abs(v_BHWC - other).max(axis=(1, 2, 3)) < 1e-5
    for other in (with_label, without)
  ]
  kept_B, dropped_B = difference
  assert np.all(kept_B ^ dropped_B)
  assert abs(dropped_B.mean() - 0.3) < 4 * np.sqrt(0.3 * 0.7 / 1000)
  other = apply(params, x_BHWC, t_B, cond, jax.random.key(1))
  assert not np.array_equal(other, v_BHWC)


def test_unconditional_is_the_last_label_and_keeps_the_rest():
  net = models.build(SMALL)
  cond = {"label": jnp.asarray([3, 1]), "other": jnp.ones(2)}
  without = net.unconditional(cond)
  np.testing.assert_array_equal(without["label"], [10, 10])
  assert without["label"].dtype == cond["label"].dtype
  assert without["other"] is cond["other"]


@pytest.mark.slow(1)
def test_time_is_scaled_before_its_sinusoid():
  x_BHWC, t_B, cond = draw(SMALL)
  params = parameters(SMALL)
  scaled, _ = value_and_gradient(SMALL)
  plain = dataclasses.replace(SMALL, timestep_scale=1.0)
  apply = jax.jit(models.build(plain).apply)
  same = apply(params, x_BHWC, 1000 * t_B, cond)
  np.testing.assert_allclose(scaled, same, atol=1e-3)
  assert np.abs(scaled - apply(params, x_BHWC, t_B, cond)).max() > 0.1


@pytest.mark.parametrize(
  "change, message",
  [
    (dict(x=(4, 9, 12, 3)), "patch_size=2 does not divide .*9x12"),
    (dict(x=(4, 8, 12, 4)), r"\[B, H, W, 3\], not \(4, 8, 12, 4\)"),
    (dict(x=(8, 12, 3)), r"\[B, H, W, 3\], not \(8, 12, 3\)"),
    (dict(x=(4, 12, 8, 3)), "grid of 4x6 patches, not 6x4.*8x12"),
    (dict(t=()), r"t has shape \(\); for 4 images it is \(4,\)"),
    (dict(label=(3,)), r"label has shape \(3,\); for 4 images"),
  ],
)
def test_inputs_of_another_shape_are_refused(change, message):
  net = models.build(dataclasses.replace(SMALL, position="learned"))
  shapes = dict(x=(4, 8, 12, 3), t=(4,), label=(4,)) | change
  x, t, label = (np.zeros(shapes[key], np.float32) for key in shapes)
  with pytest.raises(ValueError, match=message):
    net.apply({}, x, t, {"label": label})


def test_a_missing_label_is_refused():
  net = models.build(SMALL)
  x_BHWC, t_B, _ = draw(SMALL)
  with pytest.raises(ValueError, match="cond=.*'label'.*text"):
    net.apply({}, x_BHWC, t_B, {"text": t_B})


def test_a_network_of_no_classes_is_told_nothing():
  config = dataclasses.replace(SMALL, num_classes=0, depth=1)
  net = models.build(config)
  assert models.told(config) == "nothing" and models.told(SMALL) == "labels"
  assert net.example(3) == {} and net.unconditional({}) == {}
  x_BHWC, t_B, told = draw(SMALL)
  params = parameters(config)
  assert params["label_embed"]["embedding"].shape == (1, config.width)
  # It is the network whose labels are all dropped.
  table = np.concatenate([np.ones((10, 32)), *params["label_embed"].values()])
  labelled = {**params, "label_embed": {"embedding": np.float32(table)}}
  one = models.build(dataclasses.replace(SMALL, depth=1))

  @jax.jit
  def velocities(params, labelled):
    return (
      net.apply(params, x_BHWC, t_B, {}, jax.random.key(0)),
      net.apply(params, x_BHWC, t_B, told),
      one.apply(labelled, x_BHWC, t_B, one.unconditional(told)),
    )

  free, passed_over, dropped = velocities(params, labelled)
  np.testing.assert_allclose(free, passed_over, atol=1e-6)
  np.testing.assert_allclose(free, dropped, atol=1e-6)
  with pytest.raises(ValueError, match="num_classes=-1 must be positive, or 0"):
    dataclasses.replace(SMALL, num_classes=-1)
