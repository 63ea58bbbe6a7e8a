"""Blocks in which text and image attend together (arXiv:2403.03206).

Each stream has weights of its own; they meet in attention alone, where the
tokens of both are one sequence, text first.
"""

# Shape suffixes: B batch, L text tokens, T image tokens (or those of either
# stream), S = L + T, D width, K parts of a fused map, N heads, H head size,
# F hidden width of the MLP.

import collections.abc
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from flowjax.models import blocks, layers, positions, sequences
from flowjax.ops import attention, axes

Rope = tuple[jax.Array, jax.Array] | None  # cosines and sines [T, H]
Heads = tuple[jax.Array, jax.Array, jax.Array]  # queries, keys, values
Masks = tuple[sequences.Mask, sequences.Mask]  # of text and image

EPSILON = 1e-6  # of the norms before attention and MLP


def attend(
  text: Heads,
  image: Heads,
  *,
  body: str,
  masks: Masks = (None, None),
) -> tuple[jax.Array, jax.Array]:
  """Lets the tokens of both streams see each other; returns each its part.

  Nobody sees a token where the mask of its stream is false.
  """
  q_BSNH, k_BSNH, v_BSNH = (
    sequences.woven(*pair) for pair in zip(text, image, strict=True)
  )
  lengths = text[0].shape[1], image[0].shape[1]
  mask_BS = sequences.woven_masks(*masks, q_BSNH.shape[0], lengths)
  y_BSNH = attention.attention(
    q_BSNH, k_BSNH, v_BSNH, body=body, mask_BS=mask_BS
  )
  return sequences.parted(y_BSNH, lengths[0])


class Attention(nn.Module):
  """The maps of a stream to queries, keys and values, and from the answer.

  A stream that ends with this block has no use for the answer, and no map from
  it.
  """

  width: int
  heads: int
  head_size: int
  qk_norm: bool
  dtype: jnp.dtype
  answers: bool = True

  def setup(self):
    dense = functools.partial(layers.Dense, dtype=self.dtype, tokens="tokens")
    self.qkv = dense((3, self.heads, self.head_size))
    if self.qk_norm:
      self.query_norm = layers.RMSNorm()
      self.key_norm = layers.RMSNorm()
    if self.answers:
      self.out = dense((self.width,), contract=2)

  def ask(self, x_BTD: jax.Array, rope: Rope) -> Heads:
    qkv_BTKNH = axes.name(
      self.qkv(x_BTD), "batch", "tokens", None, "heads", None
    )
    q_BTNH, k_BTNH, v_BTNH = jnp.unstack(blocks.saved(qkv_BTKNH, "qkv"), axis=2)
    if self.qk_norm:
      q_BTNH, k_BTNH = self.query_norm(q_BTNH), self.key_norm(k_BTNH)
    if rope is not None:
      q_BTNH = positions.rotate(q_BTNH, *rope)
      k_BTNH = positions.rotate(k_BTNH, *rope)
    return q_BTNH, k_BTNH, v_BTNH

  def answer(self, y_BTNH: jax.Array) -> jax.Array:
    y_BTNH = axes.name(y_BTNH, "batch", "tokens", "heads", None)
    y_BTD = self.out(y_BTNH)
    return blocks.saved(y_BTD, "attention_out")


