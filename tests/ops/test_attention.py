# Shape suffixes: B batch, T queries, S keys, N heads, H head size.

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowjax.ops import attention


def draw(batch=2, queries=7, keys=7, heads=3, head_size=8, dtype=np.float32):
  rng = np.random.default_rng(0)
  q, k, v = (
    jnp.asarray(rng.standard_normal((batch, n, heads, head_size)), dtype)
    for n in (queries, keys, keys)
  )
  mask = rng.random((batch, queries, keys)) < 0.6
  mask[:, :, 0] = True
  return q, k, v, mask


def naive(q, k, v, mask=None):
  """Attends by sums of products, heads last, without any trick."""
  score_BTSN = jnp.sum(q[:, :, None] * k[:, None], -1) / np.sqrt(q.shape[-1])
  if mask is not None:
    score_BTSN = jnp.where(mask[..., None], score_BTSN, -1e9)
  weight_BTSN = jax.nn.softmax(score_BTSN, axis=2)
  return jnp.sum(weight_BTSN[..., None] * v[:, None], axis=2)


@functools.partial(jax.jit, static_argnums=0)
def both(function, q, k, v, mask):
  """Returns the value and the gradients of an uneven sum of it."""
  y, pull = jax.vjp(lambda q, k, v: function(q, k, v, mask), q, k, v)
  return y, pull(jnp.cos(jnp.arange(float(y.size))).reshape(y.shape))


def xla(q, k, v, mask=None):
  return attention.attention(q, k, v, body="xla", mask_BTS=mask)


@pytest.mark.parametrize(
  "queries, keys, masked",
  [(7, 7, False), (5, 13, False), (5, 13, True), (16, 8, True), (1, 3, True)],
)
def test_xla_agrees_with_the_naive_one(queries, keys, masked):
  q, k, v, mask = draw(queries=queries, keys=keys)
  mask = mask if masked else None
  (y, ours), (wanted_y, wanted) = (both(f, q, k, v, mask) for f in (xla, naive))
  np.testing.assert_allclose(y, wanted_y, atol=2e-6)
  for a, b in zip(ours, wanted, strict=True):
    np.testing.assert_allclose(a, b, atol=5e-6)


def test_a_hidden_key_has_no_influence():
  q, k, v, mask = draw()
  hidden = mask.copy()
  hidden[:, :, 4] = False
  changed = xla(q, k.at[:, 4].set(50.0), v.at[:, 4].set(-3.0), hidden)
  np.testing.assert_array_equal(changed, xla(q, k, v, hidden))


def test_a_query_that_sees_nothing_gets_zeros_and_finite_gradients():
  q, k, v, mask = draw()
  blind = mask.copy()
  blind[0, 2] = False
  y, gradients = both(xla, q, k, v, blind)
  assert jnp.all(y[0, 2] == 0.0)
  for array in (y, *gradients):
    assert jnp.all(jnp.isfinite(array))


def test_huge_scores_do_not_overflow():
  q, k, v, _ = draw()
  y = xla(1e4 * q, 1e4 * k, v)
  nearest = jnp.argmax(jnp.einsum("btnh,bsnh->bnts", q, k), axis=-1)
  picked = jnp.take_along_axis(
    v.transpose(0, 2, 1, 3), nearest[..., None], axis=2
  )
  np.testing.assert_allclose(y, picked.transpose(0, 2, 1, 3), atol=1e-5)


def test_bfloat16_is_close_and_keeps_its_dtype():
  q, k, v, _ = draw(dtype=jnp.bfloat16)
  y = xla(q, k, v)
  assert y.dtype == jnp.bfloat16
  exact = naive(*(x.astype(jnp.float32) for x in (q, k, v)))
  np.testing.assert_allclose(y.astype(jnp.float32), exact, atol=2e-2)


def test_xla_can_be_differentiated_forwards_and_twice():
  q, k, v, _ = draw(queries=3, keys=3, heads=1, head_size=4)

  def scalar(function, q):
    return jnp.sum(jnp.sin(function(q, k, v)))

  @functools.partial(jax.jit, static_argnums=0)
  def curvature(function):
    slope = jax.grad(lambda q: scalar(function, q))
    return jax.jvp(slope, (q,), (jnp.ones_like(q),))[1]

  np.testing.assert_allclose(curvature(xla), curvature(naive), atol=1e-5)


def test_xla_keeps_only_queries_keys_and_values():
  q, k, v, _ = draw(queries=64, keys=64)
  kept = jax.eval_shape(lambda *qkv: jax.vjp(xla, *qkv)[1], q, k, v)
  largest = max(leaf.size for leaf in jax.tree.leaves(kept))
  assert largest <= q.size < 64 * 64 * 3 * 2


def test_auto_is_xla_on_a_cpu():
  q, k, v, mask = draw()
  auto = attention.attention(q, k, v, mask_BTS=mask)
  np.testing.assert_array_equal(auto, xla(q, k, v, mask))


def test_cudnn_on_a_cpu_says_why_not():
  q, k, v, _ = draw(dtype=jnp.bfloat16)
  with pytest.raises(
    ValueError, match="needs an NVIDIA GPU.*runs on cpu.*auto"
  ):
    attention.attention(q, k, v, body="cudnn")


def test_unknown_body_is_refused():
  q, k, v, _ = draw()
  with pytest.raises(ValueError, match="'flash'.*auto, xla, cudnn"):
    attention.attention(q, k, v, body="flash")


@pytest.mark.parametrize(
  "capability, dtype, head_size, obstacle",
  [
    ("9.0", jnp.bfloat16, 72, None),
    ("9.0", jnp.float16, 256, None),
    ("8.0", jnp.bfloat16, 128, None),
    ("10.0", jnp.bfloat16, 256, None),
    ("8.0", jnp.bfloat16, 256, "up to 128"),
    ("9.0", jnp.bfloat16, 264, "up to 256"),
    ("9.0", jnp.bfloat16, 36, "multiples of 8"),
    ("9.0", jnp.float32, 64, "not float32"),
  ],
)
def test_what_the_fused_kernel_takes(
  monkeypatch, capability, dtype, head_size, obstacle
):
  gpu = types.SimpleNamespace(platform="gpu", compute_capability=capability)
  monkeypatch.setattr(jax, "devices", lambda: [gpu])
  said = attention.cudnn_obstacle(
    jax.ShapeDtypeStruct((1, 4, 2, head_size), dtype)
  )
  assert (said is None) if obstacle is None else (obstacle in said)


def test_on_a_gpu_auto_takes_the_fused_kernel_with_the_mask(monkeypatch):
  q, k, v, mask = draw(dtype=jnp.bfloat16)
  gpu = types.SimpleNamespace(platform="gpu", compute_capability="9.0")
  calls = []
  monkeypatch.setattr(jax, "devices", lambda: [gpu])
  monkeypatch.setattr(
    jax.nn,
    "dot_product_attention",
    lambda q, k, v, *, mask, implementation: calls.append(
      (mask.shape, implementation)
    ),
  )
  attention.attention(q, k, v, mask_BTS=mask)
  assert calls == [((2, 1, 7, 7), "cudnn")]
