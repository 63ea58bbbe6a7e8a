"""A normalizing flow of coupling layers: NICE and RealNVP, given a label.

A layer keeps the pixels of a mask m and moves the others by what the kept ones
say (arXiv:1410.8516, section 3.2; arXiv:1605.08803, eq. 9):

  y = m x + (1 - m) (x exp(s(m x)) + b(m x)),   log|dy/dx| = sum (1 - m) s

Its inverse asks the same network about the same pixels, so that neither costs
more than the other. Additive layers have s = 0 and keep every volume; the scale
of each pixel at the end is then all that changes it (NICE, section 3.3).
"""

# Shape suffixes: B batch, H height, W width, C channels; D all values of an
# image in a row, F hidden width, K labels and none, L layers, P parts
# (shift, log-scale).

import dataclasses
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from flowjax import schema
from flowjax.models import blocks, layers
from flowjax.ops import products

KINDS = ("additive", "affine")
# |s| stays below: a layer scales a pixel by less than e^2, either way.
LOG_SCALE_LIMIT = 2.0
# An optimizer moves all parameters at much the same pace, and the scale of a
# pixel that is always black has far to go: its logarithm is this many times
# what is learned.
FINAL_PACE = 8.0


@dataclasses.dataclass(frozen=True)
class CouplingConfig:
  """What a coupling flow is made of: `depth` layers, each an MLP of `width`.

  With dtype bfloat16 the inverse is exact to its three digits, not to six: what
  a layer kept comes back rounded, and the MLP sees the rounding.
  """

  name: str = "coupling"
  image_size: tuple[int, int] = (8, 8)
  channels: int = 1
  num_classes: int = 10
  width: int = 128
  depth: int = 8
  kind: str = "affine"
  label_dropout: float = 0.1
  dtype: str = "float32"

  def __post_init__(self):
    choices = {
      "name": ("coupling",),
      "kind": KINDS,
      "dtype": tuple(blocks.DTYPES),
    }
    for field, words in choices.items():
      word = getattr(self, field)
      if word not in words:
        raise ValueError(
          f"{field}={word!r} is not known. {schema.closest(word, words)}"
        )
    for field in ("channels", "num_classes", "width", "depth"):
      if getattr(self, field) <= 0:
        raise ValueError(f"{field}={getattr(self, field)} must be positive.")
    if min(self.image_size) <= 0:
      raise ValueError(f"image_size={self.image_size} must be positive.")
    if self.values < 2:
      raise ValueError(
        "An image of one value cannot be divided into what is kept and what is "
        f"moved: image_size={self.image_size}, channels={self.channels}."
      )
    if not 0.0 <= self.label_dropout < 1.0:
      raise ValueError(
        f"label_dropout={self.label_dropout} must be at least 0 and below 1: "
        "with 1 no label is ever seen. 0.1 is usual."
      )

  @property
  def values(self) -> int:
    """The number of values of an image."""
    return math.prod(self.image_size) * self.channels

  @property
  def parts(self) -> int:
    """What an MLP says of each value: a shift, and a log-scale if affine."""
    return 2 if self.kind == "affine" else 1


class Mlp(nn.Module):
  """What one layer asks about the pixels that it keeps; begins as zero."""

  config: CouplingConfig

  @nn.compact
  def __call__(self, x_BD, label_BF):
    config = self.config
    dtype = blocks.DTYPES[config.dtype]
    hidden = (config.width,)
    h_BF = layers.Dense(hidden, dtype=dtype, name="in")(x_BD)
    h_BF = nn.silu(h_BF + label_BF.astype(dtype))
    h_BF = h_BF + layers.Dense(hidden, dtype=dtype, name="hidden")(h_BF)
    return layers.Dense(
      (config.parts, config.values), init_kernel=layers.zeros, name="out"
    )(nn.silu(h_BF))


def masks(config: CouplingConfig) -> np.ndarray:
  """Returns the kept values [L, D] of each layer, 1 or 0.

  A checkerboard, rows and columns in turn, each followed by its opposite. Where
  these leave nothing to keep or to move (one row, say), channels alternate.
  """
  row, column, channel = np.indices((*config.image_size, config.channels))
  patterns = []
  for index in (row + column, row, column, row + column + channel):
    even = (index % 2 == 0).reshape(-1)
    if 0 < even.sum() < even.size:
      patterns += [even, ~even]
  chosen = [patterns[i % len(patterns)] for i in range(config.depth)]
  return np.stack(chosen).astype(np.float32)


def init(config: CouplingConfig, rng: jax.Array) -> dict[str, Any]:
  """Draws the parameters, float32; the flow begins as the identity."""
  rng_label, rng_layers = jax.random.split(rng)
  x_BD = jnp.zeros((1, config.values))
  label_BF = jnp.zeros((1, config.width))
  stacked = jax.vmap(lambda key: Mlp(config).init(key, x_BD, label_BF))(
    jax.random.split(rng_layers, config.depth)
  )
  # As large as what the pixels say; smaller, and a flow that begins as the
  # identity learns to do without labels.
  table = (config.num_classes + 1, config.width)
  label_KF = jax.random.normal(rng_label, table, jnp.float32)
  return {
    "label_embed": {"embedding": label_KF},
    "blocks": stacked["params"],
    "final": {"scale": jnp.zeros(config.values)},
  }


