"""What the tests of networks on a mesh share: one device, and eight."""

import collections
import re

import jax
import jax.numpy as jnp
import numpy as np

from flowjax import models

# How devices may hear of each other's tokens; sums are of gradients.
MOVES = {
  "ring": {"collective-permute", "all-reduce"},
  "ulysses": {"all-to-all", "all-reduce"},
}
_KINDS = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"


def step(config, params, batch):
  """Returns what a network makes of a batch (x, t, cond), and a gradient."""
  network = models.build(config)

  def scalar(params):
    v_BHWC = network.apply(params, *batch)
    return jnp.mean(jnp.square(v_BHWC - batch[0])), v_BHWC

  gradient, v_BHWC = jax.grad(scalar, has_aux=True)(params)
  return v_BHWC, gradient


def check(found, wanted, sizes):
  """Holds a result and its gradient against those of one device."""
  (v_BHWC, gradient), (wanted_v, wanted_gradient) = found, wanted
  np.testing.assert_allclose(
    v_BHWC, wanted_v, atol=1e-5 * np.abs(wanted_v).max()
  )
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5 * np.abs(b).max()),
    gradient,
    wanted_gradient,
  )
  # It was really shared out: each device has its part of the result.
  rows = len(wanted_v) // (sizes.get("data", 1) * sizes.get("fsdp", 1))
  assert v_BHWC.addressable_shards[0].data.shape[0] == rows


def check_moves(program, body):
  """Holds what a program sends against what a body of attention may."""
  if body in MOVES:
    found = moves(program)
    # The image is put together from its tokens, at the very end.
    assert found.pop("all-gather") >= 1
    assert set(found) == MOVES[body] - {"all-gather"}


def moves(program):
  """Counts the collectives of a program; a loop over blocks counts once."""
  text = program.as_text()
  return collections.Counter(re.findall(rf" ({_KINDS})(?:-start)?\(", text))


def summed(program):
  """Counts the arrays that are added up, if nothing else moves."""
  # Several arrays may go together; a loop over blocks counts once.
  text = program.as_text()
  found = re.findall(rf" = (.*?) ({_KINDS})(?:-start)?\(", text)
  assert {kind for _, kind in found} == {"all-reduce"}
  return sum(shapes.count("[") for shapes, _ in found)
