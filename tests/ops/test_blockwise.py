"""Attention in blocks: as exact as by the whole matrix, without it."""

# Shape suffixes: B batch, T queries, S keys, N heads, H head size.

import functools

import jax
import jax.extend.core as core
import jax.numpy as jnp
import numpy as np
import pytest

from flowjax.ops import attention
from flowjax.ops.attention import blockwise


@pytest.fixture(autouse=True, scope="module")
def _small_blocks():
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(blockwise, "BLOCK", 16)
    yield


def draw(queries, keys, masked=True, batch=2, dtype=np.float32):
  rng = np.random.default_rng(0)
  q, k, v = (
    jnp.asarray(rng.standard_normal((batch, n, 2, 8)), dtype)
    for n in (queries, keys, keys)
  )
  mask = rng.random((batch, keys)) < 0.6
  mask[1:] = False
  return (q, k, v), jnp.asarray(mask) if masked else None


def gradient(body, qkv, mask):
  """Returns the value, and the gradient of an uneven sum of it."""
  attend = functools.partial(attention.attention, body=body, mask_BS=mask)
  y, pull = jax.vjp(attend, *qkv)
  weight = jnp.cos(jnp.arange(float(y.size))).reshape(y.shape)
  return y, pull(weight.astype(y.dtype))


def tangent(body, qkv, mask):
  attend = functools.partial(attention.attention, body=body, mask_BS=mask)
  return jax.jvp(attend, qkv, tuple(jnp.sin(3.0 * x) for x in qkv))


def gradient_of_tangent(body, qkv, mask):
  return jax.grad(lambda qkv: jnp.sum(jnp.cos(tangent(body, qkv, mask)[1])))(
    qkv
  )


def tangent_of_gradient(body, qkv, mask):
  slope = functools.partial(gradient, body, mask=mask)
  return jax.jvp(slope, (qkv,), (tuple(jnp.sin(3.0 * x) for x in qkv),))[1]


@functools.partial(jax.jit, static_argnums=(0, 1))
def run(derivative, body, qkv, mask):
  return derivative(body, qkv, mask)


@pytest.mark.slow(1)
@pytest.mark.parametrize(
  "derivative, queries, keys, masked",
  [
    # Fewer than a block, whole blocks, blocks to be filled; the second
    # example of a mask sees nothing.
    (gradient, 5, 3, False),
    (gradient, 32, 48, False),
    (gradient, 37, 50, True),
    (tangent, 37, 49, False),
    (gradient_of_tangent, 20, 33, True),
    (tangent_of_gradient, 20, 33, True),
  ],
)
def test_every_derivative_is_that_of_the_whole_matrix(
  derivative, queries, keys, masked
):
  inputs = draw(queries, keys, masked)
  found, wanted = (
    run(derivative, body, *inputs) for body in ("blockwise", "xla")
  )
  assert any(np.abs(leaf).max() > 0.1 for leaf in jax.tree.leaves(wanted))
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5)


def test_huge_scores_do_not_overflow():
  (q, k, v), _ = draw(5, 50, masked=False)
  found, wanted = (
    run(tangent, body, (1e4 * q, 1e4 * k, v), None)[0]
    for body in ("blockwise", "xla")
  )
  np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_bfloat16_is_close_and_keeps_its_dtype():
  qkv, _ = draw(37, 50, masked=False, dtype=jnp.bfloat16)
  exact = jax.tree.map(lambda x: x.astype(jnp.float32), qkv)
  found = run(gradient, "blockwise", qkv, None)
  wanted = run(gradient, "xla", exact, None)
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
    assert a.dtype == jnp.bfloat16
    np.testing.assert_allclose(a.astype(np.float32), b, atol=3e-2)


@pytest.mark.parametrize(
  "derivative", [gradient, tangent, gradient_of_tangent, tangent_of_gradient]
)
def test_no_array_is_as_large_as_the_matrix(derivative):
  """Of 128 x 128 scores, at most 16 x 16 of each head are there at a time."""
  inputs = draw(128, 128, masked=False, batch=1)

  def largest(body):
    program = jax.make_jaxpr(functools.partial(derivative, body))(*inputs)
    return max(
      variable.aval.size
      for jaxpr in _nested(program.jaxpr)
      for equation in jaxpr.eqns
      for variable in equation.outvars
    )

  assert largest("blockwise") <= 4 * inputs[0][0].size < largest("xla")


def _nested(jaxpr):
  yield jaxpr
  for inner in core.subjaxprs(jaxpr):
    yield from _nested(inner)


@pytest.mark.slow
@pytest.mark.parametrize("derivative", [gradient, gradient_of_tangent])
def test_memory_grows_with_the_tokens_and_not_with_their_square(derivative):
  def temporary(body, tokens):
    inputs = draw(tokens, tokens, masked=False, batch=1)
    program = run.lower(derivative, body, *inputs).compile()
    return program.memory_analysis().temp_size_in_bytes

  some, many = (temporary("blockwise", n) for n in (256, 512))
  assert many < 2.1 * some and temporary("xla", 512) > 6.0 * many