def forward(
  config: CouplingConfig,
  params: dict[str, Any],
  x_BHWC: jax.Array,
  cond: dict[str, jax.Array],
  rng: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Returns z [B, H, W, C] of the images, and log|det dz/dx| [B], in float32.

  With an rng, each label is dropped with probability `label_dropout`.
  """
  label_BF = _embed(config, params, x_BHWC, cond, rng)

  def layer(carry, mlp_and_mask):
    x_BD, log_det_B = carry
    mlp, keep_D = mlp_and_mask
    keep_1D = keep_D[None]
    log_scale_BD, shift_BD = _ask(config, mlp, keep_1D, x_BD, label_BF)
    moved_BD = x_BD * jnp.exp(log_scale_BD) + shift_BD
    x_BD = keep_1D * x_BD + (1.0 - keep_1D) * moved_BD
    log_det_B += jnp.sum((1.0 - keep_1D) * log_scale_BD, axis=-1)
    return (x_BD, log_det_B), None

  x_BD = x_BHWC.reshape(len(x_BHWC), -1).astype(jnp.float32)
  start = (x_BD, jnp.zeros(len(x_BHWC), jnp.float32))
  (x_BD, log_det_B), _ = jax.lax.scan(
    layer, start, (params["blocks"], jnp.asarray(masks(config)))
  )
  log_scale_D = FINAL_PACE * params["final"]["scale"]
  z_BD = x_BD * jnp.exp(log_scale_D)[None]
  return z_BD.reshape(x_BHWC.shape), log_det_B + jnp.sum(log_scale_D)


def inverse(
  config: CouplingConfig,
  params: dict[str, Any],
  z_BHWC: jax.Array,
  cond: dict[str, jax.Array],
) -> jax.Array:
  """Returns the images whose `forward` is z, in float32."""
  label_BF = _embed(config, params, z_BHWC, cond, None)

  def layer(y_BD, mlp_and_mask):
    mlp, keep_D = mlp_and_mask
    keep_1D = keep_D[None]
    log_scale_BD, shift_BD = _ask(config, mlp, keep_1D, y_BD, label_BF)
    moved_BD = (y_BD - shift_BD) * jnp.exp(-log_scale_BD)
    return keep_1D * y_BD + (1.0 - keep_1D) * moved_BD, None

  z_BD = z_BHWC.reshape(len(z_BHWC), -1).astype(jnp.float32)
  x_BD, _ = jax.lax.scan(
    layer,
    z_BD * jnp.exp(-FINAL_PACE * params["final"]["scale"])[None],
    (params["blocks"], jnp.asarray(masks(config))),
    reverse=True,
  )
  return x_BD.reshape(z_BHWC.shape)


def apply(config: CouplingConfig, *inputs: Any) -> jax.Array:
  """Refuses: there is no field here for a solver to follow."""
  del inputs
  raise ValueError(
    f"model.name={config.name!r} maps images to noise in one pass, and has no "
    "velocity at a time t: train it by maximum likelihood, and sample by its "
    "inverse."
  )


def example(config: CouplingConfig, batch: int = 1) -> dict[str, jax.Array]:
  """Returns a condition of zeros, of the shapes that the network takes."""
  del config
  return {"label": jnp.zeros(batch, jnp.int32)}


def unconditional(
  config: CouplingConfig, cond: dict[str, jax.Array]
) -> dict[str, jax.Array]:
  """Returns `cond` with the label that stands for none."""
  return {**cond, "label": jnp.full_like(cond["label"], config.num_classes)}


def flops(config: CouplingConfig) -> int:
  """Counts the arithmetic of a forward pass per example.

  A multiply-add is two; the elementwise rest is left out.
  """
  into, out = config.values, config.parts * config.values
  return config.depth * 2 * config.width * (into + config.width + out)


def _ask(config, mlp, keep_1D, x_BD, label_BF):
  """Returns the log-scale and the shift of every value."""
  out_BPD = Mlp(config).apply({"params": mlp}, keep_1D * x_BD, label_BF)
  shift_BD = out_BPD[:, 0]
  if config.kind == "additive":
    return jnp.zeros_like(shift_BD), shift_BD
  bounded_BD = jnp.tanh(out_BPD[:, 1] / LOG_SCALE_LIMIT)
  return LOG_SCALE_LIMIT * bounded_BD, shift_BD


def dropped(
  config: CouplingConfig, cond: dict[str, jax.Array], rng: jax.Array
) -> dict[str, jax.Array]:
  """Returns `cond` without some labels, each with `label_dropout`."""
  label_B = cond["label"]
  drop_B = jax.random.bernoulli(rng, config.label_dropout, label_B.shape)
  return {**cond, "label": jnp.where(drop_B, config.num_classes, label_B)}


def _embed(config: CouplingConfig, params, x_BHWC, cond, rng):
  """Returns the row of each label, and checks that inputs are what they are."""
  size = (*config.image_size, config.channels)
  if x_BHWC.ndim != 4 or x_BHWC.shape[1:] != size:
    raise ValueError(
      f"The network takes images [B, {size[0]}, {size[1]}, {size[2]}], not "
      f"{x_BHWC.shape}; their size is in its config."
    )
  if "label" not in cond:
    raise ValueError(
      "The network takes cond={'label': [B] integers}, got the keys "
      f"{sorted(cond)}."
    )
  label_B = cond["label"]
  if label_B.shape != x_BHWC.shape[:1]:
    raise ValueError(
      f"label has shape {label_B.shape}; for {len(x_BHWC)} images it is "
      f"({len(x_BHWC)},)."
    )
  if rng is not None:
    label_B = dropped(config, cond, rng)["label"]
  table = params["label_embed"]["embedding"]
  return products.rows(table, label_B, called="label_embed/embedding")
