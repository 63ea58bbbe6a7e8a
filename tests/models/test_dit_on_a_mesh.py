"""The same function on one device and on eight."""

import dataclasses
import functools
import re

import jax
import numpy as np
import on_a_mesh
import pytest

from flowjax import models
from flowjax.models import dit, sequences
from flowjax.ops import axes
from flowjax.parallel import mesh as meshes

P = jax.sharding.PartitionSpec
CONFIG = dit.DiTConfig(
  image_size=(6, 10),
  width=32,
  depth=2,
  heads=4,
  num_classes=10,
  mlp_ratio=3.0,
)


def make_mesh(**sizes):
  return meshes.build(meshes.MeshConfig(**{"data": 1, **sizes}))


def inputs():
  rng = np.random.default_rng(0)
  net = models.build(CONFIG)
  params = jax.tree.map(
    lambda leaf: 0.1 * rng.standard_normal(leaf.shape).astype(np.float32),
    jax.eval_shape(net.init, jax.random.key(0)),
  )
  x_BHWC = rng.standard_normal((8, 6, 10, 4)).astype(np.float32)
  t_B = rng.random(8).astype(np.float32)
  return params, x_BHWC, t_B, np.arange(8, dtype=np.int32)


def step(params, x_BHWC, t_B, label_B, body="xla"):
  config = dataclasses.replace(CONFIG, attention=body)
  return on_a_mesh.step(config, params, (x_BHWC, t_B, {"label": label_B}))


@functools.lru_cache
def on_one_device():
  return jax.jit(step)(*inputs())


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


@pytest.mark.slow
@pytest.mark.parametrize(
  "sizes, body",
  [
    (dict(data=2, fsdp=2, tensor=2), "auto"),
    (dict(tensor=4, context=2), "xla"),
    (dict(data=2, context=4), "ring"),
  ],
  ids=str,
)
def test_eight_devices_compute_what_one_does(sizes, body):
  """Also with the 15 tokens of an image, which two or four do not share."""
  mesh = make_mesh(**sizes)
  params, *rest = inputs()
  with jax.set_mesh(mesh), axes.rules(meshes.ACTIVATIONS):
    params = lay_out(params, mesh)
    program = jax.jit(step, static_argnames="body")
    program = program.lower(params, *rest, body=body).compile()
    found = program(params, *rest)
  on_a_mesh.check(found, on_one_device(), sizes)


def moves(function, mesh, by_batch):
  """Counts the collectives of a program; the loop over blocks counts once."""
  params, x_BHWC, t_B, label_B = inputs()
  with jax.set_mesh(mesh), axes.rules(meshes.ACTIVATIONS):
    batch = jax.device_put((x_BHWC, t_B, label_B), by_batch)
    program = jax.jit(function).lower(lay_out(params, mesh), *batch).compile()
  return on_a_mesh.moves(program)


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
  # And once the image, of an odd number of tokens.
  assert counted.pop("all-gather") == 2 + 1
  assert set(counted) == {"all-reduce"}


def test_heads_that_do_not_divide_are_refused():
  with jax.set_mesh(make_mesh(tensor=8)), axes.rules(meshes.ACTIVATIONS):
    with pytest.raises(ValueError, match="4 'heads'.*8 devices"):
      jax.eval_shape(step, *inputs())


@pytest.mark.slow(1)
def test_split_tokens_are_never_merged_with_the_batch():
  merged = re.compile(r"f32\[(120|128),32\] = dot_general")
  with jax.set_mesh(make_mesh(context=8)), axes.rules(meshes.ACTIVATIONS):
    assert not merged.search(str(jax.make_jaxpr(step)(*inputs())))
  assert merged.search(str(jax.make_jaxpr(step)(*inputs())))


def test_tokens_that_do_not_divide_are_filled_up_and_the_log_says_so(caplog):
  given = inputs()
  sequences._say.cache_clear()
  mesh = make_mesh(data=2, context=4)
  with jax.set_mesh(mesh), axes.rules(meshes.ACTIVATIONS):
    with caplog.at_level("INFO"):
      v_BHWC, _ = jax.eval_shape(step, *given)
  assert v_BHWC.shape == (8, 6, 10, 4)
  said = [record.getMessage() for record in caplog.records]
  assert said == [
    "15 tokens do not divide over 4 devices: 1 more, that nobody sees, make 16."
  ]


@pytest.mark.slow(1)
def test_identity_attention_is_the_same_on_a_mesh():
  """A token that sees itself alone asks nothing of others."""
  params, x_BHWC, t_B, label_B = inputs()

  def apply(body):
    config = dataclasses.replace(CONFIG, attention=body)
    return jax.jit(functools.partial(dit.apply, config, identity=(1,)))(
      params, x_BHWC, t_B, {"label": label_B}
    )

  wanted = apply("xla")
  with (
    jax.set_mesh(make_mesh(data=2, context=4)),
    axes.rules(meshes.ACTIVATIONS),
  ):
    found = apply("ring")
  np.testing.assert_allclose(found, wanted, atol=1e-5 * np.abs(wanted).max())
