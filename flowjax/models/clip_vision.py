"""The image encoder of CLIP (arXiv:2103.00020), and what it is shown.

A transformer whose tokens are patches and one more, which in the end says what
the image is: its embedding, in the space of the texts.
"""

# Shape suffixes: B batch, H height, W width, C channels, T patches, L = T + 1
# tokens, E width, P width of the embedding; V one flattened patch.

import dataclasses
import typing
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from flowjax.models import blocks, clip, layers, patches
from flowjax.ops import axes

# 303,966,208 and 87,849,216 parameters; G is OpenCLIP's, of 1,844,907,264.
SIZES: dict[str, dict[str, Any]] = {
  "l_14": dict(patch_size=14, width=1024, depth=24, heads=16, projection=768),
  "b_32": dict(),
  "big_g_14": dict(
    patch_size=14,
    width=1664,
    depth=48,
    heads=16,
    mlp_width=8192,
    activation="gelu",
    projection=1280,
  ),
}
# Of the images of its training, in red, green and blue, from 0 to 1.
MEAN = (0.48145466, 0.4578275, 0.40821073)
DEVIATION = (0.26862954, 0.26130258, 0.27577711)


@dataclasses.dataclass(frozen=True)
class ClipVisionConfig:
  """What an image encoder of CLIP is made of."""

  causal: ClassVar[bool] = False  # Patches see each other.
  skip: ClassVar[int] = 0

  name: str = "clip_vision"
  image_size: int = 224
  patch_size: int = 32
  width: int = 768
  depth: int = 12
  heads: int = 12
  mlp_width: int = 0  # 0: four times the width
  activation: str = "quick_gelu"
  projection: int = 512
  epsilon: float = 1e-5
  dtype: str = "float32"

  def __post_init__(self):
    if self.mlp_width == 0:
      object.__setattr__(self, "mlp_width", 4 * self.width)
    clip.check(
      self,
      "clip_vision",
      "image_size patch_size width depth heads projection",
    )
    if self.image_size % self.patch_size:
      raise ValueError(
        f"patch_size={self.patch_size} does not divide image_size="
        f"{self.image_size}."
      )

  @property
  def patches(self) -> int:
    return (self.image_size // self.patch_size) ** 2


class Encoder(nn.Module):
  """From an image, as CLIP is shown it, to its embedding."""

  config: ClipVisionConfig

  @nn.compact
  def __call__(self, x_BHWC: jax.Array) -> jax.Array:
    config, dtype = self.config, blocks.DTYPES[self.config.dtype]
    x_BTE = layers.Dense(
      (config.width,),
      dtype=dtype,
      init_kernel=layers.normal,
      bias=False,
      name="patch_embed",
    )(patches.patchify(x_BHWC, config.patch_size))
    class_E = self.param("class_embed", layers.normal, (config.width,))
    place_LE = layers.Table(
      config.patches + 1, config.width, name="pos_embed"
    )()
    class_B1E = jnp.broadcast_to(class_E, (len(x_BTE), 1, config.width))
    x_BLE = jnp.concatenate(
      [class_B1E.astype(jnp.float32), x_BTE.astype(jnp.float32)], axis=1
    )
    x_BLE = x_BLE + place_LE[None].astype(jnp.float32)
    x_BLE = clip.LayerNorm(config.epsilon, name="first_norm")(x_BLE)
    x_BLE = axes.name(x_BLE, "batch", None, "width")
    (x_BLE, _), _ = clip.stacked(config)(
      (x_BLE, x_BLE), jnp.arange(config.depth), None
    )
    says_BE = clip.LayerNorm(config.epsilon, name="final_norm")(x_BLE[:, 0])
    return layers.Dense(
      (config.projection,),
      dtype=dtype,
      init_kernel=layers.normal,
      bias=False,
      name="projection",
    )(says_BE).astype(jnp.float32)


def shown(config: ClipVisionConfig, x_BHWC: jax.Array) -> jax.Array:
  """Returns images in [-1, 1], of any size, as CLIP is shown them.

  The short side is resized, by cubic convolution, smoothed where it becomes
  smaller; the middle is cut out; and each channel normalised. Grey is all three
  colours.
  """
  batch, height, width, channels = x_BHWC.shape
  if channels not in (1, 3):
    raise ValueError(
      f"CLIP is shown images of 1 or 3 channels, and these have {channels}."
    )
  x_BHWC = jnp.broadcast_to(x_BHWC, (batch, height, width, 3))
  side, short = config.image_size, min(height, width)
  sides = side * height // short, side * width // short
  x_BHWC = jax.image.resize(x_BHWC, (batch, *sides, 3), "cubic")
  # As images of 256 levels, which nothing exceeds.
  x_BHWC = (jnp.clip(x_BHWC, -1.0, 1.0) + 1.0) / 2.0
  top, left = ((size - side) // 2 for size in sides)
  x_BHWC = x_BHWC[:, top : top + side, left : left + side]
  mean_111C, deviation_111C = (
    np.array(each, np.float32)[None, None, None] for each in (MEAN, DEVIATION)
  )
  return (x_BHWC - mean_111C) / deviation_111C


def init(config: ClipVisionConfig, rng: jax.Array) -> dict[str, Any]:
  """Draws the parameters."""
  x_BHWC = jnp.zeros((1, config.image_size, config.image_size, 3))
  return Encoder(config).init(rng, x_BHWC)["params"]


def apply(
  config: ClipVisionConfig, params: dict[str, Any], x_BHWC: jax.Array
) -> jax.Array:
  """Returns embedding_BP, float32, of images as `shown` makes them."""
  shape = (config.image_size, config.image_size, 3)
  if x_BHWC.shape[1:] != shape:
    raise ValueError(
      f"This CLIP is shown images of {shape}, not {x_BHWC.shape[1:]}: `shown` "
      "makes them."
    )
  found = Encoder(config).apply({"params": params}, x_BHWC)
  return typing.cast(jax.Array, found)
