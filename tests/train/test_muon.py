"""Muon: which parameters it moves, and that it makes directions equal."""

import dataclasses

import einops
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowjax import models
from flowjax.train import manifest, muon, optim


@pytest.mark.parametrize("name", ["dit", "mmdit", "flux"])
def test_it_moves_the_kernels_of_blocks_and_nothing_else(name):
  network = models.build(models.CONFIGS[name]())
  params = jax.eval_shape(network.init, jax.random.key(0))
  labels = manifest.named_leaves(muon.labels(params))
  moved = {path for path, label in labels.items() if label == "muon"}
  assert moved == {
    path for path in labels if "block" in path and path.endswith("kernel")
  }


@pytest.mark.parametrize(
  ("path", "shape", "matrices"),
  [
    ("attention/qkv", (2, 8, 3, 3, 8), "l d k n h -> (l k) d (n h)"),
    ("attention/out", (2, 2, 4, 24), "l n h d -> l (n h) d"),
    ("modulation", (2, 8, 6, 24), "l d k e -> (l k) d e"),
    ("mlp/in", (2, 8, 24), "l d f -> l d f"),
    ("mlp/in", (2, 8, 2, 24), "l d k f -> (l k) d f"),
  ],
)
def test_all_directions_of_each_kernel_move_alike(path, shape, matrices):
  # Inputs that matter more and less, a thousand times.
  rows = np.logspace(-2, 1, 8)
  gradient = np.random.default_rng(0).standard_normal(shape)
  inputs = (2, 4) if path == "attention/out" else (8,)
  gradient *= rows.reshape(1, *inputs, *(1,) * (len(shape) - len(inputs) - 1))
  tree = jnp.asarray(gradient, jnp.float32)
  for group in reversed(["blocks", *path.split("/"), "kernel"]):
    tree = {group: tree}
  rule = muon.scale(beta=0.9, rms=0.2)
  update, _ = jax.jit(rule.update)(tree, rule.init(tree))
  (update,) = jax.tree.leaves(update)
  assert np.sqrt(np.mean(np.square(update))) == pytest.approx(0.2, rel=0.3)
  for before, after in zip(
    einops.rearrange(gradient, matrices),
    einops.rearrange(np.asarray(update), matrices),
    strict=True,
  ):
    assert _spread(before) > 300.0
    # The polynomial takes each near 1, and not to 1 itself.
    assert _spread(after) < 6.0


def _spread(matrix):
  """Returns by how much the largest singular value exceeds the least."""
  values = np.linalg.svd(matrix, compute_uv=False)
  return values.max() / values.min()


def test_a_network_without_blocks_is_refused():
  config = optim.OptimConfig(name="muon")
  with pytest.raises(ValueError, match="'adamw'"):
    optim.build(config, 10, {"dense": {"kernel": jnp.ones((3, 2))}})
  with pytest.raises(ValueError, match="Did you mean 'muon'"):
    dataclasses.replace(config, name="moun")
