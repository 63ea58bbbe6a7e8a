"""What a network is asked to draw, besides what its labels or texts say.

A task makes of a batch one with its condition, on the devices, as a pure
function of the batch and the rng of the loss: the order of the data, the mesh
and whoever reads know nothing of it. Inpainting and super-resolution are told
by channels beside those of the image, cond["context"] (arXiv:2112.10752,
section 3.3), which `model.context_channels` counts.

Of latents the mask has the resolution of the latents, and what is masked or
made small are the latents themselves: no autoencoder is needed to train.
"""

# Shape suffixes: B batch, H height, W width, C channels, K channels of a
# context, h and w those of a smaller image; S corners or segments of a brush
# stroke, 2 row and column.

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from flowjax import schema
from flowjax.data import alone
from flowjax.flow import losses

Batch = Mapping[str, Any]

# Keeps these draws apart from all that the loss makes of its own rng.
_TASK = 0x7A5C
# What tasks make of images, beside what a source says of them.
MADE = ("context", "original", "original_mask", "embedding_mask")
# A brush stroke has so many corners, and turns about so far at each (radians).
_CORNERS, _TURN = 6, 0.9


@dataclasses.dataclass(frozen=True)
class TaskConfig:
  """A task by its name in `TASKS`, and what it is made with.

  inpainting: a share of the area, uniform in `hole`, is to be drawn anew: of
  the masks, `whole` are of the whole image, and of the others `boxes` are boxes
  and the rest strokes of a brush.
  super_resolution: an image is told that is `factor` times smaller, and to
  which noise of a standard deviation uniform in [0, `noise`] was added, which
  is told too (cascaded diffusion, arXiv:2106.15282, section 4.2).
  layout: what is in which box, by `config.layout` and `config.data.boxes`.
  variation: the image itself, through the few numbers of `config.embedding`; in
  training an encoder that is learned sees it in noise of the standard deviation
  `noise`.
  """

  name: str = "none"
  hole: tuple[float, float] = (0.1, 0.5)
  boxes: float = 0.5
  whole: float = 0.1
  factor: int = 4
  noise: float = 0.0

  def __post_init__(self):
    if self.name not in TASKS:
      raise ValueError(
        f"name = {self.name!r}. {schema.closest(self.name, TASKS)}"
      )
    for field in dataclasses.fields(self)[1:]:
      value, heeded = getattr(self, field.name), TASKS[self.name].options
      if field.name not in heeded and value != field.default:
        raise ValueError(
          f"{field.name} = {value} would be without effect on the task "
          f"{self.name!r}; leave it as it is by default, {field.default}."
        )
    if len(self.hole) != 2 or not 0.0 < self.hole[0] <= self.hole[1] <= 1.0:
      raise ValueError(
        f"hole = {self.hole} must be the least and the largest share of an "
        "image that is drawn anew: above 0, and at most 1."
      )
    for name in ("boxes", "whole"):
      if not 0.0 <= getattr(self, name) <= 1.0:
        raise ValueError(
          f"{name} = {getattr(self, name)} is a probability: from 0 to 1."
        )
    if self.factor < 2:
      raise ValueError(f"factor = {self.factor} must be at least 2.")
    if self.noise < 0.0:
      raise ValueError(f"noise = {self.noise} must not be negative.")

  def channels(self, of_image: int) -> int:
    """Returns how many channels the context has beside those of the image."""
    return TASKS[self.name].channels(self, of_image)

  def add(self, batch: Batch, rng: jax.Array) -> dict[str, Any]:
    """Returns the batch with the condition that the task makes of it."""
    key = jax.random.fold_in(rng, _TASK)
    return TASKS[self.name].add(self, batch, key)

  def drawn(self) -> "TaskConfig":
    """Returns the task as one draws by it: a variation is told no noise."""
    if self.name != "variation":
      return self
    return dataclasses.replace(self, noise=0.0)

  def prepared(self, loss: losses.Loss) -> losses.Loss:
    """Returns a loss of batches without the condition, from one of those with.

    Of "none" it is the loss itself.
    """
    if self.name == "none":
      return loss

    def told(params, batch, rng):
      return loss(params, self.add(batch, rng), rng)

    return told

  def shown(self, context_BHWK: Any, of_image: int) -> Any:
    """Returns the part of a context that is an image, to look at."""
    first = TASKS[self.name].first
    return context_BHWK[..., first : first + of_image]

  def check(self, model: Any, sizes: Sequence[tuple[int, int]]) -> None:
    """Raises ValueError for a network, and sizes of images, it is not for."""
    if self.name == "none":
      return
    wanted = self.channels(model.channels)
    found = getattr(model, "context_channels", None)
    if found is None and wanted:
      raise ValueError(
        f"name = {self.name!r}: a model {model.name!r} reads no image beside "
        "its own; take a 'dit', an 'mmdit' or a 'flux'."
      )
    if (found or 0) != wanted:
      raise ValueError(
        f"name = {self.name!r} tells {wanted} channels beside the "
        f"{model.channels} of the image, and model.context_channels = {found}: "
        f"set config.model.context_channels={wanted}."
      )
    for size in sizes:
      TASKS[self.name].check(self, size)


