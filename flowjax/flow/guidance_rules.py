"""The rules of guidance: what the difference from a worse prediction adds.

  guided = strong + change(strong, strong - weak)

`strong` is the prediction under the condition, `weak` a worse one: without the
condition, or by a worse network. `flow/guidance.py` calls the networks.

A rule that is not linear depends on which prediction it is written for, and
says so in `space`; the others are the same for every prediction.
"""

# All arrays have one shape, which starts with that of a scale: a scale is one
# number, or one per example.

import dataclasses
import numbers
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from flowjax.flow import names, paths

Scale = float | jax.Array

_TINY = 1e-12


@dataclasses.dataclass(frozen=True, eq=False)
class Rule:
  """What guidance adds to `strong`: change(strong, strong - weak).

  That is formula(scale, strong, strong - weak). `space` is the prediction for
  which it is written; None is that of the network, whichever it is. With
  `momentum` b, each step replaces its difference d by the running sum d + b
  (sum of the steps before), which a solver has to carry:
  `solvers.wrapped.Remembering`. A scale that is `told` is an input of the
  network, and nothing is added.
  """

  formula: Callable[[Scale, jax.Array, jax.Array], jax.Array]
  scale: Scale
  space: str | None = None
  momentum: float = 0.0
  told: bool = False

  def change(self, strong: jax.Array, difference: jax.Array) -> jax.Array:
    """Returns what is added to `strong`."""
    return self.formula(self.scale, strong, difference)

  @property
  def idle(self) -> bool:
    """Whether the change is known beforehand to be none."""
    return self.told or known(self.scale, 1)

  @property
  def remembers(self) -> bool:
    """Whether a solver has to carry a sum."""
    return bool(self.momentum) and not self.idle


def classifier_free(scale: Scale) -> Rule:
  """Builds weak + scale (strong - weak), the same for every prediction.

  arXiv:2207.12598, eq. 6, with scale = 1 + w. Written from the strong end, so
  that a scale of 1 is that end exactly.
  """
  return Rule(_extrapolated, scale)


def _extrapolated(scale, strong, difference):
  return over(scale, strong, -1.0) * difference


def rescaled(
  scale: Scale, factor: float = 0.7, space: str | None = None
) -> Rule:
  """Builds classifier-free guidance that keeps the deviation of `strong`.

  guided' = factor guided std(strong) / std(guided) + (1 - factor) guided, the
  deviations being those of one example (arXiv:2305.08891, section 3.4).
  """
  if not 0.0 <= factor <= 1.0:
    raise ValueError(
      f"A rescale factor of {factor} is not within 0 (none) and 1 (all); 0.7 "
      "is the paper's."
    )

  def change(scale, strong, difference):
    added = _extrapolated(scale, strong, difference)
    # A network that begins as zero has no deviation, and is left as it is.
    deviation = jnp.maximum(_std(strong + added), _TINY)
    kept = factor * (_std(strong) / deviation) + (1.0 - factor)
    return (kept - 1.0) * strong + kept * added

  return Rule(change, scale, space)


def zero_star(scale: Scale) -> Rule:
  """Builds s weak + scale (strong - s weak), s weak being nearest to strong.

  s = <strong, weak> / |weak|^2 (CFG-Zero*, arXiv:2503.18886, section 4.1), in
  terms of velocity. The other half of that method is `solvers.wrapped.Resting`.
  """

  def change(scale, strong, difference):
    weak = strong - difference
    share = _dot(strong, weak) / (_dot(weak, weak) + 1e-8)
    return over(scale, strong, -1.0) * (strong - share * weak)

  return Rule(change, scale, "velocity")


def projected(
  scale: Scale,
  eta: float = 0.0,
  norm_threshold: float = 0.0,
  momentum: float = 0.0,
  space: str | None = "data",
) -> Rule:
  """Builds adaptive projected guidance (APG, arXiv:2410.02416, algorithm 1).

  The difference, no longer than `norm_threshold` (0 is no limit), is split into
  its part along `strong` and the rest; of the first, which saturates images,
  `eta` remains. All of this for predicted data. The paper's momentum is
  negative, about -0.5; here 0 unless asked for, as it needs a memory.
  """
  if not norm_threshold >= 0.0:
    raise ValueError(
      f"norm_threshold={norm_threshold} is a length and cannot be below 0; 0 "
      "sets no limit, 2.5 to 15 are the paper's."
    )
  if not -1.0 < momentum < 1.0:
    raise ValueError(
      f"A momentum of {momentum} would let the sum of differences grow without "
      "end: it must be between -1 and 1; the paper's is -0.5, and 0 is none."
    )

  def change(scale, strong, difference):
    if norm_threshold > 0.0:
      length = jnp.sqrt(_dot(difference, difference))
      limit = norm_threshold / jnp.maximum(length, _TINY)
      difference = jnp.minimum(1.0, limit) * difference
    length = jnp.maximum(jnp.sqrt(_dot(strong, strong)), _TINY)
    unit = strong / length
    parallel = _dot(difference, unit) * unit
    update = difference - (1.0 - eta) * parallel
    return over(scale, strong, -1.0) * update

  return Rule(change, scale, space, momentum)


def distilled(scale: Scale) -> Rule:
  """Builds the guidance of a network that learned what it gives.

  FLUX.1 dev is told the scale (arXiv:2210.03142): one evaluation, whatever the
  scale. `guidance.distilled` is how.
  """

  def change(scale, strong, difference):
    raise ValueError(
      "Guidance of the kind 'distilled' is told to the network, and has no "
      "difference to add: give the scale by guidance.distilled."
    )

  return Rule(change, scale, told=True)


# Rules by the name that a config gives them, all with an option `scale`.
GUIDANCES: dict[str, Callable[..., Rule]] = {
  "cfg": classifier_free,
  "cfg_rescale": rescaled,
  "cfg_zero_star": zero_star,
  "apg": projected,
  "distilled": distilled,
}


def build(name: str, **options: Any) -> Rule:
  """Builds the rule `name` with the options that it takes.

  Raises ValueError for an unknown name or option.
  """
  return names.choose("guidance", GUIDANCES, name, options)(**options)


def over(scale: Scale, x: jax.Array, plus: float = 0.0) -> jax.Array:
  """Returns scale + plus, one number or one per example, to multiply x."""
  return paths.over(jnp.asarray(scale, x.dtype) + plus, x)


def known(scale: Scale, value: float) -> bool:
  # An array may be traced, and then its value is not known yet.
  return isinstance(scale, numbers.Number) and bool(scale == value)


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
  return jnp.sum(a * b, axis=tuple(range(1, a.ndim)), keepdims=True)


def _std(x: jax.Array) -> jax.Array:
  return jnp.std(x, axis=tuple(range(1, x.ndim)), keepdims=True)
