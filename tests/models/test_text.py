"""The encoder of captions: what it reads, and what it hands to a network."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowjax import models
from flowjax.models import dit, flux, mmdit, text
from flowjax.parallel import flops as counted

TOKENS, WIDTH = 5, 8
ENCODER = text.TextConfig(
  vocabulary=7, tokens=TOKENS, width=WIDTH, depth=2, heads=2
)
EMPTY = np.array([1, 0, 0, 0, 0]), np.array([1, 0, 0, 0, 0], bool)
IMAGES = dict(image_size=(4, 4), channels=2)
TEXT = dict(
  **IMAGES,
  heads=2,
  text_width=WIDTH,
  pooled_width=WIDTH,
  text_tokens=TOKENS,
  condition_dropout=0.5,
)
NETWORKS = {
  "mmdit": mmdit.MMDiTConfig(**TEXT, head_size=8, depth=2, position_table=8),
  "flux": flux.FluxConfig(
    **TEXT, width=16, double_depth=1, single_depth=1, rope_axes=(2, 2, 4)
  ),
}


@functools.cache
def network(name):
  """Returns a network with its encoder, and parameters, none zero."""
  bare = models.build(NETWORKS[name])
  net = models.with_text_encoder(bare, ENCODER, EMPTY)
  rng = np.random.default_rng(0)
  params = jax.tree.map(
    lambda leaf: 0.3 * rng.standard_normal(leaf.shape, np.float32),
    jax.eval_shape(net.init, jax.random.key(0)),
  )
  return bare, net, params


def told(*rows):
  """Returns captions of such tokens, each with its end."""
  token_BL = np.zeros((len(rows), TOKENS), np.int32)
  for row_L, tokens in zip(token_BL, rows, strict=True):
    row_L[: len(tokens) + 1] = [*tokens, 1]
  return {"token": token_BL, "token_mask": token_BL != 0}


def images(count):
  rng = np.random.default_rng(1)
  x_BHWC = rng.standard_normal((count, 4, 4, 2), np.float32)
  return x_BHWC, np.full(count, 0.5, np.float32)


def test_padding_is_not_read_and_the_order_of_tokens_is():
  params = network("mmdit")[2][text.GROUP]
  program = jax.jit(functools.partial(text.apply, ENCODER, params))

  def encode(*caption):
    return jax.device_get(program(*caption))

  cond = told([2, 3], [3, 2])
  text_BLE, pooled_BP = encode(cond["token"], cond["token_mask"])
  assert text_BLE.shape == (2, TOKENS, WIDTH) and pooled_BP.shape == (2, WIDTH)
  other_BL = np.where(cond["token_mask"], cond["token"], 6)
  again_BLE, again_BP = encode(other_BL, cond["token_mask"])
  np.testing.assert_allclose(again_BP, pooled_BP, atol=1e-6)
  np.testing.assert_allclose(again_BLE[:, :3], text_BLE[:, :3], atol=1e-6)
  assert np.abs(pooled_BP[0] - pooled_BP[1]).max() > 1e-3


@pytest.mark.slow(1)
@pytest.mark.parametrize("name", NETWORKS)
def test_the_network_is_told_what_the_encoder_says(name):
  bare, net, params = network(name)
  x_BHWC, t_B = images(2)
  cond = told([2, 3], [4])
  text_BLE, pooled_BP = jax.jit(functools.partial(text.apply, ENCODER))(
    params[text.GROUP], cond["token"], cond["token_mask"]
  )
  own = {key: params[key] for key in params if key != text.GROUP}
  wanted = {
    "text": text_BLE,
    "pooled": pooled_BP,
    "text_mask": cond["token_mask"],
  }
  np.testing.assert_array_equal(
    jax.jit(net.apply)(params, x_BHWC, t_B, cond),
    jax.jit(bare.apply)(own, x_BHWC, t_B, wanted),
  )
  assert net.own(params).keys() == own.keys()
  found = jax.jit(net.told)(params, {**cond, "negative": told([2], [2])})
  assert found.keys() == {*wanted, "negative"}
  assert found["negative"].keys() == wanted.keys()


@pytest.mark.slow(1)
def test_a_gradient_reaches_every_parameter_of_the_encoder():
  """All of what it says is in what any network answers, as is seen above."""
  _, net, params = network("mmdit")
  x_BHWC, t_B = images(2)

  def loss(params):
    return jnp.sum(
      jnp.square(net.apply(params, x_BHWC, t_B, told([2, 3], [4, 5, 6])))
    )

  grads = jax.jit(jax.grad(loss))(params)
  assert text.GROUP in grads
  for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
    assert np.abs(leaf).max() > 0.0, jax.tree_util.keystr(path)


@pytest.mark.slow(1)
def test_without_a_condition_the_caption_is_empty():
  _, net, params = network("mmdit")
  cond, empty = told([2, 3], [4]), told([], [])
  for key, value in net.unconditional(cond).items():
    np.testing.assert_array_equal(value, empty[key])
  negative = told([5], [5])
  away = net.unconditional({**cond, "negative": negative})
  np.testing.assert_array_equal(away["token"], negative["token"])
  # In training some lose their caption, each by itself, and no others.
  many = told(*[[2, 3]] * 64)
  dropped = jax.device_get(jax.jit(net.dropped)(many, jax.random.key(0)))
  lost_B = dropped["token"][:, 0] == 1
  assert 16 < lost_B.sum() < 48
  np.testing.assert_array_equal(
    dropped["token_mask"].sum(axis=1), 3 - 2 * lost_B
  )
  x_BHWC, t_B = images(64)
  rng = jax.random.key(0)
  apply = jax.jit(net.apply)
  np.testing.assert_allclose(
    apply(params, x_BHWC, t_B, many, rng),
    apply(params, x_BHWC, t_B, dropped),
    atol=1e-6,
  )


def test_a_network_without_some_blocks_is_told_the_same():
  _, net, params = network("mmdit")
  x_BHWC, t_B = images(2)
  shallow = jax.jit(models.without_layers(net, [0]))
  one, other = (
    np.asarray(shallow(params, x_BHWC, t_B, told(row, row)))
    for row in ([2], [3])
  )
  assert np.abs(one - other).max() > 1e-3


def test_its_arithmetic_is_counted():
  params = jax.eval_shape(lambda: text.init(ENCODER, jax.random.key(0)))
  token_BL = jax.ShapeDtypeStruct((1, TOKENS), jnp.int32)
  mask_BL = jax.ShapeDtypeStruct((1, TOKENS), jnp.bool_)
  found = counted.of(
    functools.partial(text.apply, ENCODER), params, token_BL, mask_BL
  )
  assert found.flops == text.flops(ENCODER)


@pytest.mark.parametrize(
  ("config", "changed", "said"),
  [
    (dit.DiTConfig(**IMAGES, width=16, heads=2, depth=1), {}, "reads no text"),
    (NETWORKS["mmdit"], dict(width=16), "width = 16 must be that"),
    (NETWORKS["mmdit"], dict(tokens=4), "tokens = 4 and"),
  ],
)
def test_an_encoder_that_does_not_suit_the_network_is_refused(
  config, changed, said
):
  encoder = dataclasses.replace(ENCODER, **changed)
  with pytest.raises(ValueError, match=said):
    models.with_text_encoder(models.build(config), encoder, EMPTY)


def test_what_is_not_a_caption_is_named():
  _, net, params = network("mmdit")
  x_BHWC, t_B = images(1)
  with pytest.raises(ValueError, match=r"got the keys \['label'\]"):
    net.apply(params, x_BHWC, t_B, {"label": np.zeros(1, np.int32)})
  long = {key: np.ones((1, 9), int) for key in ("token", "token_mask")}
  with pytest.raises(ValueError, match=r"\[B, 5\], not \(1, 9\)"):
    net.apply(params, x_BHWC, t_B, long)
