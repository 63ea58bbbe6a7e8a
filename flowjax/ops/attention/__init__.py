"""Softmax attention, with several bodies behind one signature.

xla           plain JAX, on any device; holds the T x S matrix of each head
blockwise     plain JAX in blocks: memory linear in T, and exact derivatives of
              every kind, forward mode (`jax.jvp`) as well
cudnn         fused kernel of NVIDIA GPUs, for bfloat16 and float16
splash        fused kernel of TPUs
ring          keys and values travel round the devices that share the tokens;
              memory linear in a device's own
ulysses       devices exchange tokens for heads, and each attends as one of
              the first four does; they must divide the heads
ring_ulysses  a ring along all but the last axis of the tokens, and exchange
              along that one
auto          a fused kernel where it can run, exchange where tokens are split;
              the log says what was taken

The fused kernels and the ring know reverse mode alone: where derivatives go
forward (`forward_mode`), "auto" does without them.
Where tokens are split, the first four gather keys and values: each device has
its own queries. Lengths need not divide evenly.
"""

# Shape suffixes: B batch, T queries, S keys, N heads, H head size.

import collections.abc
import contextlib
import contextvars
import functools
import logging
import typing

import jax
import jax.ad_checkpoint
import jax.numpy as jnp

from flowjax.ops import axes
from flowjax.ops.attention import (
  blockwise,
  cudnn,
  ring,
  shares,
  splash,
  ulysses,
  xla,
)

# What a device can do with its queries and all keys.
_ALONE = {
  "xla": xla.attend,
  "blockwise": blockwise.attend,
  "cudnn": cudnn.attend,
  "splash": splash.attend,
}
_TOGETHER = ("ring", "ulysses", "ring_ulysses")
# What these return needs no name: with what else their gradient reads it has
# one already, or policies know the kernel (see `kept`).
_NAMED = ("cudnn", "splash", "ring")
BODIES = ("auto", *_ALONE, *_TOGETHER)

# From so many keys on `auto` spares a TPU the T x S matrix. A choice, and not
# measured: below it the matrix of a head is at most 4 MiB.
_MANY_KEYS = 1024

_REVERSE_ALONE = ("cudnn", "splash", "ring", "ring_ulysses")
_forward: contextvars.ContextVar[bool] = contextvars.ContextVar(
  "flowjax_forward_mode", default=False
)


@contextlib.contextmanager
def forward_mode() -> collections.abc.Iterator[None]:
  """Within this context, bodies of attention have derivatives of every kind.

  It is read while a function is traced.
  """
  token = _forward.set(True)
  try:
    yield
  finally:
    _forward.reset(token)


def attention(
  q_BTNH: jax.Array,
  k_BSNH: jax.Array,
  v_BSNH: jax.Array,
  *,
  body: str = "auto",
  mask_BS: jax.Array | None = None,
) -> jax.Array:
  """Returns softmax(q k^T / sqrt(H)) v for each head (arXiv:1706.03762, eq. 1).

  `mask_BS` is true where a key is seen. Where an example has none, "xla",
  "blockwise" and "ring" return zeros, and the fused kernels anything. To
  policies of remat the result is "attention".
  """
  if body not in BODIES:
    raise ValueError(
      f"Unknown attention body {body!r}. There are: {', '.join(BODIES)}."
    )
  if mask_BS is not None:
    mask_BS = mask_BS.astype(bool)
  if body == "auto":
    body = _chosen(q_BTNH, k_BSNH)
  elif said := obstacle(body, q_BTNH):
    raise ValueError(
      f"attention={body!r} cannot run: {said} Use 'auto' or another body, or "
      "change that."
    )
  if body in _TOGETHER:
    y_BTNH = _together(body, q_BTNH, k_BSNH, v_BSNH, mask_BS)
  elif body != "xla":
    y_BTNH = shares.attend(_ALONE[body], q_BTNH, k_BSNH, v_BSNH, mask_BS)
  else:
    # Each device gathers keys and values here: once, as attention is computed
    # again for the gradient.
    k_BSNH, v_BSNH = (
      axes.name(x, "batch", None, "heads", None) for x in (k_BSNH, v_BSNH)
    )
    y_BTNH = xla.attend(q_BTNH, k_BSNH, v_BSNH, mask_BS)
  if body in _NAMED:  # By another name it would be kept twice.
    return y_BTNH
  return jax.ad_checkpoint.checkpoint_name(y_BTNH, blockwise.NAME)


def kept(
  policy: collections.abc.Callable[..., typing.Any],
) -> collections.abc.Callable[..., typing.Any]:
  """Returns a policy of remat that knows attention by a kernel without names.

  What such a kernel gives is what "attention" is to `policy`: the result, and
  what the gradient reads beside it. Without that the kernel would run again.
  """

  def knows(primitive, *arguments, **parameters):
    if primitive.name == cudnn.PRIMITIVE:
      return policy(_naming(), *arguments, name=blockwise.NAME)
    return policy(primitive, *arguments, **parameters)

  return knows


