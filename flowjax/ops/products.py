"""Products with kernels that devices share.

Devices that have examples or tokens of their own all multiply by the same
kernel. Each gets a copy, cast before it travels, and the gradients of the
copies are summed in a dtype of their own. On one device it is a plain product.
"""

import collections.abc
import contextlib
import contextvars
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
from jax.interpreters import ad, batching, mlir

from flowjax.ops import axes

_FREE = jax.sharding.PartitionSpec.UNCONSTRAINED
# From the name of a kernel to the axes of the mesh that divide its dims.
Places = collections.abc.Callable[[str], tuple[str | None, ...]]
_sums: contextvars.ContextVar[tuple[str, Places]] = contextvars.ContextVar(
  "flowjax_sums", default=("float32", lambda name: ())
)


@contextlib.contextmanager
def summing(
  dtype: str, places: Places = lambda name: ()
) -> collections.abc.Iterator[None]:
  """Lets gradients of kernels be summed over devices in `dtype`.

  Where `places` says that devices divide a kernel, each gets only its own part
  of the sum. It is read while a function is traced.
  """
  token = _sums.set((dtype, places))
  try:
    yield
  finally:
    _sums.reset(token)


def product(
  x: jax.Array,
  kernel: jax.Array,
  *,
  names: collections.abc.Sequence[str | None],
  contract: int = 1,
  terms: int = 1,
  called: str = "",
) -> jax.Array:
  """Contracts the last `contract` dims of x with the first of a kernel.

  `names` are those of the first dims of x, and the kernel is `called` so among
  the parameters. The first contracted dim is cut into
  `terms` ranges, whose products are a first dim of the result: it remains to
  sum them, which devices that have a range each do once for several products.
  """
  lead, inner = x.shape[:-contract], x.shape[-contract:]
  features = kernel.shape[contract:]
  names = names[: len(lead)]
  axes.check(lead[: len(names)], names)
  sharing = _sharing(names, kernel.shape, called)
  if not any(sharing.dims) and terms == 1:
    # One row per token makes the gradient of the kernel a plain matmul, which a
    # CPU does twice as fast.
    rows = x.reshape(-1, *inner)
    y = jnp.tensordot(rows, kernel.astype(x.dtype), axes=contract)
    return y.reshape(1, *lead, *features)
  return _shared(x, kernel, contract, terms, sharing)


