"""Guidance: a conditional prediction becomes a field that a solver can follow.

  guided = strong + change(strong, strong - weak)

The change is a rule of `flow/guidance_rules.py`; here the networks are called,
and only where guidance acts. Which of them that is, is decided while running,
from t, so that a whole sampler is one program and pays for no more.

A network that learns its variance returns (prediction, v): guidance acts on the
first, and beside the guided prediction the field returns the v of the strong
one, as it is.

A rule that is written for one prediction serves a network of another. The
difference is converted on its own: conversions are affine, so that x_t cancels
in it, and with it the rounding that dividing by a small sigma would magnify.
"""

# Shape suffixes: B batch. x has any shape that starts with B.

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from flowjax.flow import guidance_rules as rules
from flowjax.flow import paths
from flowjax.flow import prediction as predictions

# A prediction, or (prediction, v).
Said = Any
# predict(x, t_B, cond), under one condition per example.
Predict = Callable[[jax.Array, jax.Array, Any], Said]
# field(x, t), where t is one number or one per example.
Field = Callable[[jax.Array, jax.Array], Said]
Interval = tuple[float, float]

ALWAYS: Interval = (0.0, 1.0)

GUIDANCES = rules.GUIDANCES
build = rules.build


@dataclasses.dataclass(frozen=True, eq=False)
class Push:
  """One more term: scale (strong - degraded(x, t_B, cond)), within `interval`.

  `degraded` is the network with something taken from it: some layers (SD3.5's
  skip-layer guidance), or attention's weights for the identity (perturbed
  attention, arXiv:2403.17377). It costs one more evaluation, paid where
  the interval and a scale that is not 0 ask for it.
  """

  degraded: Callable[..., Said]
  scale: rules.Scale
  interval: Interval = ALWAYS

  def __post_init__(self):
    _check_interval(self.interval)


