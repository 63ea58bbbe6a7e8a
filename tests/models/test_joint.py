"""What two streams do to each other, and what they do not."""

# Shape suffixes: B batch, L text tokens, T image tokens, N heads, H head size,
# D width.

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowjax.models import blocks, joint, positions
from flowjax.ops import attention

WIDTH, HEADS, HEAD_SIZE = 32, 4, 8
LENGTH, TOKENS = 3, 6
NEITHER = (None, None), (None, None)  # ropes and masks


def heads(tokens, seed):
  """Draws queries, keys and values."""
  rng = np.random.default_rng(seed)
  shape = (3, 2, tokens, HEADS, HEAD_SIZE)
  return tuple(rng.standard_normal(shape, np.float32))


def both():
  return heads(LENGTH, 0), heads(TOKENS, 1)


@jax.jit
def attend(text, image, text_mask_BL=None):
  return joint.attend(text, image, body="xla", masks=(text_mask_BL, None))


def test_attention_is_that_of_one_sequence_with_the_text_first():
  text, image = both()
  y_text, y_image = attend(text, image)
  q, k, v = (
    np.concatenate(pair, axis=1) for pair in zip(text, image, strict=True)
  )
  whole = jax.jit(functools.partial(attention.attention, body="xla"))
  wanted = np.asarray(whole(q, k, v))
  np.testing.assert_allclose(y_text, wanted[:, :LENGTH], atol=1e-6)
  np.testing.assert_allclose(y_image, wanted[:, LENGTH:], atol=1e-6)


def test_a_masked_token_of_text_is_as_if_it_were_not_there():
  text, image = both()
  mask_BL = np.array([[True, False, True], [True, True, False]])
  y_text, y_image = jax.device_get(attend(text, image, mask_BL))
  for b, mask_L in enumerate(mask_BL):
    short = tuple(x[b : b + 1, mask_L] for x in text)
    alone = tuple(x[b : b + 1] for x in image)
    wanted_text, wanted_image = attend(short, alone)
    np.testing.assert_allclose(y_text[b, mask_L], wanted_text[0], atol=1e-6)
    np.testing.assert_allclose(y_image[b], wanted_image[0], atol=1e-6)


def block(**changes):
  sizes = dict(
    width=WIDTH,
    heads=HEADS,
    head_size=HEAD_SIZE,
    mlp_width=48,
    qk_norm=True,
    body="xla",
    dtype=jnp.float32,
  )
  return joint.JointBlock(**{**sizes, **changes})


def inputs():
  rng = np.random.default_rng(0)
  streams = tuple(
    rng.standard_normal((2, tokens, WIDTH), np.float32)
    for tokens in (LENGTH, TOKENS)
  )
  return streams, rng.standard_normal((2, WIDTH), np.float32)


def parameters(module):
  rng = np.random.default_rng(1)
  shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs(), *NEITHER)
  return jax.tree.map(
    lambda leaf: 0.2 * rng.standard_normal(leaf.shape).astype(np.float32),
    shapes,
  )


@functools.lru_cache
def asked(module):
  @jax.jit
  def program(params, streams, c_BD, ropes):
    return module.apply(params, streams, c_BD, ropes, (None, None))[0]

  return lambda *given: jax.device_get(program(*given))


def test_turning_both_streams_is_turning_the_sequence():
  """So that positions of any kind are the affair of who calls."""
  rope = positions.rope2d(1, LENGTH + TOKENS, HEAD_SIZE, 10.0)
  text_rope, image_rope = (
    tuple(table[part] for table in rope)
    for part in (slice(LENGTH), slice(LENGTH, None))
  )
  streams, _ = inputs()
  maps = joint.Attention(WIDTH, HEADS, HEAD_SIZE, True, jnp.float32)
  init = functools.partial(maps.init, method=joint.Attention.ask)
  params = jax.jit(init)(jax.random.key(0, impl="rbg"), streams[0], None)
  program = jax.jit(
    functools.partial(maps.apply, params, method=joint.Attention.ask)
  )

  def ask(stream, rope):
    return jax.device_get(program(stream, rope))

  together = ask(np.concatenate(streams, axis=1), rope)
  for i, (stream, turn) in enumerate(
    zip(streams, (text_rope, image_rope), strict=True)
  ):
    part = slice(LENGTH, None) if i else slice(LENGTH)
    for ours, wanted in zip(ask(stream, turn), together, strict=True):
      np.testing.assert_allclose(ours, wanted[:, part], atol=1e-6)


