"""What is in a picture of digits in colours, and whether that was asked for.

A small detector is fitted on real scenes. It cuts a picture into cells, 4
pixels wide, and says of each which digit has its centre there or in a cell
around, if any, and in which colour.
"""

# Shape suffixes: B batch, H height, W width, C channels, R and X rows and
# columns of cells, F features, K digits and one for none, Q colours.

import collections
import collections.abc
import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

CELL = 4
STEPS, BATCH, LEARNING_RATE = 1000, 64, 2e-3
HIDDEN, FEATURES = 64, 128
MANY = 5.0  # Cells, of nine, that must see the thing.
MOST = 5  # More things than that are not looked for.
_CORNERS = tuple(np.ndindex(2, 2))

Weights = dict[str, dict[str, jax.Array]]
# batch(step) -> images and, for each, what is in it.
Batches = collections.abc.Callable[[int], tuple[np.ndarray, list]]


class Seen(NamedTuple):
  """A digit in a colour, and where its centre is, in pixels."""

  digit: int
  colour: str
  row: float
  column: float


@dataclasses.dataclass(frozen=True)
class Detector:
  """A fitted network, and the colours that it names."""

  weights: Weights
  colours: tuple[str, ...]

  def see(self, images_BHWC: np.ndarray) -> list[list[Seen]]:
    """Returns what is in each picture, the clearest first."""
    clipped_BHWC = np.clip(np.asarray(images_BHWC, np.float32), -1.0, 1.0)
    found = []
    for start in range(0, len(clipped_BHWC), BATCH):
      logits = _logits(self.weights, clipped_BHWC[start : start + BATCH])
      digit_BRXK, colour_BRXQ = (
        np.asarray(jax.nn.softmax(each, axis=-1)) for each in logits
      )
      for digit_RXK, colour_RXQ in zip(digit_BRXK, colour_BRXQ, strict=True):
        found.append(self._read(digit_RXK[..., 1:], colour_RXQ))
    return found

  def _read(self, digit_RXK: np.ndarray, colour_RXQ: np.ndarray) -> list[Seen]:
    """Returns a thing for each three by three cells, most of which say so."""
    there_RX = digit_RXK.sum(axis=-1)
    place_2RX = np.indices(there_RX.shape)
    seen: list[Seen] = []
    while len(seen) < MOST:
      around_RX = _around(there_RX)
      row, column = np.unravel_index(np.argmax(around_RX), around_RX.shape)
      if around_RX[row, column] < MANY:
        break
      near_RX = _within(place_2RX, row, column, 1) * there_RX
      share_RX = near_RX / near_RX.sum()
      digit_K = np.einsum("rx,rxk->k", share_RX, digit_RXK)
      colour_Q = np.einsum("rx,rxq->q", share_RX, colour_RXQ)
      centre = (place_2RX * share_RX).sum(axis=(1, 2)) * CELL + CELL / 2
      seen.append(
        Seen(
          int(np.argmax(digit_K)),
          self.colours[int(np.argmax(colour_Q))],
          *map(float, centre),
        )
      )
      there_RX = there_RX * ~_within(place_2RX, row, column, 1)
    return seen


def fit(
  batches: Batches, *, colours: tuple[str, ...], seed: int, steps: int = STEPS
) -> Detector:
  """Fits a detector on `batches`; the same seed gives the same one."""
  optimizer = optax.adamw(
    optax.cosine_decay_schedule(LEARNING_RATE, steps), weight_decay=1e-2
  )

  @jax.jit
  def begin(key):
    weights = _initial(key, len(colours))
    return weights, optimizer.init(weights)

  weights, state = begin(jax.random.key(seed))

  @functools.partial(jax.jit, donate_argnums=(0, 1))
  def step(weights, state, image, digit, colour):
    grads = jax.grad(_loss)(weights, image, digit, colour)
    updates, state = optimizer.update(grads, state, weights)
    return optax.apply_updates(weights, updates), state

  for i in range(steps):
    image_BHWC, things = batches(i)
    targets = _targets(things, image_BHWC.shape[1:3], colours)
    weights, state = step(weights, state, image_BHWC, *targets)
  return Detector(weights, colours)


def agreement(
  scenes: collections.abc.Sequence[Any],
  seen: collections.abc.Sequence[list[Seen]],
  holds: collections.abc.Callable[[Any, str, Any], bool],
) -> dict[str, float]:
  """Says how much of what was asked for is there, and nothing else.

  `digits` and `colours` are, averaged over pictures, the share that is in both
  of what was asked for and what is seen, of the larger number of the two.
  `relations` is the share of the relations that are said, and that hold between
  things of both the digits and the colours that they are said of.
  """
  shares: dict[str, list] = {"digit": [], "colour": [], "relation": []}
  for scene, found in zip(scenes, seen, strict=True):
    most = max(len(scene.things), len(found))
    for key in ("digit", "colour"):
      asked, there = (
        collections.Counter(getattr(thing, key) for thing in things)
        for things in (scene.things, found)
      )
      shares[key].append((asked & there).total() / most)
    for i, relation, j in scene.relations:
      pairs = [
        (one, other)
        for one in found
        for other in found
        if _same(one, scene.things[i]) and _same(other, scene.things[j])
      ]
      true = any(holds(one, relation, other) for one, other in pairs)
      shares["relation"].append(true)
  return {f"{key}s": float(np.mean(share)) for key, share in shares.items()}


