"""How gradients are summed over devices: in which dtype, and how often.

Devices along `data` have the same parameters. If the gradient of each part of
an accumulated batch were summed over them, a step would send as many sums as it
has parts. Here each has its share: a copy of the parameters, whose gradient
stays where it is until the last part is done.
"""

import collections.abc
import contextlib
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from flowjax.ops import axes as activation_axes
from flowjax.ops import products
from flowjax.parallel import mesh as meshes
from flowjax.parallel import rules

AXIS = "data"
DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class Sums:
  """Sums in `dtype`; with `shares` above 1, those over `data` come last.

  Then a tree of parameters has a first dim of shares, one for each place along
  `data`. With one share trees are as they are. `table` says which devices need
  which part of a sum.
  """

  dtype: str = "float32"
  shares: int = 1
  table: rules.Rules = ()

  def traced(self) -> contextlib.AbstractContextManager[None]:
    """Within this context, gradients of kernels are summed in `dtype`."""
    return products.summing(
      self.dtype, functools.partial(rules.dims, self.table)
    )

  def spread(self, tree: Any) -> Any:
    """Returns a copy for each share."""
    if self.shares == 1:
      return tree
    return jax.tree.map(
      lambda x: _apart(jnp.broadcast_to(x[None], (self.shares, *x.shape))), tree
    )

  def zeros(self, tree: Any) -> Any:
    """Returns zeros, in float32, of the shapes of a tree that was spread."""
    place = _apart if self.shares > 1 else lambda x: x
    return jax.tree.map(lambda x: place(jnp.zeros(x.shape, jnp.float32)), tree)

  def total(self, tree: Any) -> Any:
    """Returns the sum over shares, in float32 again."""
    if self.shares == 1:
      return tree

    def total(x):
      return products.total(x.astype(self.dtype)).astype(jnp.float32)

    return jax.tree.map(total, tree)

  def over(
    self, function: collections.abc.Callable[..., Any]
  ) -> collections.abc.Callable[..., Any]:
    """Returns `function(params, *inputs)` of parameters that were spread.

    Each share of them sees its own range of the batch.
    """

    def cut(x_B):
      return x_B.reshape(self.shares, -1, *x_B.shape[1:])

    def apply(params, *inputs):
      rest = tuple(axis for axis in meshes.BATCH_AXES if axis != AXIS)
      within = {**meshes.ACTIVATIONS, "batch": rest}
      with activation_axes.rules(within, activation_axes.device()):
        found = jax.vmap(function, spmd_axis_name=AXIS)(
          params, *jax.tree.map(cut, inputs)
        )
      return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), found)

    return apply


PLAIN = Sums()


def _apart(x):
  free = (P.UNCONSTRAINED,) * (x.ndim - 1)
  return jax.lax.with_sharding_constraint(x, P(AXIS, *free))