class Stream(nn.Module):
  """What one stream does in a block, before attention and after it.

  Its modulation is (shift, scale, gate) of attention, the same of the MLP, and
  with `second` the same of an attention among the stream's own tokens. With
  `last` the stream ends here: it has only (shift, scale), and is asked.
  """

  width: int
  heads: int
  head_size: int
  mlp_width: int
  qk_norm: bool
  body: str
  dtype: jnp.dtype
  second: bool = False
  last: bool = False

  def setup(self):
    self.modulation = layers.Dense(
      (2 if self.last else 9 if self.second else 6, self.width),
      dtype=self.dtype,
      init_kernel=layers.zeros,
    )
    maps = functools.partial(
      Attention,
      self.width,
      self.heads,
      self.head_size,
      self.qk_norm,
      self.dtype,
    )
    self.attention = maps(answers=not self.last)
    if self.second:
      self.attention2 = maps()
    if not self.last:
      self.mlp = blocks.Mlp("gelu", self.mlp_width, self.dtype)

  def begin(
    self, x_BTD: jax.Array, c_BD: jax.Array, rope: Rope
  ) -> tuple[Heads, tuple[jax.Array, ...]]:
    """Returns the heads for joint attention, and the modulation."""
    parts = jnp.unstack(
      blocks.saved(self.modulation(c_BD), "modulation"), axis=1
    )
    shift_BD, scale_BD = parts[:2]
    y_BTD = layers.modulated_norm(x_BTD, shift_BD, scale_BD, EPSILON)
    return self.attention.ask(y_BTD, rope), parts

  def end(
    self,
    x_BTD: jax.Array,
    y_BTNH: jax.Array,
    parts: tuple[jax.Array, ...],
    rope: Rope,
    mask_BT: sequences.Mask,
  ) -> jax.Array:
    """Returns the stream with all that the block adds to it."""
    gate_BD, shift_mlp, scale_mlp, gate_mlp = parts[2:6]
    # Both attentions read the stream as it was.
    second_BTD = self._among_themselves(x_BTD, parts, rope, mask_BT)
    x_BTD = layers.add_gated(x_BTD, gate_BD, self.attention.answer(y_BTNH))
    if second_BTD is not None:
      x_BTD = layers.add_gated(x_BTD, parts[8], second_BTD)
    x_BTD = axes.name(x_BTD, "batch", "tokens", "width")

    y_BTD = self.mlp(
      layers.modulated_norm(x_BTD, shift_mlp, scale_mlp, EPSILON)
    )
    x_BTD = layers.add_gated(x_BTD, gate_mlp, y_BTD)
    return axes.name(x_BTD, "batch", "tokens", "width")

  def _among_themselves(self, x_BTD, parts, rope, mask_BT):
    if not self.second:
      return None
    shift_BD, scale_BD = parts[6:8]
    y_BTD = layers.modulated_norm(x_BTD, shift_BD, scale_BD, EPSILON)
    q_BTNH, k_BTNH, v_BTNH = self.attention2.ask(y_BTD, rope)
    return self.attention2.answer(
      attention.attention(
        q_BTNH, k_BTNH, v_BTNH, body=self.body, mask_BS=mask_BT
      )
    )


class JointBlock(nn.Module):
  """One block of two streams, each modulated by c.

  `second` gives the image an attention of its own beside the joint one
  (MMDiT-X); after the `last` block of an MM-DiT there is no text.
  """

  width: int
  heads: int
  head_size: int
  mlp_width: int
  qk_norm: bool
  body: str
  dtype: jnp.dtype
  second: bool = False
  last: bool = False

  @nn.compact
  def __call__(
    self,
    streams: tuple[jax.Array, jax.Array],
    c_BD: jax.Array,
    ropes: tuple[Rope, Rope],
    masks: Masks,
  ) -> tuple[tuple[jax.Array, jax.Array], None]:
    """Takes and returns (text, image), each with its rope and its mask."""
    stream = functools.partial(
      Stream,
      self.width,
      self.heads,
      self.head_size,
      self.mlp_width,
      self.qk_norm,
      self.body,
      self.dtype,
    )
    text = stream(last=self.last, name="text")
    image = stream(second=self.second, name="image")
    text_BLD, image_BTD = streams
    text_rope, image_rope = ropes

    text_heads, text_parts = text.begin(text_BLD, c_BD, text_rope)
    image_heads, image_parts = image.begin(image_BTD, c_BD, image_rope)
    y_BLNH, y_BTNH = attend(
      text_heads, image_heads, body=self.body, masks=masks
    )
    image_BTD = image.end(image_BTD, y_BTNH, image_parts, image_rope, masks[1])
    if not self.last:
      text_BLD = text.end(text_BLD, y_BLNH, text_parts, text_rope, masks[0])
    return (text_BLD, image_BTD), None


def without(
  params: dict[str, Any],
  groups: dict[str, range],
  layers: collections.abc.Collection[int],
) -> tuple[dict[str, Any], list[int]]:
  """Returns the parameters without some blocks, and how many each group keeps.

  `groups` are the numbers of the blocks in each stack. An empty one is left
  out.
  """
  left = {key: params[key] for key in params if key not in groups}
  counts = []
  for name, numbers in groups.items():
    kept = np.array([i for i, n in enumerate(numbers) if n not in layers], int)
    counts.append(len(kept))
    if len(kept):
      left[name] = jax.tree.map(lambda leaf, k=kept: leaf[k], params[name])
  return left, counts


def repeated(block: Any, length: int, *, scan: bool, remat: str) -> Any:
  """Returns `length` blocks, whose parameters share a leading dim.

  The first argument goes from block to block; all others are the same for
  each. `remat` is a key of `blocks.REMAT`.
  """
  return nn.scan(
    remade(block, remat, in_loop=scan),
    variable_axes={"params": 0},
    split_rngs={"params": True},
    in_axes=nn.broadcast,
    length=length,
    unroll=1 if scan else length,
  )


def remade(block: Any, remat: str, *, in_loop: bool = False) -> Any:
  """Returns the block, keeping for its gradient what `remat` says."""
  if blocks.REMAT[remat] is None:
    return block
  # In a loop the compiler cannot merge the second computation with the first.
  return nn.remat(block, policy=blocks.REMAT[remat], prevent_cse=not in_loop)
