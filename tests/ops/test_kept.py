"""What of attention is kept for the gradient: what is named, and that once."""

import contextlib
import functools
import io
import re
import types

import jax
import jax.ad_checkpoint
import jax.numpy as jnp
import pytest

from flowjax.models import blocks
from flowjax.ops import attention, axes
from flowjax.ops.attention import splash
from flowjax.parallel import mesh as meshes

GPU = types.SimpleNamespace(platform="gpu", compute_capability="9.0")
TOKENS, HEADS, SIZE = 32, 2, 16


def kept(body, remat, mesh, device=None):
  """Returns the sizes of what is computed and kept of a half block."""
  net = blocks.Attention(HEADS, SIZE, False, body, jnp.bfloat16)
  x_BTD = jax.ShapeDtypeStruct((1, TOKENS, HEADS * SIZE), jnp.bfloat16)
  params = jax.eval_shape(
    blocks.Attention(HEADS, SIZE, False, "xla", jnp.bfloat16).init,
    jax.random.key(0), x_BTD, None,
  )  # fmt: skip

  def loss(params, x_BTD):
    return jnp.sum(net.apply(params, x_BTD, None))

  loss = jax.checkpoint(loss, policy=blocks.REMAT[remat])
  said = io.StringIO()
  with (
    jax.set_mesh(mesh),
    axes.rules(meshes.ACTIVATIONS, device or mesh.devices.flat[0]),
    contextlib.redirect_stdout(said),
  ):
    jax.ad_checkpoint.print_saved_residuals(loss, params, x_BTD)
  found = []
  for line in said.getvalue().splitlines():
    shape = re.match(r"(?:bf16|f32)(?:<host>)?\[([\d,]*)\]", line)
    if shape and "from the argument" not in line:
      sizes = [int(size) for size in shape[1].split(",") if size]
      found.append(functools.reduce(int.__mul__, sizes, 1))
  return sorted(found)


def mesh_of(**sizes):
  config = meshes.MeshConfig(**{"data": 1, **sizes})
  count = config.context * config.ulysses
  return meshes.build(config, jax.devices()[:count])


ONCE = TOKENS * HEADS * SIZE
QUERIES_KEYS_VALUES = 3 * ONCE
# The logarithm of each query's sum, beside what attention returned.
SUMS = TOKENS * HEADS


@pytest.mark.parametrize(
  "body, sizes, beside",
  [
    ("xla", {}, []),
    ("blockwise", {}, []),
    ("ring", {}, [SUMS]),
    ("ring", dict(context=2), [SUMS]),
    ("ulysses", dict(context=2), []),
  ],
  ids=str,
)
def test_what_attention_returned_is_kept_once(body, sizes, beside):
  found = kept(body, "save_attention", mesh_of(**sizes))
  assert found == sorted([*beside, ONCE, QUERIES_KEYS_VALUES])


def test_so_it_is_of_the_kernel_of_tpus(monkeypatch):
  interpreted = functools.partial(splash.attend, interpret=True)
  monkeypatch.setitem(attention._ALONE, "splash", interpreted)
  monkeypatch.setattr(splash, "obstacle", lambda _: None)
  found = kept("splash", "save_attention", mesh_of())
  # Its tokens are filled up to a tile of 128.
  filled = 128 // TOKENS
  assert found == sorted([filled * SUMS, filled * ONCE, QUERIES_KEYS_VALUES])


@pytest.mark.parametrize("remat", ["save_attention", "offload"])
def test_so_it_is_of_the_kernel_of_gpus_and_it_runs_once(monkeypatch, remat):
  kernels = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
  monkeypatch.setattr(kernels, "check_cudnn_version", lambda: 91200)
  monkeypatch.setattr(kernels, "check_compute_capability", lambda _: True)
  monkeypatch.setattr(
    kernels, "is_cuda_compute_capability_equal", lambda _: False
  )
  found = kept("cudnn", remat, mesh_of(context=2), GPU)
  assert found == sorted([SUMS, ONCE, QUERIES_KEYS_VALUES])
