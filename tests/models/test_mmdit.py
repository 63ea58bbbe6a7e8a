"""What an MM-DiT computes, on small shapes."""

# Shape suffixes: B batch, H height, W width, C channels, L text tokens.

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowjax import models
from flowjax.models import mmdit

SMALL = mmdit.MMDiTConfig(
  image_size=(8, 12),
  channels=3,
  depth=3,
  heads=4,
  head_size=8,
  text_width=10,
  pooled_width=6,
  text_tokens=5,
  position_table=8,
  qk_norm=True,
  dual_layers=1,
)
PLAIN = dataclasses.replace(SMALL, dual_layers=0)
LABELS = dataclasses.replace(
  SMALL, num_classes=10, label_tokens=3, depth=1, dual_layers=0
)
TURNED = dataclasses.replace(LABELS, position="rope2d", patch_size=4)


def draw(config, batch=4, length=5, seed=0):
  rng = np.random.default_rng(seed)

  def normal(*shape):
    return rng.standard_normal(shape, np.float32)

  x_BHWC = normal(batch, *config.image_size, config.channels)
  t_B = rng.random(batch, np.float32)
  if config.num_classes:
    label_B = np.arange(batch, dtype=np.int32) % config.num_classes
    return x_BHWC, t_B, {"label": label_B}
  return (
    x_BHWC,
    t_B,
    {
      "text": normal(batch, length, config.text_width),
      "pooled": normal(batch, config.pooled_width),
    },
  )


@functools.lru_cache
def parameters(config):
  """Draws parameters, none of which is zero: fresh gates are closed."""
  rng = np.random.default_rng(1)
  shapes = jax.eval_shape(models.build(config).init, jax.random.key(0))
  return jax.tree.map(
    lambda leaf: 0.1 * rng.standard_normal(leaf.shape).astype(np.float32),
    shapes,
  )


@functools.lru_cache
def applied(config):
  return jax.jit(models.build(config).apply)


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


