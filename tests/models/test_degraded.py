"""Networks with something taken from them, for guidance away from them."""

# Shape suffixes: B batch, H height, W width, C channels.

import dataclasses
import functools

import jax
import numpy as np
import pytest

from flowjax import models
from flowjax.models import blocks, dit
from flowjax.parallel import mesh as meshes

CONFIG = dit.DiTConfig(
  image_size=(8, 8), channels=3, width=32, depth=3, heads=4, num_classes=10
)


def network(**changes):
  """Returns a network, its parameters and inputs."""
  net = models.build(dataclasses.replace(CONFIG, **changes))
  rng = np.random.default_rng(0)
  params = jax.tree.map(
    lambda leaf: 0.2 * rng.standard_normal(leaf.shape).astype(np.float32),
    jax.eval_shape(net.init, jax.random.key(0)),
  )
  x_BHWC = rng.standard_normal((8, 8, 8, 3)).astype(np.float32)
  t_B = rng.random(8).astype(np.float32)
  return net, (params, x_BHWC, t_B, {"label": np.arange(8, dtype=np.int32)})


@functools.cache
def answer(layers, changes=()):
  """Returns what a network says in whose `layers` tokens see themselves."""
  net, inputs = network(**dict(changes))
  return np.asarray(
    jax.jit(models.with_identity_attention(net, layers))(*inputs)
  )


def text(apply, inputs):
  return jax.jit(apply).lower(*inputs).as_text()


def test_what_is_not_asked_for_leaves_no_trace_in_the_program():
  net, inputs = network()
  plain = text(net.apply, inputs)
  assert "case" not in plain and "tensor<3xi1>" not in plain
  perturbed = text(models.with_identity_attention(net, (1,)), inputs)
  assert "stablehlo.case" in perturbed and "tensor<3xi1>" in perturbed
  none = text(models.with_identity_attention(net, ()), inputs)
  assert none.split("\n", 1)[1] == plain.split("\n", 1)[1]


def influence(apply, inputs):
  """Returns which pixels the first patch of the output depends on."""
  params, x_BHWC, *rest = inputs

  def corner(x_BHWC):
    return apply(params, x_BHWC, *rest)[0, :2, :2].sum()

  gradient = jax.jit(jax.grad(corner))(x_BHWC)
  return np.any(np.abs(gradient[0]) > 1e-7, axis=-1)


@pytest.mark.slow(1)
def test_tokens_see_themselves_alone_where_asked():
  net, inputs = network(position="sincos2d")
  seen = influence(models.with_identity_attention(net, (0, 1, 2)), inputs)
  own = np.zeros((8, 8), bool)
  own[:2, :2] = True
  np.testing.assert_array_equal(seen, own)
  # One block that attends lets them see all.
  assert influence(models.with_identity_attention(net, (0, 2)), inputs).all()


@pytest.mark.slow(1)
@pytest.mark.parametrize(
  "changes",
  [
    dict(scan=False),
    dict(remat="full"),
    dict(remat="matmuls", scan=False, qk_norm=True, mlp="swiglu"),
  ],
  ids=str,
)
def test_it_is_the_same_unrolled_and_with_every_remat(changes):
  kept = {k: v for k, v in changes.items() if k not in ("scan", "remat")}
  found, wanted = (
    answer((2, 0), tuple(each.items())) for each in (changes, kept)
  )
  np.testing.assert_allclose(found, wanted, atol=1e-4)
  assert changes.get("remat", "none") in blocks.REMAT


@pytest.mark.slow
@pytest.mark.parametrize(
  "sizes", [dict(fsdp=2, tensor=2), dict(fsdp=2, context=4)], ids=str
)
def test_it_is_the_same_on_a_mesh(sizes):
  net, inputs = network()
  apply = models.with_identity_attention(net, (1,))
  with meshes.use(meshes.build(meshes.MeshConfig(**sizes))):
    found = jax.jit(apply)(*inputs)
  np.testing.assert_allclose(found, answer((1,)), atol=1e-4)


@pytest.mark.slow(1)
def test_parameters_beside_its_own_do_not_trouble_it():
  net, (params, *rest) = network()
  both = models.with_uncertainty(net)
  more = {**params, "uncertainty": {"kernel": np.ones(128, np.float32)}}
  for way in (models.with_identity_attention, models.without_layers):
    found = jax.jit(way(both, (1,)))(more, *rest)
    wanted = jax.jit(way(net, (1,)))(params, *rest)
    np.testing.assert_array_equal(found, wanted)


def test_blocks_that_are_not_there_are_refused():
  net, _ = network()
  flow = models.build(models.CONFIGS["coupling"]())
  for way in (models.with_identity_attention, models.without_layers):
    for layers in ((3,), (0, -1)):
      with pytest.raises(ValueError, match="has the blocks 0 to 2"):
        way(net, layers)
    with pytest.raises(ValueError, match="'coupling'; it is for dit"):
      way(flow, (0,))
  with pytest.raises(ValueError, match="at least one of the 3"):
    models.without_layers(net, (0, 1, 2))