@pytest.mark.parametrize("of", ["text", "image"])
def test_each_stream_turns_by_its_own_positions(of):
  module = block()
  params, rest = parameters(module), inputs()
  tokens = LENGTH if of == "text" else TOKENS
  turned = positions.rope2d(1, tokens, HEAD_SIZE, 10.0)
  still = np.ones_like(turned[0]), np.zeros_like(turned[1])

  def with_rope(rope):
    ropes = (rope, None) if of == "text" else (None, rope)
    return asked(module)(params, *rest, ropes)

  plain = asked(module)(params, *rest, (None, None))
  for unmoved, moved, wanted in zip(
    with_rope(still), with_rope(turned), plain, strict=True
  ):
    np.testing.assert_allclose(unmoved, wanted, atol=1e-5)
    assert np.abs(moved - wanted).max() > 1e-3


def test_the_second_attention_is_among_the_image_alone():
  module = block(second=True)
  params, rest = parameters(module), inputs()
  # Only the gate of the second attention of the image is open.
  for stream in ("text", "image"):
    modulation = params["params"][stream]["modulation"]
    for name in ("kernel", "bias"):
      value = modulation[name]
      if stream == "text":
        value[:] = 0.0
      else:
        value[..., (2, 5), :] = 0.0
  (text_BLD, image_BTD), c_BD = rest
  out_text, out_image = asked(module)(params, *rest, (None, None))
  np.testing.assert_array_equal(out_text, text_BLD)
  assert np.abs(out_image - image_BTD).max() > 0.1
  other = asked(module)(params, (2 * text_BLD, image_BTD), c_BD, (None, None))
  np.testing.assert_array_equal(other[1], out_image)
  # It reads the whole image: a token hears of another.
  moved_BTD = image_BTD.copy()
  moved_BTD[:, 0] *= -1.0
  moved = asked(module)(params, (text_BLD, moved_BTD), c_BD, (None, None))
  assert np.all(np.abs(moved[1] - out_image)[:, 1:].max(axis=-1) > 1e-5)


def test_text_is_seen_in_the_last_block_and_goes_no_further():
  module = block(last=True)
  params, rest = parameters(module), inputs()
  assert set(params["params"]["text"]) == {"modulation", "attention"}
  assert set(params["params"]["text"]["attention"]) == {
    *("qkv", "query_norm", "key_norm")
  }
  (text_BLD, image_BTD), c_BD = rest
  out_text, out_image = asked(module)(params, *rest, (None, None))
  np.testing.assert_array_equal(out_text, text_BLD)
  other = asked(module)(
    params, (text_BLD[:, ::-1] + 1.0, image_BTD), c_BD, (None, None)
  )
  # A norm without parameters does not see that the whole is shifted, and
  # attention without positions does not see an order.
  np.testing.assert_allclose(other[1], out_image, atol=1e-5)
  other = asked(module)(params, (text_BLD**2, image_BTD), c_BD, (None, None))
  assert np.abs(other[1] - out_image).max() > 1e-3


@functools.lru_cache
def stacked(remat):
  """Returns what two blocks make, and the gradient of an uneven sum of it."""
  sizes = dict(width=WIDTH, heads=HEADS, head_size=HEAD_SIZE, mlp_width=48)
  stack = joint.repeated(joint.JointBlock, 2, scan=True, remat=remat)(
    **sizes, qk_norm=True, body="xla", dtype=jnp.float32
  )

  def scalar(params):
    streams, _ = stack.apply(params, *inputs(), *NEITHER)
    whole = jnp.concatenate(streams, axis=1)
    weight = jnp.cos(jnp.arange(float(whole.size))).reshape(whole.shape)
    return jnp.sum(weight * whole), streams

  params = parameters(stack)
  return params, *jax.jit(jax.grad(scalar, has_aux=True))(params)


@pytest.mark.slow(1)
def test_repeated_blocks_are_blocks_one_after_the_other():
  params, _, wanted = stacked("none")
  streams, c_BD = inputs()
  for layer in range(2):
    one = jax.tree.map(lambda leaf, i=layer: leaf[i], params)
    streams = asked(block())(one, streams, c_BD, (None, None))
  for ours, theirs in zip(streams, wanted, strict=True):
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


@pytest.mark.slow(1)
@pytest.mark.parametrize(
  "remat", [key for key in blocks.REMAT if key != "none"]
)
def test_every_remat_policy_gives_the_same(remat):
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max()),
    stacked(remat),
    stacked("none"),
  )


def test_remade_blocks_are_the_same_class_where_all_is_kept():
  assert joint.remade(joint.JointBlock, "none") is joint.JointBlock
  assert issubclass(joint.remade(joint.JointBlock, "full"), nn.Module)
