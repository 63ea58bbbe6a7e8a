"""Guidance: what it computes, and how many evaluations it pays for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowjax.flow import guidance, paths, solvers, times

B = 4
COND = {"label": jnp.array([0, 1, 2, 3]), "text": jnp.ones((B, 2))}
UNCOND = {"label": jnp.full((B,), 9), "text": jnp.zeros((B, 2))}
X = jnp.asarray(
  np.random.default_rng(0).standard_normal((B, 3, 3, 2), np.float32)
)


def velocity(x, t_B, cond):
  label = cond["label"].astype(jnp.float32) + cond["text"].sum(axis=1)
  return (
    jnp.sin(x * (1.0 + label[:, None, None, None])) + t_B[:, None, None, None]
  )


def counted(calls):
  """Notes the number of rows of each evaluation when it runs."""

  def evaluated(x, t_B, cond):
    jax.debug.callback(lambda _: calls.append(x.shape[0]), x, ordered=True)
    return velocity(x, t_B, cond)

  return evaluated


def full(t):
  return jnp.full((B,), t)


@pytest.mark.parametrize("scale", [0.0, 4.0, np.float32(1.5)])
@pytest.mark.parametrize("interval", [(0.0, 1.0), (0.2, 0.8)])
def test_the_field_is_extrapolated_from_the_unconditional_one(scale, interval):
  field = guidance.classifier_free(
    velocity, COND, UNCOND, scale=scale, interval=interval
  )
  v_c = velocity(X, full(0.5), COND)
  v_u = velocity(X, full(0.5), UNCOND)
  expected = v_u + scale * (v_c - v_u)
  np.testing.assert_allclose(field(X, 0.5), expected, atol=1e-6)
  np.testing.assert_allclose(field(X, full(0.5)), expected, atol=1e-6)


@pytest.mark.parametrize("scale", [1.0, 1, np.float32(1.0)])
def test_scale_one_is_the_conditional_field_bit_for_bit(scale):
  calls = []
  field = guidance.classifier_free(
    counted(calls), COND, UNCOND, scale=scale, interval=(0.1, 0.9)
  )
  found = jax.jit(field)(X, jnp.float32(0.5))
  expected = jax.jit(velocity)(X, full(0.5), COND)
  jax.effects_barrier()
  np.testing.assert_array_equal(found, expected)
  assert calls == [B]


@pytest.mark.parametrize(
  "t, guided",
  [
    (0.0, False),
    (0.25, True),
    (0.5, True),
    (0.75, True),
    (0.8, False),
  ],
)
def test_outside_of_the_interval_one_evaluation_is_paid(t, guided):
  calls = []
  field = jax.jit(
    guidance.classifier_free(
      counted(calls), COND, UNCOND, scale=3.0, interval=(0.25, 0.75)
    )
  )
  found = field(X, jnp.float32(t))
  jax.effects_barrier()
  assert calls == [2 * B if guided else B]
  v_c = velocity(X, full(t), COND)
  v_u = velocity(X, full(t), UNCOND)
  expected = v_u + 3.0 * (v_c - v_u) if guided else v_c
  np.testing.assert_allclose(found, expected, atol=1e-6)


def test_a_whole_sampler_pays_only_for_the_interval():
  calls = []
  field = guidance.classifier_free(
    counted(calls), COND, UNCOND, scale=3.0, interval=(0.3, 0.7)
  )
  grid = times.uniform_grid(10)
  sample = jax.jit(
    lambda x: solvers.solve(
      solvers.build("euler", paths.straight()), field, x, grid
    )
  )
  sample(X).block_until_ready()
  jax.effects_barrier()
  inside = (np.float32(0.3) <= grid[:-1]) & (grid[:-1] <= np.float32(0.7))
  assert calls == [2 * B if yes else B for yes in inside]
  assert 0 < sum(inside) < 10


def test_each_example_may_have_its_own_time():
  field = guidance.classifier_free(
    velocity, COND, UNCOND, scale=3.0, interval=(0.25, 0.75)
  )
  t_B = jnp.array([0.1, 0.3, 0.6, 0.9])
  rows = np.stack([field(X, t)[i] for i, t in enumerate(t_B)])
  np.testing.assert_allclose(field(X, t_B), rows, atol=1e-6)


def test_a_traced_scale_may_differ_between_examples():
  @jax.jit
  def guided(scale):
    return guidance.classifier_free(velocity, COND, UNCOND, scale=scale)(X, 0.5)

  for scale in (1.0, 2.5):
    static = guidance.classifier_free(velocity, COND, UNCOND, scale=scale)
    np.testing.assert_allclose(guided(scale), static(X, 0.5), atol=1e-6)
  each = guided(jnp.array([1.0, 2.5, 1.0, 2.5]))
  np.testing.assert_allclose(each[1::2], guided(2.5)[1::2], atol=1e-6)
  np.testing.assert_allclose(each[::2], guided(1.0)[::2], atol=1e-6)


def test_half_precision_is_widened_before_it_is_extrapolated():
  def half(x, t_B, cond):
    return velocity(x, t_B, cond).astype(jnp.bfloat16)

  field = guidance.classifier_free(
    half, COND, UNCOND, scale=3.0, interval=(0.25, 0.75)
  )
  v_c, v_u = (
    half(X, full(0.5), cond).astype(jnp.float32) for cond in (COND, UNCOND)
  )
  np.testing.assert_allclose(field(X, 0.5), v_u + 3.0 * (v_c - v_u), atol=1e-5)
  assert field(X, 0.1).dtype == jnp.float32


def test_an_empty_interval_is_refused():
  with pytest.raises(ValueError, match="nowhere.*low, high"):
    guidance.classifier_free(
      velocity, COND, UNCOND, scale=2.0, interval=(0.7, 0.3)
    )
