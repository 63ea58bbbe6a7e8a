"""A network with an encoder beside it, of what it is told in place of a text.

The encoder is trained with the network, which reads the text that it makes: of
captions, of boxes, of an image.
"""

# Shape suffixes: B batch, H height, W width, C channels.

import collections.abc
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flowjax.models import conditions, seam

_TEXT = ("text", "pooled")


@dataclasses.dataclass(frozen=True, eq=False)
class Encoder:
  """What makes a text of a condition.

  Its parameters, drawn by `init(rng)`, are the `group` of those of the network.
  `apply(params, cond)` returns "text", "pooled" and, if not all of its tokens
  are there, "text_mask". `empty` is a row of each key that it reads, of nothing
  that is said.
  """

  group: str
  reads: str
  init: collections.abc.Callable[..., seam.Params]
  apply: collections.abc.Callable[[seam.Params, seam.Cond], seam.Cond]
  empty: collections.abc.Mapping[str, np.ndarray]
  flops: int
  # Of what has another shape than its empty row, which is then repeated.
  shapes: collections.abc.Mapping[str, tuple[int, ...]] = dataclasses.field(
    default_factory=dict
  )

  def shape(self, key: str) -> tuple[int, ...]:
    """Returns the shape that a row of an example has."""
    return self.shapes.get(key, self.empty[key].shape)


def with_encoder(network: seam.Network, encoder: Encoder) -> seam.Network:
  """Returns the network, told what an encoder says.

  A condition may have a "negative" of the keys that the encoder reads: what is
  said in place of nothing. In training a condition is dropped as a whole.
  """
  group, empty = encoder.group, encoder.empty
  keys = tuple(empty)

  def init(rng):
    # Adapters have fold_in(rng, 1).
    return {
      **network.init(rng),
      group: encoder.init(jax.random.fold_in(rng, 2)),
    }

  def without(params):
    return {key: params[key] for key in params if key != group}

  def told(params, cond):
    if missing := [key for key in keys if key not in cond]:
      raise ValueError(
        f"The network reads {encoder.reads}, cond={{{_shapes(encoder)}}}, and "
        f"has no {missing[0]!r}: got the keys {sorted(cond)}."
      )
    others = {key: cond[key] for key in cond if key not in empty}
    if "negative" in cond:
      others["negative"] = encoder.apply(params[group], cond["negative"])
    return {**others, **encoder.apply(params[group], cond)}

  def unconditional(cond):
    if "negative" in cond:
      return {**cond, **cond["negative"]}
    emptied = {
      key: jnp.broadcast_to(
        jnp.asarray(row, cond[key].dtype)[None], cond[key].shape
      )
      for key, row in empty.items()
    }
    return {**cond, **emptied}

  def dropped(cond, rng):
    emptied, rate = unconditional(cond), network.config.condition_dropout
    return conditions.exchanged(cond, emptied, keys, rate, rng)

  def apply(params, x_BHWC, t_B, cond, rng=None):
    cond = cond if rng is None else dropped(cond, rng)
    return network.apply(without(params), x_BHWC, t_B, told(params, cond))

  def example(batch):
    # A mask of an example is true: something is said.
    said = {
      key: jnp.full((batch, *encoder.shape(key)), row.dtype == bool, row.dtype)
      for key, row in empty.items()
    }
    others = network.example(batch)
    return {k: others[k] for k in others if k not in _TEXT} | said

  return dataclasses.replace(
    network,
    init=init,
    apply=apply,
    unconditional=unconditional,
    flops=network.flops + encoder.flops,
    example=example,
    dropped=dropped,
    own=lambda params: network.own(without(params)),
    told=told,
  )


def check(model: Any, said: str, *, tokens: int, width: int | None) -> None:
  """Raises ValueError for a text that a model does not read.

  `said` is the key, and its value, by which there is an encoder; `width`, if
  that is one, that of the text and of the pooled text.
  """
  if not hasattr(model, "text_width") or model.num_classes:
    raise ValueError(
      f"{said}: a network {model.name!r} with "
      f"num_classes = {model.num_classes} reads no text; take an MM-DiT or a "
      f"FLUX with num_classes = 0, or set {said.partition(' ')[0]} = 0."
    )
  if width and not model.text_width == model.pooled_width == width:
    raise ValueError(
      f"width = {width} must be that of the text, model.text_width = "
      f"{model.text_width}, and model.pooled_width = {model.pooled_width}."
    )
  if model.text_tokens != tokens:
    raise ValueError(
      f"tokens = {tokens} and model.text_tokens = {model.text_tokens} "
      "must be the same."
    )


def _shapes(encoder: Encoder) -> str:
  return ", ".join(
    f"{key!r}: [{', '.join(['B', *map(str, encoder.shape(key))])}]"
    for key in encoder.empty
  )
