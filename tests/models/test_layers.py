# Shape suffixes: B batch, T tokens, D width.

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowjax.models import layers, patches


def draw(*shape):
  return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def test_dense_keeps_parts_apart():
  x = draw(2, 5, 4)
  dense = layers.Dense((3, 2, 6))
  params = jax.jit(dense.init)(jax.random.key(0), x)["params"]
  assert params["kernel"].shape == (4, 3, 2, 6)
  params["bias"] = draw(3, 2, 6)
  y = jax.jit(dense.apply)({"params": params}, x)
  wanted = np.einsum("btd,dknh->btknh", x, params["kernel"]) + params["bias"]
  np.testing.assert_allclose(y, wanted, atol=1e-5)


def test_dense_contracts_several_dims():
  x = draw(2, 5, 3, 4)
  dense = layers.Dense((6,), contract=2)
  params = jax.jit(dense.init)(jax.random.key(0), x)["params"]
  assert params["kernel"].shape == (3, 4, 6)
  y = jax.jit(dense.apply)({"params": params}, x)
  wanted = np.einsum("btnh,nhd->btd", x, params["kernel"])
  np.testing.assert_allclose(y, wanted, atol=1e-5)


def test_dense_multiplies_rows_of_tokens():
  x = jnp.zeros((2, 5, 4))
  dense = layers.Dense((8,))
  params = dense.init(jax.random.key(0), x)
  text = str(jax.make_jaxpr(dense.apply)(params, x))
  assert "f32[10,8] = dot_general" in text


def test_xavier_is_of_the_flattened_matrix():
  kernel = layers.xavier(jax.random.key(0), (48, 3, 4, 16), 48)
  limit = np.sqrt(6 / (48 + 3 * 4 * 16))
  assert np.abs(kernel).max() <= limit
  assert np.isclose(np.std(kernel), limit / np.sqrt(3), rtol=0.02)


def test_modulated_norm_is_the_norm_then_the_modulation():
  x, (shift, scale) = draw(2, 5, 8) * 3 + 1, draw(2, 2, 8)
  y = jax.jit(layers.modulated_norm)(x, shift, scale)
  mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
  normed = (x - mean) / np.sqrt(variance + 1e-6)
  wanted = normed * (1 + scale[:, None]) + shift[:, None]
  np.testing.assert_allclose(y, wanted, atol=1e-5)


def test_norms_of_bfloat16_are_computed_in_float32():
  # 256 +- 1 in bfloat16: a mean taken in bfloat16 would lose the signal.
  x = jnp.asarray(256.0 + 2.0 * np.sign(draw(1, 4, 64)), jnp.bfloat16)
  zero = jnp.zeros((1, 64), jnp.bfloat16)
  y = jax.jit(layers.modulated_norm)(x, zero, zero)
  assert y.dtype == jnp.bfloat16
  exact = jax.jit(layers.modulated_norm)(
    x.astype(jnp.float32), zero.astype(jnp.float32), zero.astype(jnp.float32)
  )
  np.testing.assert_array_equal(y, exact.astype(jnp.bfloat16))


def assert_rounded_once(y, exact):
  """Holds a bfloat16 to half its last digit, at values near 0 to 1e-6."""
  assert y.dtype == jnp.bfloat16
  _, exponent = np.frexp(exact)
  bound = np.maximum(1.01 * np.ldexp(1.0, exponent - 9), 1e-6)
  np.testing.assert_array_less(np.abs(np.float64(y) - exact), bound)


# Op by op: where XLA fuses, it keeps digits that the code would drop.
def test_an_rms_norm_of_bfloat16_is_rounded_once():
  x, scale = jnp.asarray(3 * draw(4, 8, 64), jnp.bfloat16), 1 + draw(64)
  y = layers.RMSNorm().apply({"params": {"scale": scale}}, x)
  x64 = np.float64(x)
  mean_square = np.mean(x64**2, axis=-1, keepdims=True)
  assert_rounded_once(y, scale * x64 / np.sqrt(mean_square + 1e-6))


@pytest.mark.parametrize("kind", layers.NORMS)
def test_a_modulated_norm_of_bfloat16_is_rounded_once(kind):
  x, shift, scale = (
    jnp.asarray(v, jnp.bfloat16) for v in (3 * draw(4, 8, 64), *draw(2, 4, 64))
  )
  params, weight, x64 = {}, 1.0, np.float64(x)
  if kind == "rmsnorm":
    params["scale"] = weight = 1 + draw(64)
  else:
    x64 = x64 - x64.mean(axis=-1, keepdims=True)
  y = layers.ModulatedNorm(kind).apply({"params": params}, x, shift, scale)
  mean_square = np.mean(x64**2, axis=-1, keepdims=True)
  normed = weight * x64 / np.sqrt(mean_square + 1e-6)
  shift64, scale64 = (np.float64(v)[:, None] for v in (shift, scale))
  assert_rounded_once(y, normed * (1 + scale64) + shift64)


