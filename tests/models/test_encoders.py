"""Encoders beside a network, of layouts and of images, and what they say."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowjax import models
from flowjax.models import dit, image_encoder, layout, mmdit
from flowjax.parallel import flops as counted

WIDTH = 16
MMDIT = mmdit.MMDiTConfig(
  image_size=(4, 4), channels=2, heads=2, head_size=8, depth=1,
  position_table=8, text_width=WIDTH, pooled_width=WIDTH, text_tokens=3,
  condition_dropout=0.5,
)  # fmt: skip
LAYOUT = layout.LayoutConfig(classes=5, boxes=2, width=WIDTH, depth=1, heads=2)
LEARNED = image_encoder.EmbeddingConfig(
  size=6, tokens=3, depth=1, width=WIDTH, heads=2
)
GIVEN = dataclasses.replace(LEARNED, depth=0)
ENCODERS = {
  "layout": (models.with_layout_encoder, LAYOUT, layout.GROUP),
  "learned": (models.with_image_encoder, LEARNED, image_encoder.GROUP),
  "given": (models.with_image_encoder, GIVEN, image_encoder.GROUP),
}


@functools.cache
def network(kind):
  """Returns a network with an encoder, and parameters, none zero."""
  beside, config, group = ENCODERS[kind]
  net = beside(models.build(MMDIT), config)
  rng = np.random.default_rng(0)
  params = jax.tree.map(
    lambda leaf: 0.3 * rng.standard_normal(leaf.shape, np.float32),
    jax.eval_shape(net.init, jax.random.key(0)),
  )
  assert group in params
  return net, params, group


def told(kind, count=2, seed=1):
  """Returns so many conditions, all different."""
  rng = np.random.default_rng(seed)
  if kind == "layout":
    sides = np.sort(rng.random((count, 2, 2, 2)), axis=2).reshape(count, 2, 4)
    kinds = rng.integers(5, size=(count, 2, 1))
    box_BN5 = np.concatenate([kinds, sides], axis=-1).astype(np.float32)
    return {"boxes": box_BN5, "box_mask": np.ones((count, 2), bool)}
  key, shape = image_encoder.told(ENCODERS[kind][1], MMDIT)
  value = rng.standard_normal((count, *shape), np.float32)
  return {key: value, f"{key}_mask": np.ones(count, bool)}


def images(count):
  rng = np.random.default_rng(2)
  x_BHWC = rng.standard_normal((count, 4, 4, 2), np.float32)
  return x_BHWC, np.full(count, 0.5, np.float32)


@pytest.mark.slow(1)
@pytest.mark.parametrize("kind", ENCODERS)
def test_the_network_hears_it_and_a_gradient_reaches_all_of_it(kind):
  net, params, group = network(kind)
  x_BHWC, t_B = images(2)

  @jax.jit
  def found(params, cond):
    def loss(params):
      v_BHWC = net.apply(params, x_BHWC, t_B, cond)
      return jnp.sum(jnp.square(v_BHWC)), v_BHWC

    return jax.grad(loss, has_aux=True)(params)

  grads, one = jax.device_get(found(params, told(kind)))
  _, other = jax.device_get(found(params, told(kind, seed=3)))
  assert np.abs(one - other).max() > 1e-3
  for path, leaf in jax.tree_util.tree_leaves_with_path(grads[group]):
    assert np.abs(leaf).max() > 0.0, jax.tree_util.keystr(path)
  # Nothing is the same, whatever it is that is not said.
  _, one = found(params, net.unconditional(told(kind)))
  _, other = found(params, net.unconditional(told(kind, seed=3)))
  np.testing.assert_array_equal(one, other)
  # And a negative is said in its place.
  negative = told(kind, seed=3)
  away = net.unconditional({**told(kind), "negative": negative})
  for key, value in negative.items():
    np.testing.assert_array_equal(away[key], value)


@pytest.mark.parametrize("kind", ENCODERS)
def test_conditions_are_dropped_whole_each_by_itself(kind):
  net, _, _ = network(kind)
  cond = told(kind, count=64)
  mask = next(key for key in cond if key.endswith("_mask"))
  dropped = net.dropped(cond, jax.random.key(0))
  kept = np.asarray(dropped[mask]).reshape(64, -1)
  assert (kept.all(axis=1) | ~kept.any(axis=1)).all()
  assert 16 < kept[:, 0].sum() < 48


@pytest.mark.parametrize("kind", ENCODERS)
def test_its_arithmetic_is_counted(kind):
  net, params, _ = network(kind)
  bare = models.build(MMDIT).flops
  found = counted.of(
    lambda params, cond: net.told(params, cond), params, net.example(1)
  )
  assert found.flops == net.flops - bare


def test_boxes_have_no_order_and_what_is_no_box_is_not_read():
  net, params, _ = network("layout")
  program = jax.jit(functools.partial(net.told, params))

  def read(cond):
    return jax.device_get(program(cond))

  cond = told("layout")
  one = read(cond)
  turned = read({key: value[:, ::-1] for key, value in cond.items()})
  np.testing.assert_allclose(turned["pooled"], one["pooled"], atol=1e-5)
  np.testing.assert_allclose(
    turned["text"], one["text"][:, [1, 0, 2]], atol=1e-5
  )
  cond["box_mask"][:, 1] = False
  alone = read(cond)
  cond["boxes"][:, 1] = 4.0, 0.0, 0.0, 1.0, 1.0
  again = read(cond)
  np.testing.assert_allclose(again["pooled"], alone["pooled"], atol=1e-6)
  assert np.abs(alone["pooled"] - one["pooled"]).max() > 1e-2
  # Each side of a box is read.
  for side in range(1, 5):
    cond["boxes"][:, 0, side] += 0.02
    moved = read(cond)
    assert np.abs(moved["pooled"] - again["pooled"]).max() > 1e-3
    again = moved


def test_an_embedding_has_one_length_and_an_image_any_size():
  net, params, _ = network("given")
  cond = told("given")
  longer = {**cond, "embedding": 7.0 * cond["embedding"]}
  read = jax.jit(functools.partial(net.told, params))
  np.testing.assert_allclose(
    read(longer)["text"], read(cond)["text"], atol=1e-5
  )
  net, params, _ = network("learned")
  wide = {
    "original": np.ones((2, 4, 8, 2), np.float32),
    "original_mask": np.ones(2, bool),
  }
  found = jax.eval_shape(net.told, params, wide)
  assert found["text"].shape == (2, 3, WIDTH)


@pytest.mark.parametrize(
  ("kind", "changed", "said"),
  [
    ("layout", dict(width=8), "width = 8 must be that of the text"),
    ("layout", dict(boxes=4), "tokens = 5 and model.text_tokens = 3"),
    ("learned", dict(tokens=2), "tokens = 2 and"),
  ],
)
def test_an_encoder_that_does_not_suit_the_network_is_refused(
  kind, changed, said
):
  beside, config, _ = ENCODERS[kind]
  with pytest.raises(ValueError, match=said):
    beside(models.build(MMDIT), dataclasses.replace(config, **changed))


@pytest.mark.parametrize(
  ("kind", "said"),
  [("layout", "classes = 5: a network 'dit'"), ("given", "size = 6: a net")],
)
def test_a_network_of_labels_is_refused(kind, said):
  beside, config, _ = ENCODERS[kind]
  labelled = dit.DiTConfig(
    image_size=(4, 4), channels=2, width=16, heads=2, depth=1
  )
  with pytest.raises(ValueError, match=said):
    beside(models.build(labelled), config)


@pytest.mark.parametrize(
  ("kind", "cond", "said"),
  [
    ("layout", {"label": np.zeros(1)}, r"'boxes': \[B, 2, 5\].*no 'boxes'"),
    (
      "layout",
      {"boxes": np.zeros((1, 3, 5)), "box_mask": np.ones((1, 3), bool)},
      r"not \(1, 3, 5\)",
    ),
    (
      "learned",
      {"original": np.zeros((1, 4, 4, 3)), "original_mask": np.ones(1, bool)},
      r"\[B, 4, 4, 2\] and its mask",
    ),
    (
      "given",
      {"embedding": np.zeros((1, 5)), "embedding_mask": np.ones(1, bool)},
      r"'embedding' \[B, 6\]",
    ),
  ],
)
def test_what_is_no_such_condition_is_named(kind, cond, said):
  net, params, _ = network(kind)
  x_BHWC, t_B = images(1)
  with pytest.raises(ValueError, match=said):
    net.apply(params, x_BHWC, t_B, cond)


@pytest.mark.parametrize(
  ("kind", "options", "said"),
  [
    (layout.LayoutConfig, dict(classes=-1), "classes = -1 is below 0"),
    (layout.LayoutConfig, dict(boxes=0), "boxes = 0 must be positive"),
    (layout.LayoutConfig, dict(depth=0), "depth = 0 must be at least 1"),
    (image_encoder.EmbeddingConfig, dict(size=-1), "size = -1 is below 0"),
    (image_encoder.EmbeddingConfig, dict(width=6, heads=2), "divisible by 4"),
    (image_encoder.EmbeddingConfig, dict(heads=3), "heads = 3 does not"),
  ],
)
def test_an_encoder_that_cannot_be_is_refused(kind, options, said):
  with pytest.raises(ValueError, match=said):
    kind(**options)


@pytest.mark.parametrize("kind", ["learned", "given"])
def test_an_image_that_is_masked_says_nothing(kind):
  net, params, _ = network(kind)
  masked = [
    {
      key: np.zeros_like(value) if value.dtype == bool else value
      for key, value in each.items()
    }
    for each in (told(kind), told(kind, seed=3))
  ]
  read = jax.jit(functools.partial(net.told, params))
  one, other, zeros = (
    jax.device_get(read(cond))
    for cond in (*masked, net.unconditional(told(kind)))
  )
  for key in ("text", "pooled"):
    np.testing.assert_array_equal(one[key], other[key])
    np.testing.assert_array_equal(one[key], zeros[key])
  # Not even an image of zeros is nothing.
  grey = {
    key: np.zeros_like(value) if value.dtype != bool else value
    for key, value in told("learned").items()
  }
  if kind == "learned":
    said = jax.device_get(read(grey))
    assert np.abs(said["pooled"] - zeros["pooled"]).max() > 1e-3