@dataclasses.dataclass(frozen=True, eq=False)
class Guided:
  """A guided field: field(x, t).

  `pair(x, t_B)` is what `rule` combines, (strong, weak), where t is within
  `interval`; elsewhere one evaluation gives the strong one alone. Both, and
  what the pushes evaluate, are of the network's own `prediction`. The field is
  of the prediction `target`, or where that is None of the same: a rule does
  what it does whatever the solver follows.
  """

  strong: Callable[[jax.Array, jax.Array], Said]
  pair: Callable[[jax.Array, jax.Array], Sequence[Said]]
  rule: rules.Rule
  cond: Any
  interval: Interval = ALWAYS
  pushes: Sequence[Push] = ()
  path: paths.Path | None = None
  prediction: str = "velocity"
  target: str | None = None
  sigma_data: float = 0.5

  def __post_init__(self):
    _check_interval(self.interval)
    if self.path is not None:
      return
    if self._converts:
      raise ValueError(
        f"This guidance acts on the prediction {self.rule.space!r}, and the "
        f"network predicts {self.prediction!r}: to convert, give path=."
      )
    if self.target not in (None, self.prediction):
      raise ValueError(
        f"A network that predicts {self.prediction!r} is to be followed by its "
        f"{self.target!r}: to convert, give path=."
      )

  def __call__(self, x: jax.Array, t: jax.Array) -> Said:
    if self.rule.remembers:
      raise ValueError(
        f"Guidance with momentum={self.rule.momentum} has a memory, which a "
        "field has not: wrap the solver in wrapped.Remembering, or set "
        "momentum=0."
      )
    return self.remember(x, t, None)[0]

  def remember(
    self, x: jax.Array, t: jax.Array, total: jax.Array | None
  ) -> tuple[Said, jax.Array | None]:
    """Returns the field, and the sum of differences that follows `total`."""
    t = jnp.asarray(t)
    t_B = jnp.broadcast_to(t, x.shape[:1])
    value, v, total = self._predicted(x, t, t_B, total)
    value = self._convert(self.prediction, self.target, value, x, t_B)
    return (value if v is None else (value, v)), total

  def _predicted(self, x, t, t_B, total):
    pushes = [push for push in self.pushes if not rules.known(push.scale, 0)]
    if self.rule.idle:
      value, v = _apart(self.strong(x, t_B))
      if not pushes:
        return value, v, total
      value = strong = paths.wide(value)
    else:
      strong, value, v, total = _within(
        self.interval, t, self._combine, self._plain, x, t_B, total
      )
    for push in pushes:
      value = value + self._term(push, strong, x, t)
    return value, v, total

  def _plain(self, x, t_B, total, inside):
    del inside
    strong, v = _apart(self.strong(x, t_B))
    strong = paths.wide(strong)
    return strong, strong, v, total

  def _combine(self, x, t_B, total, inside):
    (strong, v), (weak, _) = map(_apart, self.pair(x, t_B))
    strong, weak = paths.wide(strong), paths.wide(weak)
    inside = paths.over(inside, x)
    difference = self._to_rule(strong - weak, jnp.zeros_like(x), t_B)
    if total is not None:
      difference = difference + self.rule.momentum * total
      total = jnp.where(inside, difference, total).astype(total.dtype)
    change = self.rule.change(self._to_rule(strong, x, t_B), difference)
    change = self._from_rule(change, jnp.zeros_like(x), t_B)
    value = jnp.where(inside, strong + change, strong)
    return strong, value.astype(strong.dtype), v, total

  def _term(self, push, strong, x, t):
    def term(strong, x, inside):
      t_B = jnp.broadcast_to(t, x.shape[:1])
      degraded, _ = _apart(push.degraded(x, t_B, self.cond))
      degraded = paths.wide(degraded)
      value = rules.over(push.scale, strong) * (strong - degraded)
      return jnp.where(paths.over(inside, x), value, 0.0)

    def none(strong, x, inside):
      del x, inside
      return jnp.zeros_like(strong)

    return _within(push.interval, t, term, none, strong, x)

  @property
  def _converts(self) -> bool:
    idle, space = self.rule.idle, self.rule.space
    return not idle and space not in (None, self.prediction)

  def _to_rule(self, value, x, t_B):
    return self._convert(self.prediction, self.rule.space, value, x, t_B)

  def _from_rule(self, value, x, t_B):
    return self._convert(self.rule.space, self.prediction, value, x, t_B)

  def _convert(self, source, target, value, x, t_B):
    if None in (source, target) or source == target:
      return value
    assert self.path is not None
    return predictions.convert(
      self.path, source, target, value, x, t_B, sigma_data=self.sigma_data
    )


def guided(
  predict: Predict, cond: Any, uncond: Any, rule: rules.Rule, **options: Any
) -> Guided:
  """Returns the field of `predict` under `cond`, guided away from `uncond`.

  These two are trees of the same structure, one row per example. Where any
  example is guided, one call sees [cond; uncond]; elsewhere one sees cond.
  Options are those of `Guided`: interval, pushes, path, prediction, target,
  sigma_data.
  """
  if not rule.idle:
    _check_conditions(cond, uncond)

  def both(x, t_B):
    twice = jax.tree.map(_stack, (x, t_B, cond), (x, t_B, uncond))
    value, v = _apart(predict(*twice))
    strong, weak = jnp.split(value, 2)
    return (strong if v is None else (strong, jnp.split(v, 2)[0])), weak

  return Guided(_under(predict, cond), both, rule, cond, **options)


def autoguided(
  predict: Predict, worse: Predict, cond: Any, rule: rules.Rule, **options: Any
) -> Guided:
  """Returns the field of `predict`, guided away from a worse network.

  Autoguidance (arXiv:2406.02507): a smaller or less trained network sees
  the same condition, or whatever `worse` makes of it. Options as of `guided`.
  """

  def both(x, t_B):
    return predict(x, t_B, cond), worse(x, t_B, cond)

  return Guided(_under(predict, cond), both, rule, cond, **options)


