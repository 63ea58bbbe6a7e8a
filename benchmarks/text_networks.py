"""Networks that read texts, as a benchmark trains them, by size.

"flux" has the width and the heads of FLUX.1-dev, and 4 + 8 of its 19 + 38
blocks: 2.56 billion parameters, which with their gradients, Adam's two moments
and the average take 51 GB in float32. All 11.9 billion would take 238 GB, more
than one card of 141 GB holds. "mmdit" is SD3-medium, whole: 24 blocks.
"""

import math
from typing import Any

FLUX: dict[str, Any] = dict(
  name="flux",
  channels=16,
  patch_size=2,
  width=3072,
  heads=24,
  double_depth=4,
  single_depth=8,
  mlp_ratio=4.0,
  text_width=4096,
  pooled_width=768,
  text_tokens=512,
  rope_axes=(16, 56, 56),
  guidance_embed=True,
)
MMDIT: dict[str, Any] = dict(
  name="mmdit",
  channels=16,
  patch_size=2,
  depth=24,
  heads=24,
  head_size=64,
  mlp_ratio=4.0,
  text_width=4096,
  pooled_width=2048,
  text_tokens=154,
  position_table=192,
)
_SMALL: dict[str, Any] = dict(
  image_size=(8, 8), heads=2, text_width=16, pooled_width=8, text_tokens=5
)
# By name and number of image tokens, and two that are small enough for tests.
SIZES: dict[str, dict[str, Any]] = {
  "flux_1024": FLUX | dict(image_size=(64, 64)),
  "flux_4096": FLUX | dict(image_size=(128, 128)),
  "mmdit_1024": MMDIT | dict(image_size=(64, 64)),
  "mmdit_4096": MMDIT | dict(image_size=(128, 128)),
  "flux_tiny": FLUX
  | _SMALL
  | dict(width=64, double_depth=1, single_depth=2, rope_axes=(8, 12, 12)),
  "mmdit_tiny": MMDIT | _SMALL | dict(depth=2, head_size=32),
}
NOTES = {
  "flux": "FLUX.1-dev's width and heads with 4 + 8 of its 19 + 38 blocks, so "
  "that one card of 141 GB holds weights, gradients, moments and the average",
  "mmdit": "SD3-medium, all of its 24 blocks",
}


def block_flops(model: dict[str, Any]) -> int:
  """Counts the blocks' matrix products for one image; a multiply-add is two.

  Of S = T + L tokens of width d, each block has S (8 + 4 r) d^2 of linear
  layers with an MLP of r d, and 4 S^2 d of attention; and 2 K d^2 for K parts
  of modulation: 12 in a block of two streams, 3 in one of one. In MM-DiT's last
  block the text has 2 parts, no MLP, and no map after its attention.
  """
  tokens, text = image_tokens(model), model["text_tokens"]
  ratio, both = model["mlp_ratio"], tokens + text
  if model["name"] == "flux":
    d, double, single = (
      model[key] for key in ("width", "double_depth", "single_depth")
    )
    parts = 12 * double + 3 * single
    absent, depth = 0, double + single
  else:
    d, depth = model["heads"] * model["head_size"], model["depth"]
    parts = 12 * depth - 4
    absent = text * (2 + 4 * ratio) * d * d
  block = both * (8 + 4 * ratio) * d * d + 4 * both * both * d
  return int(depth * block - absent + 2 * parts * d * d)


def image_tokens(model: dict[str, Any]) -> int:
  """Returns the number of patches of an image."""
  return math.prod(model["image_size"]) // model["patch_size"] ** 2
