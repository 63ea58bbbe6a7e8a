"""The fused kernels, as far as a CPU can tell."""

# Shape suffixes: B batch, T queries, S keys, N heads, H head size.

import contextlib
import functools
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies

from flowjax.ops import attention, axes
from flowjax.ops.attention import cudnn, splash
from flowjax.parallel import mesh as meshes

GPU = types.SimpleNamespace(platform="gpu", compute_capability="9.0")


def draw(queries, keys, heads, head_size, dtype=np.float32, batch=2):
  rng = np.random.default_rng(0)
  q, k, v = (
    jnp.asarray(rng.standard_normal((batch, n, heads, head_size)), dtype)
    for n in (queries, keys, keys)
  )
  mask = rng.random((batch, keys)) < 0.6
  mask[:, 0] = True
  return q, k, v, jnp.asarray(mask)


@functools.partial(jax.jit, static_argnums=0)
def both(attend, q, k, v, mask):
  """Returns the value and the gradients of an uneven sum of it."""
  y, pull = jax.vjp(lambda q, k, v: attend(q, k, v, mask), q, k, v)
  weight = jnp.cos(jnp.arange(float(y.size))).reshape(y.shape)
  return y, pull(weight.astype(y.dtype))


def close(found, wanted):
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5)


def xla(q, k, v, mask):
  return attention.attention(q, k, v, body="xla", mask_BS=mask)


@pytest.mark.parametrize("masked", [True, False])
def test_cudnn_is_told_lengths_and_keys_in_that_order(monkeypatch, masked):
  """With the same function in plain JAX behind the same signature."""
  asked = []
  plain = jax.nn.dot_product_attention

  def stand_in(*qkv, implementation, **options):
    asked.append((implementation, sorted(options)))
    return plain(*qkv, implementation="xla", **options)

  monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in)
  q, k, v, mask = draw(7, 9, 2, 8)
  inputs = q, k, v, mask if masked else None
  close(both(cudnn.attend, *inputs), both(xla, *inputs))
  assert asked == [("cudnn", ["key_value_seq_lengths"])]


@pytest.mark.parametrize(
  "sizes, local",
  [
    (None, [4, 2, 16, 24]),
    # Examples and heads are shared, queries too, and keys are gathered.
    (dict(data=2, tensor=2, context=2), [2, 1, 8, 24]),
  ],
  ids=str,
)
def test_cudnn_is_lowered_to_its_kernels_with_a_mesh_too(
  monkeypatch, sizes, local
):
  kernels = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
  monkeypatch.setattr(kernels, "check_cudnn_version", lambda: 91200)
  monkeypatch.setattr(kernels, "check_compute_capability", lambda _: True)
  monkeypatch.setattr(
    kernels, "is_cuda_compute_capability_equal", lambda _: False
  )
  where = contextlib.ExitStack()
  if sizes:
    mesh = meshes.build(meshes.MeshConfig(**sizes))
    where.enter_context(jax.set_mesh(mesh))
    where.enter_context(axes.rules(meshes.ACTIVATIONS, GPU))
  else:
    monkeypatch.setattr(jax, "devices", lambda: [GPU])
  inputs = draw(16, 24, 2, 64, jnp.bfloat16, batch=4)

  def attend(q, k, v, mask):
    return attention.attention(q, k, v, body="cudnn", mask_BS=mask)

  with where:
    traced = both.trace(attend, *inputs)
  text = traced.lower(lowering_platforms=("cuda",)).as_text()
  assert re.findall(r"@(__cudnn\$\w+)\(", text) == [
    "__cudnn$fmhaSoftmax",
    "__cudnn$fmhaSoftmaxBackward",
  ]
  shapes = re.findall(r"dimensions\\22: \[(.*?)\], \\22tuple_shapes", text)
  assert {tuple(map(int, re.findall(r"22(\d+)\\22", s))) for s in shapes} == {
    tuple(local)
  }
  assert set(re.findall(r"mask_type\\22: \\22(\w+)", text)) == {"PADDING"}


@pytest.mark.slow
@pytest.mark.parametrize("masked", [True, False])
def test_splash_agrees_where_it_is_interpreted(masked):
  """Lengths are no multiples of a tile, nor is the head of a DiT-XL."""
  q, k, v, mask = draw(130, 200, 2, 72, batch=1)
  inputs = q, k, v, mask if masked else None
  interpreted = functools.partial(splash.attend, interpret=True)
  close(both(interpreted, *inputs), both(xla, *inputs))


def test_splash_is_asked_for_shares_of_a_mesh():
  """Traced for a TPU: each device fills up the tokens that it has."""
  tpu = types.SimpleNamespace(platform="tpu")
  inputs = draw(200, 200, 4, 8)
  mesh = meshes.build(meshes.MeshConfig(data=2, tensor=2, context=2))
  with jax.set_mesh(mesh), axes.rules(meshes.ACTIVATIONS, tpu):
    program = jax.make_jaxpr(
      lambda q, k, v, mask: attention.attention(
        q, k, v, body="splash", mask_BS=mask
      )
    )(*inputs)
  # One example of two, two heads of four, and 100 queries of 200.
  assert "f32[1,2,128,8]" in str(program)
  assert "f32[1,2,256,8]" in str(program)


@pytest.mark.slow
def test_splash_compiles_for_a_mesh_of_tpus(monkeypatch):
  """Forwards and for the gradient; it needs the compiler, and no TPU."""
  pytest.importorskip("libtpu")
  for name, value in {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
  }.items():
    monkeypatch.setenv(name, value)
  found = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4")
  mesh = meshes.build(
    meshes.MeshConfig(data=2, tensor=2, context=2), found.devices
  )
  batch = meshes.batch_sharding(mesh)
  x = jax.ShapeDtypeStruct((2, 300, 4, 72), jnp.bfloat16, sharding=batch)
  mask = jax.ShapeDtypeStruct((2, 300), bool, sharding=batch)

  def attend(q, k, v, mask):
    return attention.attention(q, k, v, body="splash", mask_BS=mask)

  with meshes.use(mesh):
    program = both.lower(attend, x, x, x, mask).compile()
  kernels = program.as_text().count('custom_call_target="tpu_custom_call"')
  assert kernels == 3  # y; dq; dk and dv


@pytest.mark.parametrize(
  "tokens, tile, filled",
  [(1, 128, 128), (128, 128, 128), (300, 384, 384), (513, 384, 768)]
  + [(1025, 384, 1152), (4608, 512, 4608), (4250, 512, 4608)],
)
def test_tiles_leave_little_to_fill(tokens, tile, filled):
  assert splash._tile(tokens) == tile
  assert -(-tokens // tile) * tile == filled
