"""What one DiT sends between eight devices, and what it refuses."""

import collections
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowjax import models
from flowjax.models import dit
from flowjax.ops import axes
from flowjax.parallel import mesh as meshes

P = jax.sharding.PartitionSpec
CONFIG = dit.DiTConfig(
  image_size=(8, 8),
  width=32,
  depth=2,
  heads=4,
  num_classes=10,
  mlp_ratio=3.0,
)


def make_mesh(data=1, fsdp=1, tensor=1, context=1):
  return jax.make_mesh(
    (data, fsdp, tensor, context),
    ("data", "fsdp", "tensor", "context"),
    axis_types=(jax.sharding.AxisType.Auto,) * 4,
  )


def inputs():
  rng = np.random.default_rng(0)
  net = models.build(CONFIG)
  params = jax.tree.map(
    lambda leaf: 0.1 * rng.standard_normal(leaf.shape).astype(np.float32),
    jax.eval_shape(net.init, jax.random.key(0)),
  )
  x_BHWC = rng.standard_normal((8, 8, 8, 4)).astype(np.float32)
  t_B = rng.random(8).astype(np.float32)
  return params, x_BHWC, t_B, np.arange(8, dtype=np.int32)


def step(params, x_BHWC, t_B, label_B):
  net = models.build(CONFIG)

  def scalar(params):
    v_BHWC = net.apply(params, x_BHWC, t_B, {"label": label_B})
    return jnp.mean(jnp.square(v_BHWC - x_BHWC)), v_BHWC

  gradient, v_BHWC = jax.grad(scalar, has_aux=True)(params)
  return v_BHWC, gradient


def lay_out(params, mesh):
  """Splits heads and the MLP over "tensor", inputs over "fsdp"."""
  specs = jax.tree.map(lambda _: P(), params)
  specs["blocks"]["attention"]["qkv"] = {
    "kernel": P(None, "fsdp", None, "tensor"),
    "bias": P(None, None, "tensor"),
  }
  specs["blocks"]["attention"]["out"]["kernel"] = P(
    None, "tensor", None, "fsdp"
  )
  specs["blocks"]["mlp"]["in"] = {
    "kernel": P(None, "fsdp", "tensor"),
    "bias": P(None, "tensor"),
  }
  specs["blocks"]["mlp"]["out"]["kernel"] = P(None, "tensor", "fsdp")
  return jax.device_put(
    params,
    jax.tree.map(
      lambda spec: jax.sharding.NamedSharding(mesh, spec),
      specs,
      is_leaf=lambda spec: isinstance(spec, P),
    ),
  )


def moves(function, mesh, by_batch):
  """Counts the collectives of a program; the loop over blocks counts once."""
  params, x_BHWC, t_B, label_B = inputs()
  with jax.set_mesh(mesh), axes.rules(meshes.ACTIVATIONS):
    batch = jax.device_put((x_BHWC, t_B, label_B), by_batch)
    program = jax.jit(function).lower(lay_out(params, mesh), *batch).compile()
  kinds = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
  found = re.findall(rf" ({kinds})(?:-start)?\(", program.as_text())
  return collections.Counter(found)


def test_split_heads_are_added_up_twice_per_block():
  mesh = make_mesh(data=4, tensor=2)
  by_batch = jax.sharding.NamedSharding(mesh, P("data"))

  def forward(params, x_BHWC, t_B, label_B):
    net = models.build(CONFIG)
    return net.apply(params, x_BHWC, t_B, {"label": label_B})

  assert moves(forward, mesh, by_batch) == {"all-reduce": 2}


@pytest.mark.slow
def test_split_tokens_gather_keys_and_values_once():
  """And not again for the gradient; the rest is sums of gradients."""
  mesh = make_mesh(data=4, context=2)
  counted = moves(step, mesh, jax.sharding.NamedSharding(mesh, P("data")))
  assert counted.pop("all-gather") == 2
  assert set(counted) == {"all-reduce"}


def test_heads_that_do_not_divide_are_refused():
  with jax.set_mesh(make_mesh(tensor=8)), axes.rules(meshes.ACTIVATIONS):
    with pytest.raises(ValueError, match="4 'heads'.*8 devices"):
      jax.eval_shape(step, *inputs())


def test_split_tokens_are_never_merged_with_the_batch():
  merged = "f32[128,32] = dot_general"
  with jax.set_mesh(make_mesh(context=8)), axes.rules(meshes.ACTIVATIONS):
    assert merged not in str(jax.make_jaxpr(step)(*inputs()))
  assert merged in str(jax.make_jaxpr(step)(*inputs()))