def test_rms_norm_has_unit_mean_square_times_scale():
  x = draw(2, 5, 3, 8) * 7
  scale = draw(8)
  y = jax.jit(layers.RMSNorm().apply)({"params": {"scale": scale}}, x)
  wanted = scale * x / np.sqrt(np.mean(x**2, -1, keepdims=True) + 1e-6)
  np.testing.assert_allclose(y, wanted, atol=1e-5)


def test_add_gated_adds_in_float32():
  x, y = draw(2, 5, 8), draw(2, 5, 8)[::-1]
  gate = draw(2, 8)
  np.testing.assert_allclose(
    jax.jit(layers.add_gated)(x, gate, y), x + gate[:, None] * y, atol=1e-6
  )
  # Rounded once: 1 + 1.5 * 0.0078125 in bfloat16, not with the product rounded.
  low = [jnp.asarray(v, jnp.bfloat16) for v in (x, gate, y)]
  exact = jax.jit(layers.add_gated)(*(v.astype(jnp.float32) for v in low))
  np.testing.assert_array_equal(
    jax.jit(layers.add_gated)(*low), exact.astype(jnp.bfloat16)
  )


def test_sinusoid_is_the_closed_form():
  t_B = np.asarray([0.0, 1.0, 333.3, 1000.0], np.float32)
  y = jax.jit(layers.sinusoid, static_argnums=1)(t_B, 256)
  frequency = 10000.0 ** (-np.arange(128) / 128)
  angle = t_B[:, None].astype(np.float64) * frequency
  wanted = np.concatenate([np.cos(angle), np.sin(angle)], axis=1)
  np.testing.assert_allclose(y, wanted, atol=2e-4)
  # The first frequency is 1 and the last is just short of 1 / 10000.
  assert np.isclose(y[1, 128], np.sin(1.0), atol=1e-6)


def test_epsilon_of_the_norm_counts_for_small_values():
  x = np.tile(np.asarray([1e-3, -1e-3], np.float32), (1, 1, 4))
  zero = np.zeros((1, 8), np.float32)
  y = jax.jit(layers.modulated_norm)(x, zero, zero)
  # The variance is as small as epsilon.
  np.testing.assert_allclose(np.abs(y), np.sqrt(0.5), rtol=1e-4)


@pytest.mark.parametrize("height, width, patch", [(4, 8, 2), (6, 3, 3)])
def test_patchify_orders_tokens_and_values(height, width, patch):
  x = draw(2, height, width, 3)
  y = patches.patchify(x, patch)
  columns = width // patch
  for token in range(y.shape[1]):
    row, column = divmod(token, columns)
    piece = x[:, row * patch :, column * patch :][:, :patch, :patch]
    np.testing.assert_array_equal(y[:, token], piece.reshape(2, -1))
  back = patches.unpatchify(y, height // patch, columns, patch)
  np.testing.assert_array_equal(back, x)


def test_an_rms_norm_is_scaled_and_then_modulated():
  rng = np.random.default_rng(5)
  x = rng.standard_normal((2, 3, 8), np.float32)
  weight, *modulation = rng.standard_normal((3, 8)).astype(np.float32)
  shift, scale = (np.stack([m, -m]) for m in modulation)
  norm = layers.ModulatedNorm("rmsnorm", 0.1)
  y = norm.apply({"params": {"scale": weight}}, x, shift, scale)
  expected = x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 0.1) * weight
  expected = expected * (1 + scale[:, None]) + shift[:, None]
  np.testing.assert_allclose(y, expected, atol=1e-5)


def test_the_last_frequency_is_where_the_shift_puts_it():
  # Of a long period, t w: the sine of the last wave at t = 1 is w itself.
  for shift, exponent in ((0.0, 127 / 128), (1.0, 1.0)):
    waves = layers.sinusoid(jnp.ones(1), 256, shift)
    np.testing.assert_allclose(waves[0, -1], 1e4**-exponent, rtol=1e-5)


def test_a_time_is_embedded_in_float32():
  # Between 996 and 1000 there is no bfloat16.
  t_B, width = np.asarray([3.7, 998.3], np.float32), 16
  rng = np.random.default_rng(0)
  params = {
    name: {
      "kernel": rng.standard_normal((inputs, width), np.float32) / inputs**0.5,
      "bias": rng.standard_normal(width, np.float32),
    }
    for name, inputs in (("in", 256), ("out", width))
  }
  y_BD = jax.jit(layers.TimeEmbed(width).apply)({"params": params}, t_B)
  angle_BF = np.outer(np.float64(t_B), 1e4 ** (-np.arange(128) / 128))
  y = np.concatenate([np.cos(angle_BF), np.sin(angle_BF)], axis=1)
  y = y @ params["in"]["kernel"] + params["in"]["bias"]
  y = y / (1 + np.exp(-y)) @ params["out"]["kernel"] + params["out"]["bias"]
  assert y_BD.dtype == jnp.float32
  np.testing.assert_allclose(y_BD, y, rtol=0, atol=5e-5)
