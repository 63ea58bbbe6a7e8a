"""The same FLUX on one device and on eight."""

import dataclasses
import functools
import re

import jax
import numpy as np
import on_a_mesh
import pytest

from flowjax import models
from flowjax.models import flux
from flowjax.parallel import mesh as meshes
from flowjax.parallel import rules

CONFIG = flux.FluxConfig(
  image_size=(6, 10),
  channels=4,
  width=32,
  heads=4,
  double_depth=2,
  single_depth=2,
  text_width=16,
  pooled_width=16,
  rope_axes=(2, 2, 4),
)
OPTIONS = {
  "text": CONFIG,
  "labels": flux.FluxConfig(
    width=32, heads=2, rope_axes=(4, 6, 6), num_classes=3, guidance_embed=False
  ),
}


@functools.lru_cache
def inputs(length=5):
  rng = np.random.default_rng(0)

  def normal(*shape):
    return rng.standard_normal(shape, np.float32)

  params = jax.tree_util.tree_map_with_path(
    lambda path, leaf: 0.1 * normal(*leaf.shape) + (path[-1].key == "scale"),
    jax.eval_shape(models.build(CONFIG).init, jax.random.key(0)),
  )
  cond = {
    "text": normal(8, length, 16),
    "pooled": normal(8, 16),
    "text_mask": np.arange(length) < np.arange(8)[:, None] % length + 1,
    "guidance": np.linspace(1.0, 4.0, 8, dtype=np.float32),
  }
  return params, (normal(8, 6, 10, 4), rng.random(8, np.float32), cond)


def step(body, params, batch):
  config = dataclasses.replace(CONFIG, attention=body)
  return on_a_mesh.step(config, params, batch)


@functools.lru_cache
def on_one_device():
  return jax.jit(functools.partial(step, "xla"))(*inputs())


# Two streams go to each other by the code of MM-DiT, whose file has "ulysses";
# and "xla" over "context" is trained in `test_one_is_eight.py`.
@pytest.mark.slow
@pytest.mark.parametrize(
  "body, sizes",
  [
    ("auto", dict(data=2, fsdp=2, tensor=2)),
    ("ring", dict(data=1, context=8)),
    ("ring_ulysses", dict(data=1, tensor=2, context=2, ulysses=2)),
  ],
  ids=str,
)
def test_eight_devices_compute_what_one_does(body, sizes):
  """Of 5 tokens of text, some hidden, and 15 of the image."""
  mesh = meshes.build(meshes.MeshConfig(**sizes))
  params, batch = inputs()
  places = rules.shardings(rules.for_model(CONFIG), params, mesh)
  with meshes.use(mesh):
    params = jax.device_put(params, places)
    batch = jax.device_put(batch, meshes.batch_sharding(mesh))
    program = jax.jit(
      functools.partial(step, body), out_shardings=(None, places)
    )
    program = program.lower(params, batch).compile()
    found = program(params, batch)
  on_a_mesh.check(found, on_one_device(), sizes)
  on_a_mesh.check_moves(program, body)


@pytest.mark.slow(1)
def test_split_heads_are_added_up_and_nothing_else_moves():
  """After attention and after the MLP, in either stream; once in the one."""
  mesh = meshes.build(meshes.MeshConfig(data=4, tensor=2))
  params, batch = inputs()
  with meshes.use(mesh):
    places = rules.shardings(rules.for_model(CONFIG), params, mesh)
    program = jax.jit(models.build(CONFIG).apply).lower(
      jax.device_put(params, places),
      *jax.device_put(batch, meshes.batch_sharding(mesh)),
    )
  assert on_a_mesh.summed(program.compile()) == 4 + 1


@pytest.mark.parametrize("name", OPTIONS)
def test_every_parameter_is_placed_by_exactly_one_rule(name):
  config = OPTIONS[name]
  params = jax.eval_shape(models.build(config).init, jax.random.key(0))
  mesh = meshes.build(meshes.MeshConfig(data=2, fsdp=2, tensor=2))
  found = rules.places(rules.for_model(config), params, mesh)
  assert len(found) == len(jax.tree.leaves(params))
  for name, place in found.items():
    matching = [
      pattern
      for pattern, _ in rules.for_model(config)
      if re.fullmatch(pattern, name)
    ]
    assert matching == [place.rule], name
    assert not place.undivided, name
    if name.endswith("kernel") or name.startswith("label_embed"):
      assert "fsdp" in place.spec, name


def test_tensor_divides_heads_and_the_hidden_width():
  mesh = meshes.build(meshes.MeshConfig(data=2, fsdp=2, tensor=2))
  found = rules.places(rules.for_model(CONFIG), inputs()[0], mesh)
  divided = {
    name: place.shape[tuple(place.spec).index("tensor")]
    for name, place in found.items()
    if "tensor" in place.spec
  }
  assert divided == {
    f"{block}/{name}": size
    for block in ("double_blocks/image", "double_blocks/text", "single_blocks")
    for name, size in {
      "attention/qkv/kernel": CONFIG.heads,
      "attention/qkv/bias": CONFIG.heads,
      "attention/out/kernel": CONFIG.heads,
      "mlp/in/kernel": CONFIG.mlp_width,
      "mlp/in/bias": CONFIG.mlp_width,
      "mlp/out/kernel": CONFIG.mlp_width,
    }.items()
  }