def classifier_free(
  velocity: Predict,
  cond: Any,
  uncond: Any,
  *,
  scale: rules.Scale,
  interval: Interval = ALWAYS,
) -> Guided:
  """Returns the field v = v_u + scale (v_c - v_u) of `velocity(x, t_B, cond)`.

  Classifier-free guidance (arXiv:2207.12598, eq. 6, with scale = 1 + w), where
  interval[0] <= t <= interval[1] (arXiv:2404.07724); elsewhere the field is
  v_c. The same for a network of any other prediction.

  Two choices are known beforehand and leave one program to compile: an interval
  that is all of [0, 1], and a scale of 1, which is the conditional field bit
  for bit.
  """
  rule = rules.classifier_free(scale)
  return guided(velocity, cond, uncond, rule, interval=interval)


def distilled(cond: dict[str, Any], scale: rules.Scale) -> dict[str, Any]:
  """Returns `cond` with the scale, as a network distilled for it reads it.

  FLUX.1 dev learned what guidance of a scale gives (arXiv:2210.03142), and gets
  it as cond["guidance"] [B] float32: one evaluation, whatever the scale.
  """
  leaves = jax.tree.leaves(cond)
  if not leaves:
    raise ValueError(
      "A distilled scale is given to each example, and the condition is empty: "
      "it holds one row per example, as {'label': [B]}."
    )
  scale_B = jnp.broadcast_to(jnp.asarray(scale, jnp.float32), len(leaves[0]))
  return {**cond, "guidance": scale_B}


def during(times: Sequence[float], start: int, stop: int) -> Interval:
  """Returns the (low, high) that holds the times of steps start..stop - 1.

  Of a falling grid, where step i leaves times[i]. The bounds lie halfway to the
  neighbours, so that rounding decides nothing. A solver that looks at both ends
  of a step (Heun) sees the end of the last one outside.
  """
  steps = len(times) - 1
  if not 0 <= start < stop <= steps:
    raise ValueError(
      f"Steps {start} to {stop} are not within the {steps} of this grid; "
      f"0 <= start < stop <= {steps}."
    )
  low = (float(times[stop - 1]) + float(times[stop])) / 2
  first = float(times[start])
  high = (float(times[start - 1]) + first) / 2 if start else first
  return low, high


def _within(interval, t, act, rest, *operands):
  """Returns act(...) if t, or any of its entries, is inside, or else rest(...).

  Both get the operands and then which entries are inside.
  """
  low, high = interval
  inside = (low <= t) & (t <= high)
  if low <= 0.0 and 1.0 <= high:
    return act(*operands, inside)
  return jax.lax.cond(jnp.any(inside), act, rest, *operands, inside)


def _apart(said: Said) -> tuple[jax.Array, jax.Array | None]:
  """Returns a prediction, and the v beside it where there is one."""
  return said if isinstance(said, tuple) else (said, None)


def _under(predict: Predict, cond: Any):
  return lambda x, t_B: predict(x, t_B, cond)


def _stack(a: jax.Array, b: jax.Array) -> jax.Array:
  return jnp.concatenate([a, b])


def _check_interval(interval: Interval) -> None:
  low, high = interval
  if not low <= high or math.isnan(low + high):
    raise ValueError(
      f"Guidance acts where {low} <= t <= {high}, which is nowhere; write the "
      "interval as (low, high), t = 0 being data and t = 1 noise."
    )


def _check_conditions(cond: Any, uncond: Any) -> None:
  if not jax.tree.leaves(cond):
    raise ValueError(
      "Guidance needs a condition to guide towards, as {'label': [B]}, and "
      "there is none; a scale of 1 is the plain field."
    )
  ours: Any = jax.tree.structure(cond)
  theirs = jax.tree.structure(uncond)
  if ours != theirs:
    raise ValueError(
      f"The condition {ours} and the one that stands for none, {theirs}, go "
      "through the network together and must hold the same entries."
    )
