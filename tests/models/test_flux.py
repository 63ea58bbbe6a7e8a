"""What a FLUX computes, on small shapes."""

# Shape suffixes: B batch, H height, W width, C channels, L text tokens.

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowjax import models
from flowjax.models import flux

SMALL = flux.FluxConfig(
  image_size=(4, 6),
  channels=3,
  width=32,
  heads=2,
  double_depth=2,
  single_depth=2,
  text_width=12,
  pooled_width=10,
  text_tokens=5,
  rope_axes=(4, 6, 6),
)
LABELLED = dataclasses.replace(SMALL, num_classes=3, label_tokens=2)


def draw(config, batch=2, length=5, seed=0):
  rng = np.random.default_rng(seed)

  def normal(*shape):
    return rng.standard_normal(shape).astype(np.float32)

  x_BHWC = normal(batch, *config.image_size, config.channels)
  t_B = rng.random(batch).astype(np.float32)
  if config.num_classes:
    return x_BHWC, t_B, {"label": np.arange(batch) % config.num_classes}
  text_BLE = normal(batch, length, config.text_width)
  pooled_BP = normal(batch, config.pooled_width)
  return x_BHWC, t_B, {"text": text_BLE, "pooled": pooled_BP}


@functools.lru_cache
def parameters(config):
  """Draws parameters, none of which is zero, and norms that scale by about 1.

  With smaller ones all tokens would be seen alike.
  """
  rng = np.random.default_rng(1)
  shapes = jax.eval_shape(models.build(config).init, jax.random.key(0))

  def one(path, leaf):
    drawn = 0.1 * rng.standard_normal(leaf.shape).astype(np.float32)
    return drawn + (path[-1].key == "scale")

  return jax.tree_util.tree_map_with_path(one, shapes)


@functools.lru_cache
def compiled(config):
  return jax.jit(models.build(config).apply)


def velocity(config, cond, shared=None, **changes):
  """Returns the velocity of the drawn image and time, given `cond`."""
  x_BHWC, t_B, _ = draw(config)
  inputs = dict(x=x_BHWC, t=t_B) | changes
  params = parameters(shared or config)
  return np.asarray(compiled(config)(params, inputs["x"], inputs["t"], cond))


@functools.lru_cache
def value_and_gradient(config, shared=None):
  """Returns the velocity and the gradient of an uneven sum of it."""
  net = models.build(config)
  inputs = draw(config)

  def scalar(params):
    v_BHWC = net.apply(params, *inputs)
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


