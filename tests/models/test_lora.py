"""Adapters: nothing at first, then what W + (alpha / rank) a b would be."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowjax import models
from flowjax.models import dit, flux, lora, mmdit

IMAGES = dict(image_size=(4, 4), channels=2)
TEXT = dict(**IMAGES, heads=2, text_width=6, pooled_width=4, text_tokens=3)
NETWORKS = {
  "dit": dit.DiTConfig(
    **IMAGES, width=16, depth=3, heads=2, num_classes=3, mlp="swiglu"
  ),
  "mmdit": mmdit.MMDiTConfig(
    **TEXT, head_size=8, depth=2, dual_layers=1, position_table=8
  ),
  "flux": flux.FluxConfig(
    **TEXT, width=16, double_depth=1, single_depth=2, rope_axes=(2, 2, 4)
  ),
}
EVERY = lora.LoraConfig(rank=2, alpha=6.0, targets=(r".*/kernel",))


@functools.cache
def network(name, config=EVERY):
  """Returns the bare network, the adapted one, and parameters, none zero."""
  bare = models.build(NETWORKS[name])
  net = models.with_lora(bare, config)
  rng = np.random.default_rng(0)
  params = jax.tree.map(
    lambda leaf: 0.1 * rng.standard_normal(leaf.shape, np.float32),
    jax.eval_shape(net.init, jax.random.key(0)),
  )
  return bare, net, params


def draw(net, batch=2):
  rng = np.random.default_rng(1)
  x_BHWC = rng.standard_normal((batch, 4, 4, 2), np.float32)
  cond = jax.tree.map(
    lambda leaf: rng.integers(0, 3, leaf.shape).astype(leaf.dtype),
    net.example(batch),
  )
  return x_BHWC, np.array([0.2, 0.9], np.float32), cond


def base(params):
  return {key: params[key] for key in params if key != lora.GROUP}


@jax.jit
def merged(params):
  return lora.merged(EVERY, params)


def names(tree):
  return {
    jax.tree_util.keystr(path, simple=True, separator="/"): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


@pytest.mark.slow(1)
@pytest.mark.parametrize(
  "name", ["dit", pytest.param("mmdit", marks=pytest.mark.slow)]
)
def test_they_add_their_product_and_b_learns_before_a(name):
  bare, net, params = network(name)
  inputs = draw(net)
  # rbg compiles in a fifth of the time that threefry takes.
  fresh = jax.jit(functools.partial(lora.init, EVERY))(
    base(params), jax.random.key(0, impl="rbg")
  )

  def loss(factors):
    v_BHWC = net.apply({**params, lora.GROUP: factors}, *inputs)
    return jnp.mean(jnp.square(v_BHWC)), v_BHWC

  program = jax.jit(jax.value_and_grad(loss, has_aux=True))

  def both(factors):
    return jax.device_get(program(factors))

  bare_apply = jax.jit(bare.apply)

  def alone(params, *inputs):
    return np.asarray(bare_apply(params, *inputs))

  (_, found), at_start = both(fresh)
  without = alone(base(params), *inputs)
  np.testing.assert_allclose(found, without, rtol=1e-5, atol=5e-6)
  for path, leaf in names(at_start).items():
    assert leaf.any() == path.endswith("/b"), path

  (_, found), later = both(params[lora.GROUP])
  wanted = alone(merged(params), *inputs)
  np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=5e-6)
  assert np.abs(found - without).max() > 0.05
  for path, leaf in names(later).items():
    # In each layer, for each part of a fused kernel; but nobody hears what the
    # text of the last block asks.
    used = 0.6 if path.startswith("last_block/text/attention") else 0.9
    assert np.count_nonzero(leaf) > used * leaf.size, path


def test_a_fused_kernel_has_a_pair_for_each_part():
  config = lora.LoraConfig(rank=2)
  _, _, params = network("mmdit", config)
  shapes = {name: leaf.shape for name, leaf in names(params["lora"]).items()}
  of = "image/attention/qkv/kernel"
  assert shapes[f"dual_blocks/{of}/a"] == (1, 3, 16, 2)
  assert shapes[f"dual_blocks/{of}/b"] == (1, 3, 2, 2, 8)
  assert shapes[f"last_block/{of}/a"] == (3, 16, 2)
  assert shapes["dual_blocks/text/attention/out/kernel/a"] == (1, 2, 8, 2)
  assert shapes["dual_blocks/text/attention/out/kernel/b"] == (1, 2, 16)
  # By default the maps of attention, of every stream and block, and no other.
  kernels = {name.rpartition("/")[0] for name in shapes}
  able = lora.kernels(base(params))
  assert kernels == {name for name in able if "attention" in name}
  assert "dual_blocks/image/attention2/out/kernel" in kernels


def test_a_is_drawn_as_peft_draws_it():
  _, _, params = network("dit")
  init = jax.jit(functools.partial(lora.init, EVERY))
  drawn = init(base(params), jax.random.key(0, impl="rbg"))
  factors = names(jax.device_get(drawn))
  for path, leaf in factors.items():
    if path.endswith("/b"):
      assert not leaf.any()
  limit = 1 / np.sqrt(16)
  drawn = factors["blocks/attention/qkv/kernel/a"]
  assert 0.9 * limit < np.abs(drawn).max() <= limit
  assert len(np.unique(drawn)) == drawn.size
  # Of an output map the inputs are its heads.
  assert np.abs(factors["blocks/attention/out/kernel/a"]).max() <= limit


@pytest.mark.slow(1)
def test_guidance_by_blocks_has_the_adapters_of_those_that_stay():
  bare, net, params = network("dit")
  both = models.with_uncertainty(net)
  inputs = draw(net)
  more = {**params, "uncertainty": {"kernel": np.ones(128, np.float32)}}
  whole = merged(params)
  for way in (models.without_layers, models.with_identity_attention):
    found = jax.jit(way(both, (1,)))(more, *inputs)
    wanted = jax.jit(way(bare, (1,)))(whole, *inputs)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=5e-6)


@pytest.mark.slow(1)
@pytest.mark.parametrize("changes", [dict(scan=False, remat="dots")])
def test_it_is_the_same_unrolled_and_remade(changes):
  _, net, params = network("dit")
  other = models.build(dataclasses.replace(NETWORKS["dit"], **changes))
  inputs = draw(net)
  found = jax.jit(models.with_lora(other, EVERY).apply)(params, *inputs)
  wanted = jax.jit(net.apply)(params, *inputs)
  np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=5e-6)


def test_what_makes_no_sense_is_refused():
  bare = models.build(NETWORKS["dit"])
  missing = lora.LoraConfig(rank=2, targets=(r".*/qkv/kernel", "blocks/mlp"))
  with pytest.raises(ValueError, match="'blocks/mlp' matches no kernel"):
    jax.eval_shape(models.with_lora(bare, missing).init, jax.random.key(0))
  with pytest.raises(ValueError, match="no regular expression"):
    lora.LoraConfig(rank=2, targets=("(",))
  for options in (dict(rank=-1), dict(rank=1, alpha=0.0)):
    with pytest.raises(ValueError, match="rank|alpha"):
      lora.LoraConfig(**options)
  flow = models.build(models.CONFIGS["coupling"]())
  with pytest.raises(ValueError, match="'coupling' has no adapters"):
    models.with_lora(flow, lora.LoraConfig(rank=2))
