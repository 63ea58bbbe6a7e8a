"""A small classifier of small images, fitted in seconds on one CPU.

Two hidden layers of a plain network, and images that are turned, stretched and
moved a little each time they are seen: a handwritten digit stays what it is
under all three, and 1,400 of them are few.
"""

# Shape suffixes: B batch, N images, H height, W width, C channels, F features,
# K classes.

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.scipy import ndimage

Weights = list[dict[str, jax.Array]]

HIDDEN, FEATURES = 256, 64
STEPS, BATCH = 2000, 128
# The largest rotation in radians, stretch in logarithm, and shift in pixels
# of an 8x8 image.
ROTATION, STRETCH, SHIFT = 0.15, 0.1, 0.6


@dataclasses.dataclass(frozen=True)
class Classifier:
  """A fitted network, computed by numpy."""

  layers: list[dict[str, np.ndarray]]

  def features(self, images_NHWC: np.ndarray) -> np.ndarray:
    """Returns the activations [N, F] before the last layer."""
    h_NF = images_NHWC.reshape(len(images_NHWC), -1).astype(np.float32)
    for layer in self.layers[:-1]:
      h_NF = np.maximum(h_NF @ layer["kernel"] + layer["bias"], 0.0)
    return h_NF

  def predict(self, images_NHWC: np.ndarray) -> np.ndarray:
    """Returns the most likely class of each image."""
    last = self.layers[-1]
    logits_NK = self.features(images_NHWC) @ last["kernel"] + last["bias"]
    return np.argmax(logits_NK, axis=1)


def fit(
  images_NHWC: np.ndarray, labels_N: np.ndarray, *, classes: int, seed: int
) -> Classifier:
  """Fits a classifier; the same seed gives the same one."""
  weights = _fit(
    jnp.asarray(images_NHWC, jnp.float32),
    jnp.asarray(labels_N, jnp.int32),
    jax.random.key(seed),
    classes,
  )
  return Classifier(jax.device_get(weights))


@functools.partial(jax.jit, static_argnums=3)
def _fit(images_NHWC, labels_N, key, classes) -> Weights:
  optimizer = optax.adamw(
    optax.cosine_decay_schedule(3e-3, STEPS), weight_decay=1e-2
  )
  pixels = int(np.prod(images_NHWC.shape[1:]))
  key, key_init = jax.random.split(key)
  weights = _initial(key_init, (pixels, HIDDEN, FEATURES, classes))

  def step(carry, i):
    weights, state = carry
    key_pick, key_move = jax.random.split(jax.random.fold_in(key, i))
    pick_B = jax.random.randint(key_pick, (BATCH,), 0, len(labels_N))
    x_BHWC = move(images_NHWC[pick_B], key_move)
    grads = jax.grad(_loss)(weights, x_BHWC, labels_N[pick_B])
    updates, state = optimizer.update(grads, state, weights)
    return (optax.apply_updates(weights, updates), state), None

  start = (weights, optimizer.init(weights))
  (weights, _), _ = jax.lax.scan(step, start, jnp.arange(STEPS))
  return weights


def _initial(key, sizes) -> Weights:
  """Returns normal kernels of variance 2 / fan_in (arXiv:1502.01852)."""
  pairs = list(zip(sizes[:-1], sizes[1:], strict=True))
  return [
    {
      "kernel": jax.random.normal(k, pair) * np.sqrt(2.0 / pair[0]),
      "bias": jnp.zeros(pair[1]),
    }
    for k, pair in zip(jax.random.split(key, len(pairs)), pairs, strict=True)
  ]


def _loss(weights, x_BHWC, labels_B):
  h_BF = x_BHWC.reshape(len(x_BHWC), -1)
  for layer in weights[:-1]:
    h_BF = jax.nn.relu(h_BF @ layer["kernel"] + layer["bias"][None])
  logits_BK = h_BF @ weights[-1]["kernel"] + weights[-1]["bias"][None]
  return jnp.mean(
    optax.softmax_cross_entropy_with_integer_labels(logits_BK, labels_B)
  )


def move(x_BHWC: jax.Array, key: jax.Array) -> jax.Array:
  """Turns, stretches and moves each image a little, filling with -1.

  The pixel p of the result is read at A (p - centre) + centre + shift, linearly
  between the pixels around.
  """
  batch, height, width, _ = x_BHWC.shape
  key_turn, key_stretch, key_shift = jax.random.split(key, 3)

  def draw(key, shape, largest):
    return jax.random.uniform(key, shape, minval=-largest, maxval=largest)

  turn_B11 = draw(key_turn, (batch, 1, 1), ROTATION)
  stretch_2B11 = jnp.exp(draw(key_stretch, (2, batch, 1, 1), STRETCH))
  shift_2B11 = draw(key_shift, (2, batch, 1, 1), SHIFT / 8)
  y_1HW, x_1HW = (
    grid[None]
    for grid in jnp.meshgrid(
      jnp.arange(height) - (height - 1) / 2,
      jnp.arange(width) - (width - 1) / 2,
      indexing="ij",
    )
  )
  cos_B11, sin_B11 = jnp.cos(turn_B11), jnp.sin(turn_B11)
  row_BHW = (cos_B11 * y_1HW + sin_B11 * x_1HW) * stretch_2B11[0]
  column_BHW = (cos_B11 * x_1HW - sin_B11 * y_1HW) * stretch_2B11[1]
  return _read(
    x_BHWC,
    row_BHW + (height - 1) / 2 + shift_2B11[0] * height,
    column_BHW + (width - 1) / 2 + shift_2B11[1] * width,
  )


def _read(x_BHWC, row_BHW, column_BHW):
  """Reads images at fractional places, -1 outside of them."""

  def read(x_HW, row_HW, column_HW):
    return ndimage.map_coordinates(
      x_HW, [row_HW, column_HW], order=1, mode="constant", cval=-1.0
    )

  of_channels = jax.vmap(read, in_axes=(-1, None, None), out_axes=-1)
  return jax.vmap(of_channels)(x_BHWC, row_BHW, column_BHW)