def inpainting_context(
  image_BHWC: jax.typing.ArrayLike, mask_BHW1: jax.typing.ArrayLike
) -> jax.Array:
  """Returns the mask, then the image with zeros where the mask is 1.

  Where it is 1 is to be drawn anew; of a grey one it is told where it is above
  0.5, as training knows no other. The order of latent diffusion's and SD3's
  networks for inpainting; theirs encode the image after it was masked.
  """
  image_BHWC = jnp.asarray(image_BHWC)
  anew_BHW1 = jnp.asarray(mask_BHW1) > 0.5
  masked_BHWC = jnp.where(anew_BHW1, 0.0, image_BHWC)
  told_BHW1 = anew_BHW1.astype(image_BHWC.dtype)
  return jnp.concatenate([told_BHW1, masked_BHWC], axis=-1)


def super_resolution_context(
  low_BhwC: jax.typing.ArrayLike,
  size: tuple[int, int],
  level_B: jax.typing.ArrayLike | None = None,
) -> jax.Array:
  """Returns a small image at the `size` of what is drawn, by bilinear steps.

  With `level_B`, the standard deviation of noise that was added to it, that is
  the last channel: 0 for an image as it is.
  """
  low_BhwC = jnp.asarray(low_BhwC)
  batch, _, _, channels = low_BhwC.shape
  up_BHWC = jax.image.resize(low_BhwC, (batch, *size, channels), "bilinear")
  if level_B is None:
    return up_BHWC
  level_B111 = jnp.asarray(level_B, up_BHWC.dtype)[:, None, None, None]
  level_BHW1 = jnp.broadcast_to(level_B111, (batch, *size, 1))
  return jnp.concatenate([up_BHWC, level_BHW1], axis=-1)


def lowered(image_BHWC: jax.typing.ArrayLike, factor: int) -> jax.Array:
  """Returns the means of squares of `factor` x `factor` pixels."""
  image_BHWC = jnp.asarray(image_BHWC)
  batch, height, width, channels = image_BHWC.shape
  parts = image_BHWC.reshape(
    batch, height // factor, factor, width // factor, factor, channels
  )
  return jnp.mean(parts, axis=(2, 4))


def masks(
  config: TaskConfig, rng: jax.Array, count: int, size: tuple[int, int]
) -> jax.Array:
  """Draws masks [B, H, W, 1], 1 where an image is to be drawn anew.

  A hole is the share of the pixels that is nearest to a shape, a point for
  boxes and a path for strokes, so that its area has the law it is said to have:
  of strokes to the pixel, of boxes to the row or column that closes them.
  """

  def one(key):
    keys = jax.random.split(key, 5)
    share = jax.random.uniform(
      keys[0], minval=config.hole[0], maxval=config.hole[1]
    )
    is_box = jax.random.bernoulli(keys[1], config.boxes)
    is_whole = jax.random.bernoulli(keys[2], config.whole)
    far_HW = jnp.where(
      is_box, _from_box(keys[3], size), _from_stroke(keys[4], size)
    )
    pixels = size[0] * size[1]
    last = jnp.ceil(share * pixels).astype(jnp.int32) - 1
    reach = jnp.sort(far_HW.ravel())[jnp.clip(last, 0, pixels - 1)]
    return (is_whole | (far_HW <= reach)).astype(jnp.float32)[..., None]

  each = jax.vmap(lambda i: one(jax.random.fold_in(rng, i)))
  return each(jnp.arange(count))


def _from_box(key: jax.Array, size: tuple[int, int]) -> jax.Array:
  """Returns how far pixels are from a point, as boxes of one aspect grow."""
  key_centre, key_aspect = jax.random.split(key)
  centre_2 = jax.random.uniform(key_centre, (2,)) * jnp.array(size)
  aspect = 2.0 ** jax.random.uniform(key_aspect, minval=-0.5, maxval=0.5)
  away_HW2 = jnp.abs(_pixels(size) - centre_2[None, None])
  return jnp.maximum(away_HW2[..., 0] * aspect, away_HW2[..., 1] / aspect)


