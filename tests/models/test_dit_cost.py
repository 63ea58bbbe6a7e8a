"""Parameters and arithmetic, counted without computing anything."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowjax import models
from flowjax.models import dit
from flowjax.parallel import flops as counter

# Trainable parameters of the paper's models: 256 latents of 4 channels, mean
# and variance out. DiT-XL/2 prints 675,129,632 with its fixed position table
# of 256 x 1152.
PUBLISHED = {
  ("xl", 2): 675_129_632 - 256 * 1152,
}
# The paper's table 4, in units of 10^6 and 10^9 multiply-adds at 256 tokens.
MILLIONS = {"s": 33, "b": 130, "l": 458, "xl": 675}
GIGA_MACS = {
  ("s", 8): 0.36, ("s", 4): 1.41, ("s", 2): 6.06,
  ("b", 8): 1.42, ("b", 4): 5.56, ("b", 2): 23.01,
  ("l", 8): 5.01, ("l", 4): 19.70, ("l", 2): 80.71,
  ("xl", 8): 7.39, ("xl", 4): 29.05, ("xl", 2): 118.64,
}  # fmt: skip


def network(size, patch, **changes):
  changes = dict(out_channels=8, position="sincos2d") | changes
  return models.build(
    dit.DiTConfig(**dit.SIZES[size], patch_size=patch, **changes)
  )


def count(network):
  shapes = jax.eval_shape(network.init, jax.random.key(0))
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))


def by_hand(size, patch):
  """Adds up weights and biases, layer by layer, of the paper's figure 3."""
  depth, d, _ = dit.SIZES[size].values()

  def linear(fan_in, fan_out):
    return fan_in * fan_out + fan_out

  block = linear(d, 6 * d) + linear(d, 3 * d) + linear(d, d)
  block += linear(d, 4 * d) + linear(4 * d, d)
  ends = linear(4 * patch**2, d) + linear(d, 2 * d) + linear(d, 8 * patch**2)
  conditions = linear(256, d) + linear(d, d) + 1001 * d
  return depth * block + ends + conditions


@pytest.mark.parametrize("patch", [2, 4, 8])
@pytest.mark.parametrize("size", dit.SIZES)
def test_parameters_are_the_papers(size, patch):
  parameters = count(network(size, patch))
  assert parameters == by_hand(size, patch)
  assert parameters == PUBLISHED.get((size, patch), parameters)
  assert abs(parameters / 1e6 - MILLIONS[size]) < 1.5


@pytest.mark.parametrize("size, patch", GIGA_MACS)
def test_flops_are_the_papers(size, patch):
  assert network(size, patch).flops == pytest.approx(
    2e9 * GIGA_MACS[size, patch], rel=0.02
  )


@pytest.mark.parametrize(
  "changes",
  [
    dict(),
    dict(mlp="swiglu", qk_norm=True, position="learned", num_classes=10),
    dict(image_size=(16, 24), out_channels=8, patch_size=4, mlp_ratio=3.0),
    dict(scan=False, remat="full", dtype="bfloat16", depth=3),
  ],
)
def test_flops_are_those_of_the_program(changes):
  changes = dict(width=64, depth=2, heads=4, image_size=(16, 16)) | changes
  net = models.build(dit.DiTConfig(**changes))
  params = jax.eval_shape(net.init, jax.random.key(0))
  batch, image = 3, (*net.config.image_size, net.config.channels)
  program = jax.make_jaxpr(net.apply)(
    params,
    jax.ShapeDtypeStruct((batch, *image), jnp.float32),
    jax.ShapeDtypeStruct((batch,), jnp.float32),
    {"label": jax.ShapeDtypeStruct((batch,), np.int32)},
  )
  assert counter.count(program.jaxpr).flops == batch * net.flops


def program_size(**changes):
  """Counts the lines of a program, in which a loop is one turn."""
  net = models.build(dit.DiTConfig(width=32, heads=4, **changes))
  params = jax.eval_shape(net.init, jax.random.key(0))
  x, t, label = np.zeros((1, 32, 32, 4)), np.zeros(1), np.zeros(1, np.int32)
  program = jax.jit(net.apply).lower(params, x, t, {"label": label})
  return program.as_text().count("\n")


@pytest.mark.slow(1)
def test_the_program_does_not_grow_with_depth():
  """So that compiling 28 layers costs what compiling 2 does."""
  assert program_size(depth=28) == program_size(depth=2)
  assert program_size(depth=4, scan=False) > program_size(depth=2, scan=False)


def kept_bytes(**changes):
  """Bytes per token, layer and unit of width that wait for the gradient."""
  config = dit.DiTConfig(
    width=256, heads=4, depth=3, dtype="bfloat16", **changes
  )
  net = models.build(config)
  params = jax.eval_shape(net.init, jax.random.key(0))
  batch = 2

  def pull(params, x, t, label):
    def network(params):
      return net.apply(params, x, t, {"label": label})

    return jax.vjp(network, params)[1]

  kept = jax.eval_shape(
    pull,
    params,
    jax.ShapeDtypeStruct((batch, 32, 32, 4), jnp.float32),
    jax.ShapeDtypeStruct((batch,), jnp.float32),
    jax.ShapeDtypeStruct((batch,), np.int32),
  )
  shapes = {leaf.shape for leaf in jax.tree.leaves(params)}
  total = sum(
    math.prod(leaf.shape) * leaf.dtype.itemsize
    for leaf in jax.tree.leaves(kept)
    if leaf.shape[:1] == (config.depth,) and leaf.shape not in shapes
  )
  return total / (config.depth * batch * 256 * config.width)


@pytest.mark.parametrize(
  "remat, most",
  [
    ("none", 36.5),
    ("matmuls", 22.5),
    ("dots", 20.5),
    ("save_attention", 10.5),
    ("full", 2.5),
  ],
)
def test_each_remat_policy_keeps_what_it_says(remat, most):
  """18 bfloat16 values without remat, 11, 10, 5 and 1 (an MLP of ratio 4)."""
  assert most - 1 < kept_bytes(remat=remat) <= most
