"""Counts the arithmetic of a program before it is compiled.

A multiply-add is two; what is not a matrix product is left out, as in the
formulas of the models. What a gradient computes a second time is counted: the
difference to three times the forward formula is what rematerialisation costs.
"""

import collections.abc
import dataclasses
import math
from typing import Any

import jax

# Forward, and its gradient with the scores made again: 2 products, and 5.
_FUSED = {"dot_product_attention_fwd": 2, "dot_product_attention_bwd": 5}


@dataclasses.dataclass(frozen=True)
class Count:
  """FLOPs of all devices together, and the T x S scores that are held.

  `scores` counts the entries of attention matrices that are written to memory:
  none where attention is one kernel.
  """

  flops: int
  scores: int


def of(function: collections.abc.Callable, *shapes: Any) -> Count:
  """Counts what `function` does for arguments of these shapes."""
  return count(jax.make_jaxpr(function)(*shapes).jaxpr)


def count(jaxpr: Any) -> Count:
  """Counts dots and convolutions of a jaxpr: in a loop, times its trips."""
  flops = scores = 0
  for equation in jaxpr.eqns:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
      flops += _dot(equation)
      scores += _scores(equation)
    elif name == "conv_general_dilated":
      flops += _convolution(equation)
    elif name in _FUSED:
      flops += _FUSED[name] * _product(equation)
    # A loop runs its body so often; a kernel, once for each of its blocks;
    # what is written for one device runs on all of them.
    times = params.get("length", 1)
    if "grid_mapping" in params:
      times *= math.prod(params["grid_mapping"].grid)
    if name == "shard_map":
      times *= params["mesh"].size
    inner = [count(body) for body in _bodies(params)]
    # Of branches one is taken: the longest.
    add = max if name == "cond" and inner else sum
    flops += times * add(each.flops for each in inner)
    if "grid_mapping" not in params:
      scores += times * add(each.scores for each in inner)
  return Count(flops, scores)


def _bodies(params: dict) -> list[Any]:
  values = jax.tree.leaves(list(params.values()))
  bodies = [getattr(value, "jaxpr", value) for value in values]
  return [body for body in bodies if hasattr(body, "eqns")]


def _dot(equation: Any) -> int:
  (contract, _), _ = equation.params["dimension_numbers"]
  shape = equation.invars[0].aval.shape
  depth = math.prod(shape[dim] for dim in contract)
  return 2 * depth * math.prod(equation.outvars[0].aval.shape)


def _convolution(equation: Any) -> int:
  """Returns what a convolution of images does: a kernel at each position."""
  out = equation.params["dimension_numbers"].rhs_spec[0]
  kernel = equation.invars[1].aval.shape
  positions = math.prod(equation.outvars[0].aval.shape)
  return 2 * positions * math.prod(kernel) // kernel[out]


def _scores(equation: Any) -> int:
  """Returns the entries of the result if it is one of scores.

  Two dims of batch, the example and the head, and a result larger than both of
  what is multiplied: query times key, or the gradient of their answer.
  """
  _, (batch, _) = equation.params["dimension_numbers"]
  sizes = [math.prod(var.aval.shape) for var in equation.invars]
  result = math.prod(equation.outvars[0].aval.shape)
  return result if len(batch) == 2 and result > max(sizes) else 0


def _product(equation: Any) -> int:
  """Returns the FLOPs of queries times keys, [B, T, N, H] and [B, S, N, H]."""
  queries, keys = (var.aval.shape for var in equation.invars[:2])
  return 2 * math.prod(queries) * keys[1]