@functools.cache
def _naming() -> typing.Any:
  """Returns the primitive by which policies know names."""
  (named,) = jax.make_jaxpr(
    lambda x: jax.ad_checkpoint.checkpoint_name(x, blockwise.NAME)
  )(jax.ShapeDtypeStruct((), jnp.float32)).eqns
  return named.primitive


def obstacle(body: str, q_BTNH: jax.Array) -> str | None:
  """Says what keeps a body from taking these queries, if anything.

  Only shape and dtype are read.
  """
  if _forward.get() and body in _REVERSE_ALONE:
    return "it knows reverse mode alone, and a derivative here goes forward."
  if body == "cudnn":
    return cudnn.obstacle(q_BTNH)
  if body == "splash":
    return splash.obstacle(q_BTNH)
  if body in ("ulysses", "ring_ulysses"):
    return _indivisible(_axes(body)[1], q_BTNH.shape[2])
  return None


def _together(body, q_BTNH, k_BSNH, v_BSNH, mask_BS):
  """Attends where each device has its part of the keys as well."""
  ring_axes, exchange = _axes(body)
  if body == "ulysses":
    inner = _ALONE[_alone(q_BTNH, k_BSNH.shape[1])[0]]
  else:
    inner = functools.partial(ring.attend, ring=ring_axes)
  each = functools.partial(ulysses.attend, inner=inner, exchange=exchange)
  return shares.attend(
    each,
    q_BTNH,
    k_BSNH,
    v_BSNH,
    mask_BS,
    keys=axes.carriers("tokens"),
    mask=ring_axes,
  )


def _axes(body: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
  """Returns the axes along which keys travel, and heads are exchanged."""
  tokens = axes.carriers("tokens")
  if body == "ring":
    return tokens, ()
  if body == "ulysses":
    return (), tokens
  last = axes.of("tokens")[-1:]
  ring_axes = tuple(axis for axis in tokens if axis not in last)
  return ring_axes, tokens[len(ring_axes) :]


def _indivisible(exchange: tuple[str, ...], heads: int) -> str | None:
  here, ways = heads // axes.parts("heads"), axes.size(*exchange)
  if here % ways == 0:
    return None
  fitting = [n for n in range(1, here + 1) if here % n == 0]
  return (
    f"it gives each of {ways} devices (mesh axes {', '.join(exchange)}) a part "
    f"of {here} heads, which {ways} does not divide. Sizes that do: "
    f"{', '.join(map(str, fitting))}; 'ring' takes any."
  )


def _chosen(q_BTNH, k_BSNH) -> str:
  best, why = _alone(q_BTNH, k_BSNH.shape[1])
  tokens = axes.carriers("tokens")
  if not tokens:
    _say(f"attention='auto' is {best!r}: {why}")
    return best
  if _forward.get():
    divides = not _indivisible(tokens, q_BTNH.shape[2])
    body = "ulysses" if divides else "blockwise"
    _say(f"attention='auto' is {body!r}, as a derivative goes forward.")
    return body
  body = "ring_ulysses" if len(tokens) > 1 else "ulysses"
  if said := _indivisible(_axes(body)[1], q_BTNH.shape[2]):
    _say(f"attention='auto' is 'ring', and not {body!r}: {said}")
    return "ring"
  how = "" if len(tokens) > 1 else f", and {best!r} within: {why}"
  _say(f"attention='auto' is {body!r}, as tokens are split over {tokens}{how}")
  return body


def _alone(q_BTNH, keys: int) -> tuple[str, str]:
  """Returns the body for a device that has all keys, and why."""
  platform = axes.device().platform
  if _forward.get():
    if keys < _MANY_KEYS:
      return "xla", f"a derivative goes forward, and {keys} keys are few."
    return "blockwise", f"a derivative goes forward, and {keys} keys."
  if platform == "tpu":
    if said := splash.obstacle(q_BTNH):
      return "xla", f"the fused kernel cannot run, as {said}"
    if keys < _MANY_KEYS:
      return "xla", f"{keys} keys are few on a TPU."
    return "splash", f"a TPU, and {keys} keys."
  if platform in ("gpu", "cuda"):
    if said := cudnn.obstacle(q_BTNH):
      return "xla", f"the fused kernel cannot run, as {said}"
    return "cudnn", "the fused kernel of this GPU takes such heads."
  return "xla", f"there is no fused kernel for {platform}."


@functools.cache
def _say(what: str) -> None:
  logging.info("%s", what)
