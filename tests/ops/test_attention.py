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
  mask = rng.random((batch, keys)) < 0.6
  mask[:, 0] = True
  return q, k, v, mask


def naive(q, k, v, mask=None):
  """Attends by sums of products, heads last, without any trick."""
  score_BTSN = jnp.sum(q[:, :, None] * k[:, None], -1) / np.sqrt(q.shape[-1])
  if mask is not None:
    score_BTSN = jnp.where(mask[:, None, :, None], score_BTSN, -1e9)
  weight_BTSN = jax.nn.softmax(score_BTSN, axis=2)
  return jnp.sum(weight_BTSN[..., None] * v[:, None], axis=2)


@functools.partial(jax.jit, static_argnums=0)
def both(function, q, k, v, mask):
  """Returns the value and the gradients of an uneven sum of it."""
  y, pull = jax.vjp(lambda q, k, v: function(q, k, v, mask), q, k, v)
  return y, pull(jnp.cos(jnp.arange(float(y.size))).reshape(y.shape))


def xla(q, k, v, mask=None):
  return attention.attention(q, k, v, body="xla", mask_BS=mask)


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
  hidden[:, 4] = False
  changed = xla(q, k.at[:, 4].set(50.0), v.at[:, 4].set(-3.0), hidden)
  np.testing.assert_array_equal(changed, xla(q, k, v, hidden))


def test_an_example_that_sees_nothing_gets_zeros_and_finite_gradients():
  q, k, v, mask = draw()
  blind = mask.copy()
  blind[1] = False
  y, gradients = both(xla, q, k, v, blind)
  assert jnp.all(y[1] == 0.0) and jnp.all(y[0] != 0.0)
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


def test_auto_is_xla_on_a_cpu_and_says_so_once(caplog):
  q, k, v, mask = draw()
  attention._say.cache_clear()
  with caplog.at_level("INFO"):
    auto = attention.attention(q, k, v, mask_BS=mask)
    attention.attention(q, k, v)
  np.testing.assert_array_equal(auto, xla(q, k, v, mask))
  assert [record.getMessage() for record in caplog.records] == [
    "attention='auto' is 'xla': there is no fused kernel for cpu."
  ]


def test_unknown_body_is_refused():
  q, k, v, _ = draw()
  with pytest.raises(ValueError, match="'flash'.*auto, xla, blockwise, cudnn"):
    attention.attention(q, k, v, body="flash")


def device(platform, capability="9.0"):
  return types.SimpleNamespace(platform=platform, compute_capability=capability)


@pytest.mark.parametrize(
  "platform, dtype, keys, body, why",
  [
    ("tpu", jnp.bfloat16, 1024, "splash", "1024 keys"),
    ("tpu", jnp.bfloat16, 1023, "xla", "1023 keys are few"),
    ("tpu", jnp.float16, 1024, "xla", "not float16"),
    ("gpu", jnp.bfloat16, 7, "cudnn", "fused kernel"),
    ("gpu", jnp.float32, 7, "xla", "not float32"),
  ],
)
def test_auto_chooses_by_platform_and_shape(
  monkeypatch, caplog, platform, dtype, keys, body, why
):
  taken = []
  for name in attention._ALONE:
    monkeypatch.setitem(
      attention._ALONE, name, lambda *a, name=name: taken.append(name) or a[0]
    )
  monkeypatch.setattr(attention.xla, "attend", attention._ALONE["xla"])
  monkeypatch.setattr(jax, "devices", lambda: [device(platform)])
  monkeypatch.setattr(attention.cudnn, "_missing", lambda: None)
  attention._say.cache_clear()
  q, k, v, _ = draw(keys=keys, dtype=dtype)
  with caplog.at_level("INFO"):
    attention.attention(q, k, v)
  assert taken == [body]
  assert f"is '{body}'" in caplog.text and why in caplog.text


@pytest.mark.parametrize(
  "body, says",
  [
    ("cudnn", "needs an NVIDIA GPU.*runs on cpu.*Use 'auto'"),
    ("splash", "needs a TPU.*runs on cpu.*Use 'auto'"),
  ],
)
def test_a_fused_body_that_cannot_run_says_why_not(body, says):
  q, k, v, _ = draw(dtype=jnp.bfloat16)
  with pytest.raises(ValueError, match=f"attention='{body}' cannot.*{says}"):
    attention.attention(q, k, v, body=body)


@pytest.mark.parametrize(
  "body, platform, capability, dtype, head_size, obstacle",
  [
    ("cudnn", "gpu", "9.0", jnp.bfloat16, 72, None),
    ("cudnn", "gpu", "9.0", jnp.float16, 256, None),
    ("cudnn", "cuda", "8.0", jnp.bfloat16, 128, None),
    ("cudnn", "gpu", "10.0", jnp.bfloat16, 256, None),
    ("cudnn", "gpu", "8.0", jnp.bfloat16, 256, "up to 128"),
    ("cudnn", "gpu", "9.0", jnp.bfloat16, 264, "up to 256"),
    ("cudnn", "gpu", "9.0", jnp.bfloat16, 36, "multiples of 8"),
    ("cudnn", "gpu", "9.0", jnp.float32, 64, "not float32"),
    ("cudnn", "tpu", "9.0", jnp.bfloat16, 64, "runs on tpu"),
    ("splash", "tpu", None, jnp.bfloat16, 72, None),
    ("splash", "tpu", None, jnp.float16, 64, "not float16"),
    ("splash", "gpu", "9.0", jnp.bfloat16, 64, "runs on gpu"),
    ("xla", "cpu", None, jnp.float32, 7, None),
    ("ring", "cpu", None, jnp.float32, 7, None),
  ],
)
def test_what_keeps_a_body_from_running(
  monkeypatch, body, platform, capability, dtype, head_size, obstacle
):
  found = device(platform, capability)
  monkeypatch.setattr(jax, "devices", lambda: [found])
  monkeypatch.setattr(attention.cudnn, "_missing", lambda: None)
  queries = jax.ShapeDtypeStruct((1, 4, 2, head_size), dtype)
  said = attention.obstacle(body, queries)
  assert (said is None) if obstacle is None else (obstacle in said)


def test_what_is_compiled_for_a_gpu_elsewhere_needs_its_library(monkeypatch):

  def missing(*_, implementation):
    raise RuntimeError("cuDNN is not detected.")

  monkeypatch.setattr(jax, "devices", lambda: [device("gpu")])
  monkeypatch.setattr(jax.nn, "dot_product_attention", missing)
  queries = jax.ShapeDtypeStruct((1, 4, 2, 64), jnp.bfloat16)
  said = attention.obstacle("cudnn", queries)
  assert said == (
    "its library is not on this machine (cuDNN is not detected.)."
  )


@pytest.mark.parametrize("keys, body", [(7, "xla"), (1024, "blockwise")])
def test_where_derivatives_go_forward_auto_can(monkeypatch, keys, body):
  tpu = types.SimpleNamespace(platform="tpu")
  monkeypatch.setattr(jax, "devices", lambda: [tpu])
  q = jnp.zeros((1, keys, 2, 8))
  with attention.forward_mode():
    assert attention._alone(q, keys)[0] == body
    with pytest.raises(ValueError, match="'splash' cannot run: .*goes forward"):
      attention.attention(q, q, q, body="splash")
  assert attention.obstacle("ring", q) is None