def _from_stroke(key: jax.Array, size: tuple[int, int]) -> jax.Array:
  """Returns how far pixels are from a path that wanders over the image."""
  key_start, key_turn, key_step = jax.random.split(key, 3)
  start_2 = jax.random.uniform(key_start, (2,))
  turn_S = _TURN * jax.random.normal(key_turn, (_CORNERS - 1,))
  angle_S = jnp.cumsum(turn_S.at[0].multiply(jnp.pi / _TURN))
  step_S = jax.random.uniform(key_step, angle_S.shape, minval=0.1, maxval=0.4)
  steps_S2 = step_S[:, None] * jnp.stack(
    [jnp.sin(angle_S), jnp.cos(angle_S)], axis=-1
  )
  path_S2 = jnp.concatenate(
    [start_2[None], start_2[None] + jnp.cumsum(steps_S2, 0)]
  )
  # Beyond an edge a path comes back, as from a mirror.
  path_S2 = (1.0 - jnp.abs(1.0 - path_S2 % 2.0)) * jnp.array(size)[None]

  def gap(pixel_2, corner_2, along_2):
    away_2, length = pixel_2 - corner_2, jnp.dot(along_2, along_2)
    at = jnp.clip(jnp.dot(away_2, along_2) / (length + 1e-12), 0.0, 1.0)
    return jnp.sum((away_2 - at * along_2) ** 2)

  to_segments = jax.vmap(gap, (None, 0, 0))
  to_path = jax.vmap(jax.vmap(to_segments, (0, None, None)), (0, None, None))
  gap_HWS = to_path(_pixels(size), path_S2[:-1], path_S2[1:] - path_S2[:-1])
  return jnp.min(gap_HWS, axis=-1)


def _pixels(size: tuple[int, int]) -> jax.Array:
  """Returns where the middles of pixels are, [H, W, 2]."""
  rows, columns = (jnp.arange(side) + 0.5 for side in size)
  return jnp.stack(jnp.meshgrid(rows, columns, indexing="ij"), axis=-1)


@dataclasses.dataclass(frozen=True)
class Task:
  """How a task is told: by so many channels, and by what it adds to a batch.

  `options` are those of a `TaskConfig` that it heeds.
  `channels(config, of_image)`; `add(config, batch, rng)` is pure; and
  `check(config, size)` raises ValueError for images that it is not for.
  Among the channels an image begins at the `first`.
  """

  channels: Callable[[TaskConfig, int], int] = lambda config, of_image: 0
  add: Callable[[TaskConfig, Batch, jax.Array], dict[str, Any]] = (
    lambda config, batch, rng: dict(batch)
  )
  check: Callable[[TaskConfig, tuple[int, int]], None] = lambda config, size: (
    None
  )
  first: int = 0
  options: tuple[str, ...] = ()


def _add_mask(config: TaskConfig, batch: Batch, rng: jax.Array):
  image_BHWC = batch["image"]
  mask_BHW1 = masks(config, rng, len(image_BHWC), image_BHWC.shape[1:3])
  return {**batch, "context": inpainting_context(image_BHWC, mask_BHW1)}


def _add_low(config: TaskConfig, batch: Batch, rng: jax.Array):
  image_BHWC = batch["image"]
  low_BhwC, level_B = lowered(image_BHWC, config.factor), None
  if config.noise:
    key_level, key_noise = jax.random.split(rng)
    level_B = jax.random.uniform(
      key_level, (len(low_BhwC),), maxval=config.noise
    )
    noise_BhwC = jax.random.normal(key_noise, low_BhwC.shape)
    low_BhwC = low_BhwC + level_B[:, None, None, None] * noise_BhwC
  size = image_BHWC.shape[1:3]
  context_BHWK = super_resolution_context(low_BhwC, size, level_B)
  return {**batch, "context": context_BHWK}


def _check_factor(config: TaskConfig, size: tuple[int, int]) -> None:
  if any(side % config.factor for side in size):
    raise ValueError(
      f"factor = {config.factor} does not divide images of {size[0]}x{size[1]}:"
      " take one that does."
    )


def _add_original(config: TaskConfig, batch: Batch, rng: jax.Array):
  image_BHWC = batch["image"]
  # What else is said of an image would have to be said of its variations.
  rest = alone.untold(batch)
  there_B = jnp.ones(len(image_BHWC), bool)
  if "embedding" in batch:
    rest["embedding_mask"] = there_B
  original_BHWC = image_BHWC
  if config.noise:
    noise_BHWC = jax.random.normal(rng, image_BHWC.shape)
    original_BHWC = image_BHWC + config.noise * noise_BHWC
  return {**rest, "original": original_BHWC, "original_mask": there_B}


TASKS: dict[str, Task] = {
  "none": Task(),
  "layout": Task(),  # The data has the boxes.
  "variation": Task(add=_add_original, options=("noise",)),
  "inpainting": Task(
    channels=lambda config, of_image: 1 + of_image,
    add=_add_mask,
    first=1,
    options=("hole", "boxes", "whole"),
  ),
  "super_resolution": Task(
    channels=lambda config, of_image: of_image + bool(config.noise),
    add=_add_low,
    check=_check_factor,
    options=("factor", "noise"),
  ),
}
