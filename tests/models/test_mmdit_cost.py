"""Parameters and arithmetic, counted without computing anything."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest

from flowjax import models
from flowjax.models import blocks, conditions, mmdit
from flowjax.parallel import flops as counter

# Without the fixed table of positions, which is not trained.
PUBLISHED = {
  "sd3_medium": 2_028_328_000,
  "sd3.5_medium": 2_243_171_520,
  "sd3.5_large": 8_056_627_520,
}
SMALL = mmdit.MMDiTConfig(
  image_size=(8, 12),
  channels=4,
  depth=2,
  heads=4,
  head_size=8,
  text_width=24,
  pooled_width=12,
  text_tokens=5,
)


def abstract(network):
  return jax.eval_shape(network.init, jax.random.key(0))


@pytest.mark.parametrize("size", mmdit.SIZES)
def test_parameters_are_the_published(size):
  network = models.build(mmdit.MMDiTConfig(**mmdit.SIZES[size]))
  leaves = jax.tree.leaves(abstract(network))
  assert sum(math.prod(leaf.shape) for leaf in leaves) == PUBLISHED[size]


# Counted by hand for a picture of 1024 x 1024, in 10^12.
@pytest.mark.parametrize(
  "size, tera", [("sd3_medium", 8.44), ("sd3.5_large", 29.6)]
)
def test_flops_of_the_published(size, tera):
  config = mmdit.MMDiTConfig(**mmdit.SIZES[size])
  h, d, text, image = config.width, config.depth, 154, 64 * 64
  tokens = 24 * h**2 * (text + image) + 4 * (text + image) ** 2 * h
  by_hand = d * tokens + d * 2 * 12 * h**2
  assert mmdit.flops(config) == pytest.approx(by_hand, rel=2e-3)
  assert mmdit.flops(config) == pytest.approx(tera * 1e12, rel=2e-3)


def shapes_of(config, batch):
  image = (batch, *config.image_size, config.channels)
  return (
    jax.ShapeDtypeStruct(image, jnp.float32),
    jax.ShapeDtypeStruct((batch,), jnp.float32),
    jax.eval_shape(lambda: conditions.example(config, batch)),
  )


@pytest.mark.parametrize(
  "changes",
  [
    dict(),
    dict(depth=1, out_channels=6, patch_size=4),
    dict(depth=5, dual_layers=2, qk_norm=True, mlp_ratio=3.0),
    dict(num_classes=10, label_tokens=3, position="rope2d", dtype="bfloat16"),
    dict(depth=4, dual_layers=3, scan=False, remat="full"),
  ],
  ids=str,
)
def test_flops_are_those_of_the_program(changes):
  net = models.build(dataclasses.replace(SMALL, **changes))
  program = jax.make_jaxpr(net.apply)(abstract(net), *shapes_of(net.config, 3))
  assert counter.count(program.jaxpr).flops == 3 * net.flops


@pytest.mark.slow(1)
def test_flops_are_what_the_compiler_counts():
  """It counts norms, softmax and activations too, which are a small part."""
  net = models.build(
    dataclasses.replace(SMALL, head_size=64, depth=3, dual_layers=1, scan=False)
  )
  program = jax.jit(net.apply).lower(abstract(net), *shapes_of(net.config, 1))
  counted = program.cost_analysis()["flops"]
  assert 1.0 < counted / net.flops < 1.05


def program_size(depth, dual_layers, scan=True):
  """Counts the lines of a program, in which a loop is one turn."""
  net = models.build(
    dataclasses.replace(SMALL, depth=depth, dual_layers=dual_layers, scan=scan)
  )
  program = jax.jit(net.apply).lower(abstract(net), *shapes_of(net.config, 1))
  return program.as_text().count("\n")


@pytest.mark.slow(1)
def test_the_program_does_not_grow_with_depth():
  """So that compiling 38 layers costs what compiling 4 does."""
  assert program_size(38, 13) == program_size(4, 2)
  unrolled = [program_size(n, 0, scan=False) for n in (2, 3)]
  assert unrolled[0] < unrolled[1]


def training_flops(remat):
  net = models.build(dataclasses.replace(SMALL, depth=4, remat=remat))

  def scalar(params, *inputs):
    return jnp.sum(net.apply(params, *inputs))

  program = jax.make_jaxpr(jax.grad(scalar))(
    abstract(net), *shapes_of(net.config, 1)
  )
  return counter.count(program.jaxpr).flops


@pytest.mark.slow(2)
def test_what_is_not_kept_is_computed_again():
  counted = [training_flops(remat) for remat in blocks.REMAT]
  none, matmuls, dots, save_attention, full, *offloaded = counted
  assert none <= matmuls < dots < save_attention < full
  assert offloaded == [matmuls, save_attention]
  assert full - none > 0.9 * mmdit.flops(dataclasses.replace(SMALL, depth=4))
