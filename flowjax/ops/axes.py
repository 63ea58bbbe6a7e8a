"""Logical names for the dims of activations.

A model says what a dim is ("batch", "tokens", "heads"); which axes of a mesh
carry it is decided elsewhere and is active only inside `rules`. Without rules
every function here is the identity, so a model reads the same on one device
and on a thousand.
"""

import collections.abc
import contextlib
import contextvars
import math

import jax
import jax.numpy as jnp

# What carries a name: no axis, one axis of the mesh, or several.
Axes = str | tuple[str, ...] | None

_rules: contextvars.ContextVar[dict[str, Axes] | None] = contextvars.ContextVar(
  "flowjax_axes", default=None
)
_device: contextvars.ContextVar[jax.Device | None] = contextvars.ContextVar(
  "flowjax_device", default=None
)


@contextlib.contextmanager
def rules(
  mapping: collections.abc.Mapping[str, Axes],
  device: jax.Device | None = None,
) -> collections.abc.Iterator[None]:
  """Activates `mapping` from logical names to axes of the mesh.

  The names are read while a function is traced, so the context must be open
  at that time, together with `jax.set_mesh`. `device` is one of the mesh: what
  is traced for a machine that is elsewhere must know which it is.
  """
  token, device_token = _rules.set(dict(mapping)), _device.set(device)
  try:
    yield
  finally:
    _rules.reset(token)
    _device.reset(device_token)


def device() -> jax.Device:
  """Returns a device like those on which what is traced now will run."""
  return _device.get() or jax.devices()[0]


def carriers(dim_name: str) -> tuple[str, ...]:
  """Returns the axes of the mesh, larger than 1, that split a named dim."""
  return tuple(axis for axis in of(dim_name) if size(axis) > 1)


def of(dim_name: str | None) -> tuple[str, ...]:
  """Returns all axes of the mesh on which a named dim lives."""
  return () if _rules.get() is None else _each(dim_name)


def size(*mesh_axes: str) -> int:
  """Returns over how many devices those axes of the mesh go."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty and mesh_axes:
    raise ValueError(
      "axes.rules are active without a mesh. Enter jax.set_mesh(mesh) as well."
    )
  return math.prod(mesh.shape[axis] for axis in mesh_axes)


def name(x: jax.Array, *names: str | None) -> jax.Array:
  """Returns `x`, laid out as the active rules say for the names of its dims.

  None stands for a dim that is never split.
  """
  if _rules.get() is None:
    return x
  if len(names) != x.ndim:
    raise ValueError(f"{names} names {len(names)} dims, x has shape {x.shape}.")
  check(x.shape, names)
  spec = jax.sharding.PartitionSpec(*(_axes(dim_name) for dim_name in names))
  return jax.lax.with_sharding_constraint(x, spec)


def check(
  shape: collections.abc.Sequence[int],
  names: collections.abc.Sequence[str | None],
) -> None:
  """Refuses dims that the devices cannot split as their names say."""
  for dim, dim_name in zip(shape, names, strict=True):
    if dim % (ways := parts(dim_name)):
      raise ValueError(
        f"A dim of {dim} '{dim_name}' cannot be split over {ways} devices "
        f"(mesh axes {_axes(dim_name)}). Use a multiple of {ways}, or a mesh "
        "with smaller axes there."
      )


def even(x: jax.Array, dim_name: str, dim: int = 1) -> jax.Array:
  """Returns x with zeros after its dim, so that devices share it evenly."""
  missing = -x.shape[dim] % parts(dim_name)
  if not missing:
    return x
  padding = [(0, 0)] * x.ndim
  padding[dim] = (0, missing)
  return jnp.pad(x, padding)


def is_shared() -> bool:
  """Returns whether several devices compute what is traced now."""
  if _rules.get() is None:
    return False
  return size(*jax.sharding.get_abstract_mesh().axis_names) > 1


def parts(dim_name: str | None) -> int:
  """Returns over how many devices the dim of that name is split."""
  return size(*of(dim_name))


def _axes(dim_name: str | None) -> Axes:
  mapping = _rules.get()
  if dim_name is None or mapping is None:
    return None
  if dim_name not in mapping:
    raise ValueError(
      f"No rule for the dim '{dim_name}'. There are rules for: "
      f"{', '.join(sorted(mapping))}."
    )
  return mapping[dim_name]


def _each(dim_name: str | None) -> tuple[str, ...]:
  found = _axes(dim_name)
  return (found,) if isinstance(found, str) else found or ()
