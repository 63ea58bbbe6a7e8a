"""Parameters and arithmetic, counted without computing anything."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest

from flowjax import models
from flowjax.models import flux
from flowjax.parallel import flops as counter

PUBLISHED = {"dev": 11_901_408_320, "schnell": 11_891_178_560}
SMALL = flux.FluxConfig(
  image_size=(8, 12),
  channels=4,
  width=32,
  heads=2,
  double_depth=2,
  single_depth=3,
  text_width=24,
  pooled_width=12,
  text_tokens=5,
  rope_axes=(4, 6, 6),
)


def abstract(network):
  return jax.eval_shape(network.init, jax.random.key(0))


@pytest.mark.parametrize("size", flux.SIZES)
def test_parameters_are_the_published(size):
  network = models.build(flux.FluxConfig(**flux.SIZES[size]))
  leaves = jax.tree.leaves(abstract(network))
  assert sum(math.prod(leaf.shape) for leaf in leaves) == PUBLISHED[size]


@pytest.mark.parametrize("side, tera", [(64, 21.5), (128, 74.4)])
def test_flops_of_the_published(side, tera):
  """At 512 and 1024 pixels with 512 tokens of text, in 10^12."""
  config = flux.FluxConfig(image_size=(side, side))
  h, tokens = 3072, 512 + side**2 // 4
  by_hand = 57 * (24 * tokens * h**2 + 4 * tokens**2 * h)
  by_hand += (19 * 12 + 38 * 3) * 2 * h**2
  assert flux.flops(config) == pytest.approx(by_hand, rel=2e-3)
  assert flux.flops(config) == pytest.approx(tera * 1e12, rel=2e-3)


def shapes_of(network, batch):
  image = (batch, *network.config.image_size, network.config.channels)
  return (
    jax.ShapeDtypeStruct(image, jnp.float32),
    jax.ShapeDtypeStruct((batch,), jnp.float32),
    jax.eval_shape(lambda: network.example(batch)),
  )


@pytest.mark.parametrize(
  "changes",
  [
    dict(),
    dict(guidance_embed=False, patch_size=4, mlp_ratio=3.0),
    dict(num_classes=10, label_tokens=3, dtype="bfloat16"),
    dict(single_depth=1, scan=False, remat="full"),
  ],
  ids=str,
)
def test_flops_are_those_of_the_program(changes):
  net = models.build(dataclasses.replace(SMALL, **changes))
  program = jax.make_jaxpr(net.apply)(abstract(net), *shapes_of(net, 3))
  assert counter.count(program.jaxpr).flops == 3 * net.flops


def test_flops_are_what_the_compiler_counts():
  """It counts norms, softmax and activations too, which are a small part."""
  net = models.build(
    dataclasses.replace(
      SMALL, width=256, rope_axes=(16, 56, 56), text_tokens=77, scan=False
    )
  )
  program = jax.jit(net.apply).lower(abstract(net), *shapes_of(net, 1))
  counted = program.cost_analysis()["flops"]
  assert 1.0 < counted / net.flops < 1.05


def program_size(gradient=False, **changes):
  """Counts the lines of a program, in which a loop is one turn."""
  net = models.build(dataclasses.replace(SMALL, **changes))

  def scalar(params, *inputs):
    return jnp.sum(net.apply(params, *inputs))

  program = jax.jit(jax.grad(scalar) if gradient else net.apply)
  text = program.lower(abstract(net), *shapes_of(net, 1)).as_text()
  return text.count("\n")


@pytest.mark.slow(1)
def test_the_program_does_not_grow_with_depth():
  """So that compiling 19 + 38 layers costs what compiling 4 + 8 does."""
  published = program_size(double_depth=19, single_depth=38)
  assert published == program_size(double_depth=4, single_depth=8)
  shallow, deep = (
    program_size(True, double_depth=n, single_depth=2 * n) for n in (4, 19)
  )
  assert published < shallow == deep
  unrolled = [
    program_size(double_depth=1, single_depth=n, scan=False) for n in (1, 2)
  ]
  assert unrolled[0] < unrolled[1]


def kept(remat):
  """Values per token and unit of width that a single block keeps."""
  config = dataclasses.replace(
    SMALL,
    image_size=(32, 32),
    width=256,
    rope_axes=(16, 56, 56),
    dtype="bfloat16",
    remat=remat,
  )
  net = models.build(config)
  params, batch = abstract(net), 2
  tokens = config.text_tokens + 16 * 16

  def pull(params, *inputs):
    return jax.vjp(lambda params: net.apply(params, *inputs), params)[1]

  leaves = jax.tree.leaves(jax.eval_shape(pull, params, *shapes_of(net, batch)))
  return sum(
    math.prod(leaf.shape) / (config.single_depth * batch * tokens * 256)
    for leaf in leaves
    if leaf.shape[:2] == (config.single_depth, batch)
    and math.prod(leaf.shape[2:]) >= tokens * 256
  )


@pytest.mark.parametrize(
  "remat, values",
  [("matmuls", 10), ("save_attention", 5), ("full", 1)],
)
def test_each_remat_policy_keeps_what_it_says(remat, values):
  """The input; queries, keys, values and their answer; MLP and the sum.

  Of the two terms of the sum neither is kept.
  """
  assert kept(remat) == values
