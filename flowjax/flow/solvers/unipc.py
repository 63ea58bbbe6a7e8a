"""UniPC: predict, and correct once the network has looked at the prediction.

Data predictions D_i at l_i (l = log(alpha / sigma)) stand at r_i =
(l_i - l_s) / h from the one at s, in units of the step. Both halves are

  x_t = keep x_s + gain D_s + sum_i g_i (D_i - D_s) / r_i

where the weights integrate polynomials exactly (arXiv:2302.04867, eq. 5-8):

  sum_i g_i r_i^{k-1} = alpha_t h phi_{k+1}(-h) k!,   k = 1, 2, ...

The corrector has D_t among the D_i, r = 1, and is one order more exact. It uses
the evaluation that the next step needs anyway: there is one per step, made at
the predicted state. Nothing evaluates the field at the last state, which stays
as predicted.

Where there is a single D_i (order 2 predicting, order 1 correcting) the paper
puts g_1 = G / 2, for either of two G that agree to the order that counts: B(h)
= h, "bh1", with G = alpha_t h, and B(h) = e^h - 1, "bh2", with G = gain. Beyond
that they are the same method.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from flowjax.flow import paths
from flowjax.flow.solvers import exponential, linear


class Memory(NamedTuple):
  """The state that the last step started from, where, and by which order."""

  x: Any
  t: jax.Array
  order: jax.Array
  history: exponential.History


@dataclasses.dataclass(frozen=True)
class UniPC:
  """Predictor of `order` and corrector of the next, up to 3 and 4.

  Orders rise from 1 as the past grows, and with `lower_order_final` fall to 1
  at the last step: steadier for few steps, and an error like h^2 for many. A
  step to or from an end, where the log-SNR is infinite, is of order 1, and
  "bh1" does not correct it. So is a leap to the end (`exponential.LEAP`).
  """

  name: str
  path: paths.Path
  order: int = 2
  variant: str = "bh2"
  lower_order_final: bool = True
  prediction: str = "data"

  def init(self, x: Any, rng: jax.Array | None) -> Memory:
    """Returns an empty history."""
    del rng
    return Memory(
      x,
      jnp.zeros((), linear.dtype(x)),
      jnp.ones((), jnp.int32),
      exponential.no_history(x, self.order),
    )

  def evaluations(self, count: int) -> int:
    """Returns one per step."""
    return count

  def step(
    self, field: Any, x: Any, memory: Memory, step: Any
  ) -> tuple[Any, Memory]:
    """Corrects x with the field at x, and moves on to the next time."""
    dtype = linear.dtype(x)
    data = linear.like(x, field(x, step.t))
    x = self._corrected(x, data, memory, step)

    over = exponential.interval(self.path, step.t, step.t_next, dtype)
    most: Any = self.order
    if self.lower_order_final:
      most = jnp.minimum(most, step.total - step.number)
    order = exponential.order(most, over, memory.history)
    weights = self._weights(over, order, memory.history.clocks[:-1], ())
    values = (x, data, *memory.history.values[:-1])
    history = memory.history.push(data, over.clock)
    after = Memory(x, step.t.astype(dtype), order.astype(jnp.int32), history)
    return linear.combine(weights, values), after

  def _corrected(self, x, data, memory, step):
    """Returns the state at step.t, from what the field says there."""
    first = step.number == 0
    # Before the first step there is nothing to correct: any interval will do.
    start = jnp.where(first, step.t_next, memory.t)
    over = exponential.interval(self.path, start, step.t, linear.dtype(x))
    history = memory.history
    weights = self._weights(over, memory.order, history.clocks[1:], (1.0,))
    skip = first
    if self.variant == "bh1":
      skip = skip | ~jnp.isfinite(over.h)
    weights = linear.select(skip, [], weights)
    values = (memory.x, *history.values, data)
    moved = linear.combine(weights, values)
    return jax.tree.map(lambda a, b: jnp.where(skip, a, b), x, moved)

  def _weights(self, over, order, clocks, ahead):
    """Returns the weights of x_s, D_s, the D before it, and the D ahead.

    `clocks` are those of the D before; `ahead` holds r = 1 when correcting.
    """
    behind = [(clock - over.clock) / over.h for clock in clocks]
    total = len(clocks) + len(ahead)
    chosen = [over.gain, *[0.0] * total]
    for p in range(1, self.order + 1):
      used = behind[: p - 1]
      nodes = [*used, *ahead]
      if nodes:
        shares = [
          g / r for g, r in zip(self._shares(over, nodes), nodes, strict=True)
        ]
      else:
        shares = []
      unused = [0.0] * (len(clocks) - len(used))
      weights = [
        over.gain - sum(shares),
        *shares[: len(used)],
        *unused,
        *shares[len(used) :],
      ]
      chosen = linear.select(order == p, weights, chosen)
    return [over.keep, *chosen]

  def _shares(self, over, nodes):
    """Returns the g_i of the nodes r_i."""
    if len(nodes) == 1:
      size = over.gain if self.variant == "bh2" else over.alpha * over.h
      return [0.5 * size]
    scale = over.alpha * over.h
    moments = [
      scale * phi * math.factorial(k)
      for k, phi in enumerate(exponential.phis(-over.h, len(nodes) + 1))
    ]
    return quadrature(nodes, moments[1:])


def quadrature(nodes: list[Any], moments: list[Any]) -> list[Any]:
  """Returns the g_i with sum_i g_i r_i^k = moments_k, k = 0, 1, ...

  g_i is the functional of which these are the moments, applied to the Lagrange
  polynomial that is 1 at r_i and 0 at the others.
  """
  weights = []
  for i, node in enumerate(nodes):
    polynomial = [1.0]  # Its coefficients, the constant one first.
    for other in nodes[:i] + nodes[i + 1 :]:
      raised, lowered = [0.0, *polynomial], [*polynomial, 0.0]
      polynomial = [
        (a - other * b) / (node - other)
        for a, b in zip(raised, lowered, strict=True)
      ]
    terms = zip(polynomial, moments, strict=True)
    weights.append(sum(c * moment for c, moment in terms))
  return weights


def unipc(
  path: paths.Path,
  order: int = 2,
  variant: str = "bh2",
  lower_order_final: bool = True,
) -> UniPC:
  """Builds UniPC of order 1, 2 or 3 with B(h) "bh1" or "bh2"."""
  if order not in (1, 2, 3):
    raise ValueError(
      f"UniPC has order 1, 2 or 3, not {order}: 2 suits guided sampling, 3 "
      "sampling without guidance."
    )
  if variant not in ("bh1", "bh2"):
    raise ValueError(
      f"There is no variant {variant!r} of UniPC: it must be 'bh1' or 'bh2'; "
      "'bh2' is the steadier one for few steps."
    )
  return UniPC("unipc", path, order, variant, lower_order_final)


SOLVERS: dict[str, Callable[..., UniPC]] = {"unipc": unipc}