# For the gradient the kernel is gathered again: kept, the copies of all layers
# would be on every device at once.
@functools.partial(jax.checkpoint, prevent_cse=False, static_argnums=(2, 3, 4))
def _shared(x, kernel, contract, terms, sharing):
  lead, inner = x.shape[:-contract], x.shape[-contract:]
  features = kernel.shape[contract:]
  copies = _copy(kernel, x.dtype, sharing)
  # Each shared dim of x becomes two, of which the copies have the first; and so
  # does the first contracted dim. Dims are numbered as einsum does.
  ways = copies.shape[: copies.ndim - kernel.ndim]
  cut = (n for way, size in zip(ways, lead, strict=False)
         for n in (way, size // way))  # fmt: skip
  ranges = (terms, inner[0] // terms, *inner[1:])
  x = x.reshape(*cut, *lead[len(ways) :], *ranges)
  copies = copies.reshape(*ways, *ranges, *features)
  of_x = list(range(x.ndim))
  of_lead, of_ranges = of_x[: -len(ranges)], of_x[-len(ranges) :]
  of_features = [x.ndim + i for i in range(len(features))]
  y = jnp.einsum(
    x,
    of_x,
    copies,
    [*of_lead[: 2 * len(ways) : 2], *of_ranges, *of_features],
    [of_ranges[0], *of_lead, *of_features],
  )
  return y.reshape(terms, *lead, *features)


def total(terms: jax.Array) -> jax.Array:
  """Returns the sum over the first dim, in the dtype of the terms."""
  return _sum(terms, 0)


def rows(table: jax.Array, index_B: jax.Array, called: str = "") -> jax.Array:
  """Returns the rows of a table with these indices, one for each example."""
  axes.check(index_B.shape, ["batch"])
  sharing = _sharing(["batch"], table.shape, called)
  if not any(sharing.dims):
    return jnp.take(table, index_B, axis=0)
  copies = _copy(table, table.dtype, sharing)
  look = jax.vmap(functools.partial(jnp.take, axis=0))
  found = look(copies, index_B.reshape(len(copies), -1))
  return found.reshape(-1, *table.shape[1:])


class _Sharing(NamedTuple):
  """Which devices have a copy of a kernel, and how their gradients are summed.

  For each shared dim `dims` has the axes of the mesh that split it. `kernel`
  are the axes that divide kernels; `place` has what divides each dim of this
  one, or is empty where those axes do not.
  """

  dims: tuple[tuple[str, ...], ...]
  kernel: tuple[str, ...]
  place: tuple[str | None, ...]
  sum_dtype: str


def _sharing(names, shape: tuple[int, ...], called: str) -> _Sharing:
  dims = tuple(axes.carriers(name) if name else () for name in names)
  sum_dtype, places = _sums.get()
  if not any(dims):
    return _Sharing((), (), (), sum_dtype)
  kernel = axes.carriers("kernel")
  # Of a stack of kernels this is one: it lacks the first dims.
  place = tuple(
    axis if axis and dim % axes.size(axis) == 0 else None
    for axis, dim in zip(places(called)[-len(shape) :], shape, strict=False)
  )
  is_divided = kernel and set(kernel) <= set(place)
  return _Sharing(dims, kernel, place if is_divided else (), sum_dtype)


def _copy(kernel: jax.Array, dtype: Any, sharing: _Sharing) -> jax.Array:
  """Returns copies of a kernel in `dtype`, along a first dim for each shared.

  There is one for every device along its axes. The map is linear; its
  transpose, by which gradients come back, sums over the copies.
  """
  shared = sharing.dims
  if not any(shared):
    return kernel.astype(dtype)
  sizes = jax.sharding.get_abstract_mesh().shape
  # Summed first is where kernels are divided, so that the other sums are of
  # parts; these are taken in one.
  inside = [a for each in shared for a in each if a in sharing.kernel]
  outside = [a for each in shared for a in each if a not in inside]
  groups = [tuple(group) for group in (outside, inside) if group]
  copies = _copies.bind(
    kernel,
    ways=tuple(math.prod(sizes[a] for a in group) for group in groups),
    groups=tuple(groups),
    dtype=jnp.dtype(dtype),
    back=(kernel.dtype, jnp.dtype(sharing.sum_dtype)),
    place=sharing.place if inside else (),
    lead=(),
  )
  order = [*outside, *inside]
  by_axis = copies.reshape(*(sizes[a] for a in order), *kernel.shape)
  wanted = [order.index(a) for each in shared for a in each]
  by_axis = by_axis.transpose(*wanted, *range(len(order), by_axis.ndim))
  ways = (math.prod(sizes[a] for a in each) for each in shared)
  return by_axis.reshape(*ways, *kernel.shape)


def _copied(kernel, *, ways, groups, dtype, back, place, lead):
  del back, place
  at = len(lead)
  whole = kernel.astype(dtype)  # What travels is as small as it can be.
  shape = (*kernel.shape[:at], *ways, *kernel.shape[at:])
  kept = [i for i in range(len(shape)) if not at <= i < at + len(ways)]
  copies = jax.lax.broadcast_in_dim(whole, shape, kept)
  before, after = (_FREE,) * at, (_FREE,) * (kernel.ndim - at)
  spec = jax.sharding.PartitionSpec(*before, *groups, *after)
  return jax.lax.with_sharding_constraint(copies, spec)


def _summed(cotangent, kernel, *, ways, groups, dtype, back, place, lead):
  del kernel, dtype
  if type(cotangent) is ad.Zero:
    return [None]
  kernel_dtype, sum_dtype = back
  found, at = cotangent.astype(sum_dtype), len(lead)
  if place:
    return [_scattered(found, groups, place, lead).astype(kernel_dtype)]
  for dim in reversed(range(at, at + len(ways))):
    found = _sum(found, dim)
    if dim > at:
      # XLA would make the two sums one: of the whole, over all devices.
      found = jax.lax.optimization_barrier(found)
  return [found.astype(kernel_dtype)]


def _scattered(x, groups, place, lead):
  """Returns the sum over copies, of which each device gets its own part.

  XLA finds out by itself that a part will do, but on TPUs only for some shapes;
  in others it sends twice as much.
  """
  *outside, inside = groups
  (divided,) = (i for i, axis in enumerate(place) if axis in inside)
  alone = tuple(None if i == divided else a for i, a in enumerate(place))

  def scatter(x):
    # A device has one copy, and of what was batched over devices one as well.
    # A kernel keeps its dims: flattened to two, fewer are scattered on TPUs.
    shape, own = x.shape[: len(lead)], x.shape[len(lead) + len(groups) :]
    kept = tuple(n for n in shape if n > 1)
    found = jax.lax.psum_scatter(
      x.reshape(*kept, *own),
      inside,
      scatter_dimension=len(kept) + divided,
      tiled=True,
    )
    found = jax.lax.psum(found, *outside) if outside else found
    return found.reshape(*shape, *found.shape[len(kept) :])

  spec = jax.sharding.PartitionSpec
  return jax.shard_map(
    scatter,
    in_specs=spec(*lead, *groups, *alone),
    out_specs=spec(*lead, *place),
  )(x)


def _sum(x, dim):
  # Unlike jnp.sum, which goes through float32.
  return jax.lax.reduce(x, np.zeros((), x.dtype), jax.lax.add, (dim,))


def _batched(axis, arguments, dims, *, lead, **params):
  if dims[0] is None:  # What is batched is another argument of the network.
    return _copies.bind(*arguments, lead=lead, **params), None
  kernel = jnp.moveaxis(arguments[0], dims[0], 0)
  return _copies.bind(kernel, lead=(axis.spmd_name, *lead), **params), 0


def _shaped(kernel, *, ways, groups, dtype, back, place, lead):
  del groups, back, place
  at = len(lead)
  shape = (*kernel.shape[:at], *ways, *kernel.shape[at:])
  return jax.core.ShapedArray(shape, dtype)


_copies = jax.extend.core.Primitive("copies")
_copies.def_impl(_copied)
_copies.def_abstract_eval(_shaped)
mlir.register_lowering(_copies, mlir.lower_fun(_copied, multiple_results=False))
ad.deflinear2(_copies, _summed)
batching.fancy_primitive_batchers[_copies] = _batched