def names_and_leaves(tree):
  return {
    jax.tree_util.keystr(path, simple=True, separator="/"): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


def test_the_tree_is_the_one_that_others_build_on():
  leaves = names_and_leaves(parameters(LABELLED))
  dense = {
    "patch_embed": (12, 32),
    "text_embed": (12, 32),
    **{f"{name}_embed/in": (256, 32) for name in ("time", "guidance")},
    **{f"{name}_embed/out": (32, 32) for name in ("time", "guidance")},
    "pooled_embed/in": (10, 32),
    "pooled_embed/out": (32, 32),
    "final/modulation": (32, 2, 32),
    "final/out": (32, 12),
    "single_blocks/modulation": (2, 32, 3, 32),
    "single_blocks/attention/qkv": (2, 32, 3, 2, 16),
    "single_blocks/mlp/in": (2, 32, 128),
    "single_blocks/mlp/out": (2, 128, 32),
  }
  scales = ["single_blocks/attention"]
  for stream in ("double_blocks/image", "double_blocks/text"):
    dense |= {
      f"{stream}/modulation": (2, 32, 6, 32),
      f"{stream}/attention/qkv": (2, 32, 3, 2, 16),
      f"{stream}/attention/out": (2, 2, 16, 32),
      f"{stream}/mlp/in": (2, 32, 128),
      f"{stream}/mlp/out": (2, 128, 32),
    }
    scales.append(f"{stream}/attention")
  wanted = {f"{name}/kernel": shape for name, shape in dense.items()}
  wanted["single_blocks/attention/out/kernel"] = (2, 2, 16, 32)
  for place in scales:
    wanted |= {f"{place}/{n}_norm/scale": (2, 16) for n in ("query", "key")}
  wanted |= {"label_embed/text": (4, 2, 12), "label_embed/pooled": (4, 10)}
  found = {name: leaf.shape for name, leaf in leaves.items()}
  biases = {name for name in found if name.endswith("/bias")}
  assert biases == {f"{name}/bias" for name in dense}
  assert {name: found[name] for name in found if name not in biases} == wanted


@pytest.mark.slow(1)
def test_it_begins_by_saying_nothing():
  init = jax.jit(models.build(SMALL).init)
  # rbg compiles in a fifth of the time that threefry takes.
  params = jax.device_get(init(jax.random.key(0, impl="rbg")))
  v_BHWC = np.asarray(compiled(SMALL)(params, *draw(SMALL)))
  leaves = names_and_leaves(params)
  zero = {name for name, leaf in leaves.items() if not np.any(leaf)}
  assert {name for name in zero if not name.endswith("/bias")} == {
    "double_blocks/image/modulation/kernel",
    "double_blocks/text/modulation/kernel",
    "single_blocks/modulation/kernel",
    "final/modulation/kernel",
    "final/out/kernel",
  }
  assert v_BHWC.dtype == jnp.float32 and not v_BHWC.any()


@pytest.mark.slow
def test_a_gradient_reaches_every_parameter():
  v_BHWC, gradient = value_and_gradient(LABELLED)
  assert v_BHWC.shape == (2, 4, 6, 3)
  leaves = names_and_leaves(gradient)
  for name, leaf in leaves.items():
    if name.startswith("label_embed"):
      # Only the rows of labels that were seen.
      assert np.all(leaf[:2]) and not np.any(leaf[2:]), name
    else:
      assert np.all(leaf), name


# Both kinds of block are remade by `joint.remade`, whose every policy has its
# turn in `test_joint.py`; here, that which keeps the most names, and that which
# keeps none where no loop is.
@pytest.mark.slow
@pytest.mark.parametrize(
  "change",
  [dict(remat="offload_matmuls"), dict(scan=False, remat="full")],
  ids=str,
)
def test_scanned_unrolled_and_remade_are_the_same(change):
  changed = dataclasses.replace(LABELLED, **change)
  assert_same(value_and_gradient(changed), value_and_gradient(LABELLED))
  shapes = jax.eval_shape(models.build(changed).init, jax.random.key(0))
  assert jax.tree.map(np.shape, shapes) == jax.tree.map(
    np.shape, parameters(LABELLED)
  )


@pytest.mark.slow
def test_bfloat16_is_close_to_float32():
  low = dataclasses.replace(LABELLED, dtype="bfloat16")
  ours = value_and_gradient(low, shared=LABELLED)
  wanted = value_and_gradient(LABELLED)
  assert ours[0].dtype == jnp.float32
  assert {g.dtype for g in jax.tree.leaves(ours[1])} == {jnp.dtype("float32")}

  def error(low, exact):
    return np.linalg.norm(low - exact) / np.linalg.norm(exact)

  # bfloat16 has 8 bits: each value is rounded by up to 0.4%.
  assert 1e-4 < error(ours[0], wanted[0]) < 0.02
  errors = jax.tree.map(error, ours[1], wanted[1])
  assert max(jax.tree.leaves(errors)) < 0.06


@pytest.mark.slow(1)
def test_hidden_text_is_as_good_as_absent():
  """Whatever stands there: the rest is as if the text were shorter."""
  _, _, cond = draw(SMALL)
  shown = {key: value[:, :3] for key, value in cond.items() if key == "text"}
  short = velocity(SMALL, {**cond, **shown})
  mask_BL = np.array([[True] * 3 + [False] * 2] * 2)
  for change in (0.0, 7.0):
    text_BLE = cond["text"].copy()
    text_BLE[:, 3:] += change
    hidden = {**cond, "text": text_BLE, "text_mask": mask_BL}
    np.testing.assert_allclose(velocity(SMALL, hidden), short, atol=1e-5)
  assert np.abs(velocity(SMALL, cond) - short).max() > 1e-2


@pytest.mark.slow(1)
def test_each_example_has_a_mask_of_its_own():
  _, _, cond = draw(SMALL)
  mask_BL = np.ones((2, 5), bool)
  whole = velocity(SMALL, {**cond, "text_mask": mask_BL})
  np.testing.assert_allclose(whole, velocity(SMALL, cond), atol=1e-6)
  mask_BL[1, 2:] = False
  partly = velocity(SMALL, {**cond, "text_mask": mask_BL})
  np.testing.assert_array_equal(partly[0], whole[0])
  assert np.abs(partly[1] - whole[1]).max() > 1e-2


def test_examples_do_not_see_each_other():
  inputs = draw(SMALL)
  x_BHWC, t_B, cond = jax.tree.map(
    lambda own, other: np.concatenate([other[:1], own[1:]]),
    inputs,
    draw(SMALL, seed=3),
  )
  together = velocity(SMALL, inputs[2])
  changed = velocity(SMALL, cond, x=x_BHWC, t=t_B)
  np.testing.assert_allclose(together[1:], changed[1:], atol=1e-5)
  assert np.abs(together[0] - changed[0]).max() > 1e-2


@pytest.mark.slow(1)
def test_rows_are_not_columns():
  """Turned by a quarter, an image of the same patches is another."""
  config = dataclasses.replace(
    SMALL, image_size=(3, 3), patch_size=1, channels=12
  )
  x_BHWC, _, cond = draw(config)
  turned = velocity(config, cond, x=x_BHWC.transpose(0, 2, 1, 3))
  straight = velocity(config, cond, x=x_BHWC)
  assert np.abs(turned.transpose(0, 2, 1, 3) - straight).max() > 1e-2


def test_text_has_no_order():
  _, _, cond = draw(SMALL)
  mixed = {**cond, "text": cond["text"][:, [3, 0, 4, 1, 2]]}
  np.testing.assert_allclose(
    velocity(SMALL, mixed), velocity(SMALL, cond), atol=1e-5
  )


@pytest.mark.slow(1)
def test_guidance_is_told_or_taken_from_the_config():
  _, _, cond = draw(SMALL)
  guidance_B = np.array([3.5, 1.0], np.float32)
  told = {**cond, "guidance": guidance_B}
  config = dataclasses.replace(SMALL, train_guidance=3.5)
  taken = [velocity(c, cond, SMALL) for c in (config, SMALL)]
  both = velocity(SMALL, told)
  np.testing.assert_allclose(both[0], taken[0][0], atol=1e-6)
  np.testing.assert_allclose(both[1], taken[1][1], atol=1e-6)
  assert np.abs(taken[0] - taken[1]).max((1, 2, 3)).min() > 1e-3
  schnell = models.build(dataclasses.replace(SMALL, guidance_embed=False))
  with pytest.raises(ValueError, match="'guidance', and guidance_embed=False"):
    schnell.apply({}, *draw(SMALL)[:2], told)


@pytest.mark.slow(1)
def test_time_and_guidance_are_scaled_alike():
  config = dataclasses.replace(SMALL, timestep_scale=1.0)
  _, t_B, cond = draw(SMALL)
  guidance_B = np.array([1.0, 3.5], np.float32)
  scaled = velocity(SMALL, {**cond, "guidance": guidance_B})
  plain = velocity(
    config, {**cond, "guidance": 1000 * guidance_B}, SMALL, t=1000 * t_B
  )
  np.testing.assert_allclose(plain, scaled, atol=1e-4)


@pytest.mark.slow(2)
def test_labels_are_texts_that_are_learned():
  params = parameters(LABELLED)
  _, _, cond = draw(LABELLED)
  learned = {
    key: params["label_embed"][key][cond["label"]] for key in ("text", "pooled")
  }
  rest = {key: params[key] for key in params if key != "label_embed"}
  x_BHWC, t_B, _ = draw(LABELLED)
  wanted = compiled(SMALL)(rest, x_BHWC, t_B, learned)
  v_BHWC, _ = value_and_gradient(LABELLED)
  np.testing.assert_allclose(v_BHWC, wanted, atol=1e-6)


@pytest.mark.slow(1)
def test_conditions_are_dropped_at_the_rate_of_the_config():
  config = dataclasses.replace(
    SMALL, image_size=(2, 2), condition_dropout=0.3, single_depth=1
  )
  params = parameters(config)
  x_BHWC, t_B, cond = draw(config, batch=200)
  empty = models.build(config).unconditional(cond)
  v_BHWC, *others = (
    np.asarray(compiled(config)(params, x_BHWC, t_B, *told))
    for told in ((cond, jax.random.key(0)), (cond,), (empty,))
  )
  kept_B, dropped_B = (
    np.abs(v_BHWC - other).max((1, 2, 3)) < 1e-5 for other in others
  )
  assert np.all(kept_B ^ dropped_B)
  assert abs(dropped_B.mean() - 0.3) < 4 * np.sqrt(0.3 * 0.7 / 200)


def test_without_a_condition_a_negative_one_is_followed():
  net = models.build(SMALL)
  _, _, cond = draw(SMALL)
  _, _, other = draw(SMALL, seed=5)
  cond = {**cond, "guidance": np.ones(2, np.float32)}
  empty = net.unconditional(cond)
  assert not np.any(empty["text"]) and not np.any(empty["pooled"])
  assert empty["guidance"] is cond["guidance"]
  without = net.unconditional({**cond, "negative": other})
  np.testing.assert_array_equal(
    velocity(SMALL, without), velocity(SMALL, {**cond, **other})
  )
  assert jax.tree.structure(without) == jax.tree.structure(
    {**cond, "negative": other}
  )


def test_images_and_texts_of_another_size_need_no_new_parameters():
  other = dataclasses.replace(SMALL, image_size=(8, 2), text_tokens=9)
  x_BHWC, t_B, cond = draw(other, length=9)
  v_BHWC = velocity(SMALL, cond, x=x_BHWC, t=t_B)
  assert v_BHWC.shape == (2, 8, 2, 3) and np.all(np.isfinite(v_BHWC))


@pytest.mark.parametrize(
  "change, message",
  [
    (dict(x=(2, 5, 6, 3)), "patch_size=2 does not divide .*5x6"),
    (dict(x=(2, 4, 6, 4)), r"\[B, H, W, 3\], not \(2, 4, 6, 4\)"),
    (dict(t=()), r"t has shape \(\); for 2 images it is \(2,\)"),
    (dict(guidance=(1,)), r"guidance has shape \(1,\); for 2 images"),
    (dict(text=(2, 5, 11)), r"text has shape \(2, 5, 11\)"),
    (dict(pooled=(1, 10)), r"pooled has shape \(1, 10\)"),
  ],
)
def test_inputs_of_another_shape_are_refused(change, message):
  shapes = dict(x=(2, 4, 6, 3), t=(2,), text=(2, 5, 12), pooled=(2, 10))
  x, t, *_ = arrays = [
    np.zeros(shape, np.float32) for shape in (shapes | change).values()
  ]
  cond = dict(zip([*shapes | change][2:], arrays[2:], strict=True))
  with pytest.raises(ValueError, match=message):
    models.build(SMALL).apply({}, x, t, cond)


@pytest.mark.parametrize(
  "change, message",
  [
    (dict(rope_axes=(4, 6, 8)), r"rope_axes=\(4, 6, 8\).*sum to 16"),
    (dict(rope_axes=(5, 5, 6)), r"rope_axes=\(5, 5, 6\).*even"),
    (dict(heads=3), "heads=3 does not divide width=32.*is 48"),
    (dict(patch_size=4), "patch_size=4 does not divide .*4x6"),
    (dict(single_depth=0), "single_depth=0 must be positive"),
    (dict(image_size=(0, 6)), r"image_size=\(0, 6\)"),
    (dict(remat="mathmuls"), "'mathmuls'.*'matmuls'"),
    (dict(name="flus"), "name='flus'.*'flux'"),
    (dict(condition_dropout=1.0), "condition_dropout=1.0.*below 1"),
    (dict(text_width=0), "text_width=0 must be positive"),
  ],
)
def test_an_impossible_config_is_refused(change, message):
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(SMALL, **change)
