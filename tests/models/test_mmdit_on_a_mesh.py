"""The same MM-DiT on one device and on eight."""

import dataclasses
import functools

import jax
import numpy as np
import on_a_mesh
import pytest

from flowjax import models
from flowjax.models import mmdit
from flowjax.parallel import mesh as meshes
from flowjax.parallel import rules

CONFIG = mmdit.MMDiTConfig(
  image_size=(6, 10),
  channels=4,
  depth=2,
  heads=4,
  head_size=8,
  text_width=16,
  pooled_width=16,
  qk_norm=True,
  dual_layers=1,
)
OPTIONS = [
  CONFIG,
  mmdit.MMDiTConfig(depth=2, heads=2, num_classes=3),
  mmdit.MMDiTConfig(depth=3, heads=2, dual_layers=1, position="rope2d"),
]


@functools.lru_cache
def inputs():
  rng = np.random.default_rng(0)

  def normal(*shape):
    return rng.standard_normal(shape, np.float32)

  params = jax.tree.map(
    lambda leaf: 0.1 * normal(*leaf.shape),
    jax.eval_shape(models.build(CONFIG).init, jax.random.key(0)),
  )
  cond = {
    "text": normal(8, 5, 16),
    "pooled": normal(8, 16),
    "text_mask": np.arange(5) < np.arange(8)[:, None] % 5 + 1,
  }
  return params, (normal(8, 6, 10, 4), rng.random(8, np.float32), cond)


def step(body, params, batch):
  config = dataclasses.replace(CONFIG, attention=body)
  return on_a_mesh.step(config, params, batch)


@functools.lru_cache
def on_one_device():
  return jax.jit(functools.partial(step, "xla"))(*inputs())


# The ring has its turn with FLUX, whose two streams are these; and "xla" over
# "context" is trained in `test_one_is_eight.py`.
@pytest.mark.slow
@pytest.mark.parametrize(
  "body, sizes",
  [
    ("auto", dict(data=2, fsdp=2, tensor=2)),
    ("ulysses", dict(data=2, context=4)),
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


@pytest.mark.parametrize("config", OPTIONS, ids=range(len(OPTIONS)))
def test_every_parameter_is_placed_by_exactly_one_rule(config):
  mesh = meshes.build(meshes.MeshConfig(data=2, fsdp=2, tensor=2))
  params = jax.eval_shape(models.build(config).init, jax.random.key(0))
  found = rules.places(rules.for_model(config), params, mesh)
  assert len(found) == len(jax.tree.leaves(params))
  for name, place in found.items():
    leaf = jax.ShapeDtypeStruct(place.shape, place.dtype)
    one = [
      rule
      for rule in rules.for_model(config)
      if rules.places([rule, (".*", ())], {name: leaf}, mesh)[name].rule != ".*"
    ]
    assert len(one) == 1, name
    assert not place.undivided, name
    if name.endswith("kernel"):
      assert "fsdp" in place.spec, name


def test_tensor_divides_heads_and_the_hidden_width():
  mesh = meshes.build(meshes.MeshConfig(data=2, fsdp=2, tensor=2))
  config = dataclasses.replace(CONFIG, depth=3)
  params = jax.eval_shape(models.build(config).init, jax.random.key(0))
  found = rules.places(rules.for_model(config), params, mesh)
  divided = {
    name: place.shape[tuple(place.spec).index("tensor")]
    for name, place in found.items()
    if "tensor" in place.spec
  }
  streams = [
    f"{group}/{stream}"
    for group in ("dual_blocks", "blocks", "last_block")
    for stream in ("image", "text")
  ]
  wanted = {}
  for stream in streams:
    attentions = [f"{stream}/attention"]
    if stream == "dual_blocks/image":
      attentions.append(f"{stream}/attention2")
    ends = stream == "last_block/text"
    for attention in attentions:
      wanted |= dict.fromkeys(
        (f"{attention}/qkv/kernel", f"{attention}/qkv/bias"), config.heads
      )
      if not ends:
        wanted[f"{attention}/out/kernel"] = config.heads
    if not ends:
      maps = ("in/kernel", "in/bias", "out/kernel")
      wanted |= {f"{stream}/mlp/{m}": config.mlp_width for m in maps}
  assert divided == wanted