def named(tree):
  return {
    jax.tree_util.keystr(path, simple=True, separator="/"): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


def test_the_tree_is_the_one_that_others_build_on():
  config = dataclasses.replace(SMALL, depth=6, dual_layers=2, num_classes=9)
  shapes = named(jax.eval_shape(models.build(config).init, jax.random.key(0)))
  assert {leaf.dtype for leaf in shapes.values()} == {jnp.dtype("float32")}

  def dense(name, *shape):
    return {f"{name}/kernel": shape, f"{name}/bias": shape[1:]}

  def attention(name):
    norms = (f"{name}/query_norm/scale", f"{name}/key_norm/scale")
    return dense(f"{name}/qkv", 32, 3, 4, 8) | dict.fromkeys(norms, (8,))

  def out(name):
    return {f"{name}/out/kernel": (4, 8, 32), f"{name}/out/bias": (32,)}

  def stream(name, parts):
    return (
      dense(f"{name}/modulation", 32, parts, 32)
      | attention(f"{name}/attention")
      | out(f"{name}/attention")
      | dense(f"{name}/mlp/in", 32, 128)
      | dense(f"{name}/mlp/out", 128, 32)
    )

  def stacked(layers, shapes):
    return {name: (layers, *shape) for name, shape in shapes.items()}

  second = attention("dual_blocks/image/attention2")
  second |= out("dual_blocks/image/attention2")
  wanted = {
    "label_embed/text": (10, 8, 10),
    "label_embed/pooled": (10, 6),
    **dense("patch_embed", 12, 32),
    **dense("text_embed", 10, 32),
    **dense("time_embed/in", 256, 32),
    **dense("time_embed/out", 32, 32),
    **dense("pooled_embed/in", 6, 32),
    **dense("pooled_embed/out", 32, 32),
    **stacked(2, stream("dual_blocks/image", 9) | second),
    **stacked(2, stream("dual_blocks/text", 6)),
    **stacked(3, stream("blocks/image", 6) | stream("blocks/text", 6)),
    **stream("last_block/image", 6),
    **dense("last_block/text/modulation", 32, 2, 32),
    **attention("last_block/text/attention"),
    **dense("final/modulation", 32, 2, 32),
    **dense("final/out", 32, 12),
  }
  assert {name: leaf.shape for name, leaf in shapes.items()} == wanted


@pytest.mark.parametrize(
  "change, groups",
  [
    (dict(depth=1, dual_layers=0), ["last_block"]),
    (dict(depth=2, dual_layers=0), ["blocks", "last_block"]),
    (dict(depth=2, dual_layers=1), ["dual_blocks", "last_block"]),
  ],
  ids=str,
)
def test_there_are_only_the_groups_of_blocks_that_have_some(change, groups):
  net = models.build(dataclasses.replace(SMALL, **change))
  shapes = jax.eval_shape(net.init, jax.random.key(0))
  assert sorted(name for name in shapes if "block" in name) == sorted(groups)


@pytest.mark.slow(1)
def test_it_begins_as_the_paper_says():
  net = models.build(LABELS)
  inputs = draw(LABELS)

  @jax.jit
  def begin(rng):
    params = net.init(rng)
    return params, net.apply(params, *inputs)

  # rbg compiles in a fifth of the time that threefry takes.
  params, v_BHWC = jax.device_get(begin(jax.random.key(0, impl="rbg")))
  for name, leaf in named(params).items():
    zero = "modulation" in name or name.startswith("final")
    assert zero or "bias" in name or leaf.any(), name
    assert not (zero and leaf.any()), name
  qkv = params["last_block"]["text"]["attention"]["qkv"]["kernel"]
  assert np.abs(qkv).max() <= np.sqrt(6 / (32 + 96))
  assert np.isclose(np.std(qkv), np.sqrt(2 / (32 + 96)), rtol=0.05)
  assert np.isclose(np.std(params["label_embed"]["text"]), 0.02, rtol=0.2)
  assert np.isclose(
    np.std(params["pooled_embed"]["out"]["kernel"]), 0.02, rtol=0.2
  )
  assert v_BHWC.dtype == jnp.float32 and not v_BHWC.any()


@pytest.mark.slow
@pytest.mark.parametrize("config", [SMALL, TURNED], ids=["text", "labels"])
def test_a_gradient_reaches_every_parameter(config):
  v_BHWC, gradient = value_and_gradient(config)
  assert v_BHWC.shape == (4, 8, 12, 3)
  gradient = jax.tree.map(np.asarray, gradient)  # Others are given it, too.
  last = gradient["last_block"]["text"]["attention"]
  # Text that is not carried on asks in vain: its queries change nothing.
  for unheard in (
    last["qkv"]["kernel"][:, 0],
    last["qkv"]["bias"][0],
    last.pop("query_norm")["scale"],
  ):
    assert not np.any(unheard)
  last["qkv"] = jax.tree.map(
    lambda leaf: leaf.reshape(-1, 3, 4, 8)[:, 1:], last["qkv"]
  )
  for name, leaf in named(gradient).items():
    if name.startswith("label_embed"):
      # Only the rows of labels that were seen.
      assert np.all(leaf[:4]) and not np.any(leaf[4:])
    else:
      assert np.all(leaf), name


@pytest.mark.slow
def test_unrolled_and_remade_it_is_the_same():
  changed = dataclasses.replace(PLAIN, scan=False, remat="matmuls")
  assert_same(
    value_and_gradient(changed, shared=PLAIN), value_and_gradient(PLAIN)
  )
  shapes = jax.eval_shape(models.build(changed).init, jax.random.key(0))
  jax.tree.map(
    np.testing.assert_equal,
    jax.tree.map(np.shape, shapes),
    jax.tree.map(np.shape, parameters(PLAIN)),
  )


@pytest.mark.slow(1)
def test_unrolled_dual_blocks_are_the_scanned_ones():
  config = dataclasses.replace(SMALL, dual_layers=2, position="rope2d")
  unrolled = dataclasses.replace(config, scan=False)
  params, inputs = parameters(config), draw(config)
  np.testing.assert_allclose(
    applied(unrolled)(params, *inputs),
    applied(config)(params, *inputs),
    atol=1e-5,
  )


@pytest.mark.slow
def test_bfloat16_is_close_to_float32():
  """Of the last block, and all around; of others, see FLUX's."""
  low = dataclasses.replace(TURNED, dtype="bfloat16")
  ours = value_and_gradient(low, shared=TURNED)
  wanted = value_and_gradient(TURNED)
  assert ours[0].dtype == jnp.float32
  assert {g.dtype for g in jax.tree.leaves(ours[1])} == {jnp.dtype("float32")}

  def error(low, exact):
    size = np.linalg.norm(exact)
    return np.linalg.norm(low - exact) / np.where(size, size, 1.0)

  # bfloat16 has 8 bits: each value is rounded by up to 0.4%.
  assert 1e-4 < error(ours[0], wanted[0]) < 0.02
  errors = jax.tree.map(error, ours[1], wanted[1])
  assert max(jax.tree.leaves(errors)) < 0.05


@pytest.mark.slow(1)
def test_the_text_of_either_kind_is_heard_and_so_is_the_time():
  x_BHWC, t_B, cond = draw(SMALL)
  apply, params = applied(SMALL), parameters(SMALL)
  v_BHWC = apply(params, x_BHWC, t_B, cond)
  for changed in (
    (x_BHWC, 1.0 - t_B, cond),
    (x_BHWC, t_B, {**cond, "text": -cond["text"]}),
    (x_BHWC, t_B, {**cond, "pooled": -cond["pooled"]}),
    (x_BHWC, t_B, models.build(SMALL).unconditional(cond)),
  ):
    difference = np.abs(apply(params, *changed) - v_BHWC)
    assert np.all(difference.max(axis=(1, 2, 3)) > 1e-4)
  np.testing.assert_array_equal(apply(params, x_BHWC, t_B, cond), v_BHWC)


@pytest.mark.slow(1)
@pytest.mark.parametrize("length", [1, 3])
def test_text_that_is_masked_is_as_if_it_were_not_there(length):
  config = dataclasses.replace(SMALL, depth=2, dual_layers=0)
  x_BHWC, t_B, cond = draw(config)
  mask_BL = np.broadcast_to(np.arange(5) < length, (4, 5))
  apply, params = applied(config), parameters(config)
  v_BHWC = apply(params, x_BHWC, t_B, {**cond, "text_mask": mask_BL})
  short = {**cond, "text": cond["text"][:, :length]}
  np.testing.assert_allclose(
    v_BHWC, apply(params, x_BHWC, t_B, short), atol=1e-5
  )
  assert np.abs(v_BHWC - apply(params, x_BHWC, t_B, cond)).max() > 1e-4
  mask_BL = np.ones((4, 5), bool)
  np.testing.assert_allclose(
    apply(params, x_BHWC, t_B, {**cond, "text_mask": mask_BL}),
    apply(params, x_BHWC, t_B, cond),
    atol=1e-5,
  )


@pytest.mark.parametrize("position", mmdit.POSITIONS)
def test_images_of_another_size_need_no_new_parameters(position):
  config = dataclasses.replace(SMALL, depth=1, dual_layers=0, position=position)
  other = dataclasses.replace(config, image_size=(4, 16))
  v_BHWC = applied(config)(parameters(config), *draw(other))
  assert v_BHWC.shape == (4, 4, 16, 3)
  same = applied(other)(parameters(config), *draw(other))
  np.testing.assert_array_equal(v_BHWC, same)


@pytest.mark.parametrize("position", mmdit.POSITIONS)
def test_every_patch_has_a_place(position):
  """Were there none, swapping two others would leave the corner as it is."""
  config = dataclasses.replace(SMALL, depth=1, dual_layers=0, position=position)
  x_BHWC, t_B, cond = draw(config)
  swapped = x_BHWC.copy()
  swapped[:, 2:4, 2:4] = x_BHWC[:, 6:8, 6:8]
  swapped[:, 6:8, 6:8] = x_BHWC[:, 2:4, 2:4]
  params = jax.tree.map(lambda leaf: 3.0 * leaf, parameters(config))
  corners = [
    applied(config)(params, x_BHWC, t_B, cond)[:, :2, :2]
    for x_BHWC in (x_BHWC, swapped)
  ]
  assert np.abs(corners[0] - corners[1]).max() > 1e-2


def test_an_image_cut_out_of_the_table_is_placed_as_in_a_smaller_table():
  """The centre of 8 x 8 is, from the second place on, that of 6 x 6."""
  config = dataclasses.replace(SMALL, depth=1, dual_layers=0)
  moved = dataclasses.replace(config, position_table=6, position_offset=-1.0)
  inputs, params = draw(config), parameters(config)
  v_BHWC = applied(config)(params, *inputs)
  np.testing.assert_allclose(applied(moved)(params, *inputs), v_BHWC, atol=1e-6)
  scaled = dataclasses.replace(config, position_scale=0.5)
  assert np.abs(applied(scaled)(params, *inputs) - v_BHWC).max() > 1e-3


def test_labels_are_dropped_at_the_rate_of_the_config():
  config = dataclasses.replace(
    LABELS, image_size=(4, 4), patch_size=4, condition_dropout=0.3
  )
  net, params = models.build(config), parameters(config)
  apply = applied(config)
  x_BHWC, t_B, cond = draw(config, batch=400)
  v_BHWC = apply(params, x_BHWC, t_B, cond, jax.random.key(0))
  kept_B, dropped_B = (
    np.abs(v_BHWC - apply(params, x_BHWC, t_B, told)).max(axis=(1, 2, 3)) < 1e-5
    for told in (cond, net.unconditional(cond))
  )
  assert np.all(kept_B ^ dropped_B)
  assert abs(dropped_B.mean() - 0.3) < 4 * np.sqrt(0.3 * 0.7 / 400)


@pytest.mark.parametrize(
  "change, message",
  [
    (dict(x=(4, 9, 12, 3)), "patch_size=2 does not divide .*9x12"),
    (dict(x=(4, 8, 12, 4)), r"\[B, H, W, 3\], not \(4, 8, 12, 4\)"),
    (dict(x=(8, 12, 3)), r"\[B, H, W, 3\], not \(8, 12, 3\)"),
    (dict(x=(4, 8, 20, 3)), "8x20 is a grid of 4x10.*8x8.*rope2d"),
    (dict(t=()), r"t has shape \(\); for 4 images it is \(4,\)"),
    (dict(text=(4, 5, 11)), r"text has shape \(4, 5, 11\)"),
  ],
)
def test_inputs_of_another_shape_are_refused(change, message):
  shapes = dict(x=(4, 8, 12, 3), t=(4,), text=(4, 5, 10), pooled=(4, 6))
  x, t, text, pooled = (
    np.zeros(shape, np.float32) for shape in (shapes | change).values()
  )
  with pytest.raises(ValueError, match=message):
    models.build(SMALL).apply({}, x, t, {"text": text, "pooled": pooled})