def _same(one: Seen, thing: Any) -> bool:
  return (one.digit, one.colour) == (thing.digit, thing.colour)


def _targets(things: list, size: tuple[int, ...], colours: tuple[str, ...]):
  """Returns for each cell its digit, 0 for none, and its colour."""
  rows, columns = (-(-side // CELL) for side in size)
  digit_BRX = np.zeros((len(things), rows, columns), np.int32)
  colour_BRX = np.zeros_like(digit_BRX)
  for i, each in enumerate(things):
    for thing in each:
      row, column = int(thing.row // CELL), int(thing.column // CELL)
      at = i, slice(row - 1, row + 2), slice(column - 1, column + 2)
      digit_BRX[at] = thing.digit + 1
      colour_BRX[at] = colours.index(thing.colour)
  return digit_BRX, colour_BRX


def _initial(key: jax.Array, colours: int) -> Weights:
  """Returns normal kernels of variance 2 / fan_in (arXiv:1502.01852)."""
  sizes = {
    "cells": ((2 * CELL) ** 2 * 3, HIDDEN),
    "near": (9 * HIDDEN, HIDDEN),
    "far": (9 * HIDDEN, FEATURES),
    "digit": (FEATURES, 11),
    "colour": (FEATURES, colours),
  }
  return {
    name: {
      "kernel": jax.random.normal(k, size) * np.sqrt(2.0 / size[0]),
      "bias": jnp.zeros(size[1]),
    }
    for k, (name, size) in zip(
      jax.random.split(key, len(sizes)), sizes.items(), strict=True
    )
  }


@jax.jit
def _logits(weights: Weights, x_BHWC: jax.Array):
  """Returns the logits of each cell: of its digit, and of its colour."""

  def dense(name, x):
    bias = weights[name]["bias"]
    return x @ weights[name]["kernel"] + bias[(None,) * (x.ndim - 1)]

  # Cells of twice the width, that overlap by half.
  ends = [(CELL // 2, CELL // 2 + -side % CELL) for side in x_BHWC.shape[1:3]]
  x_BHWC = jnp.pad(x_BHWC, ((0, 0), *ends, (0, 0)), constant_values=-1)
  batch, height, width, channels = x_BHWC.shape
  x = x_BHWC.reshape(batch, height // CELL, CELL, width // CELL, CELL, channels)
  x = x.transpose(0, 1, 3, 2, 4, 5).reshape(*x.shape[:2], x.shape[3], -1)
  x_BRXF = jnp.concatenate(
    [x[:, r : r - 1 or None, c : c - 1 or None] for r, c in _CORNERS], axis=-1
  )
  h_BRXF = jax.nn.relu(dense("cells", x_BRXF))
  for name in ("near", "far"):
    h_BRXF = jax.nn.relu(dense(name, _neighbours(h_BRXF)))
  return dense("digit", h_BRXF), dense("colour", h_BRXF)


def _neighbours(h_BRXF: jax.Array) -> jax.Array:
  """Returns the features of a cell and of the eight around it."""
  rows, columns = h_BRXF.shape[1:3]
  padded = jnp.pad(h_BRXF, ((0, 0), (1, 1), (1, 1), (0, 0)))
  return jnp.concatenate(
    [padded[:, r : r + rows, c : c + columns] for r, c in np.ndindex(3, 3)],
    axis=-1,
  )


def _loss(weights, image_BHWC, digit_BRX, colour_BRX) -> jax.Array:
  """Returns the cross-entropy of digits in all cells, of colours in theirs."""
  digit_BRXK, colour_BRXQ = _logits(weights, image_BHWC)
  entropy = optax.softmax_cross_entropy_with_integer_labels
  there_BRX = digit_BRX > 0
  loss_BRX = entropy(digit_BRXK, digit_BRX)
  loss_BRX += jnp.where(there_BRX, entropy(colour_BRXQ, colour_BRX), 0.0)
  return jnp.sum(loss_BRX) / len(image_BHWC)


def _around(there_RX: np.ndarray) -> np.ndarray:
  """Returns the sum over each cell and the eight around it."""
  rows, columns = there_RX.shape
  padded = np.pad(there_RX, 1)
  near = [padded[r : r + rows, c : c + columns] for r, c in np.ndindex(3, 3)]
  return np.sum(near, axis=0)


def _within(place_2RX, row, column, reach: int) -> np.ndarray:
  """Marks the cells at most so far from one."""
  away_2RX = np.abs(place_2RX - np.reshape([row, column], (2, 1, 1)))
  return np.max(away_2RX, axis=0) <= reach
