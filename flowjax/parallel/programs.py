"""Programs that are compiled before any of them runs, one for each shape.

Where a batch may have one of several shapes, `jax.jit` would compile when it
meets one for the first time: in the middle of a run, and on every process while
the others wait.
"""

import collections.abc
import functools
from typing import Any

import jax

from flowjax.parallel import distributed, room

Told = collections.abc.Callable[[str], None]
Shapes = tuple[tuple[str, tuple[int, ...]], ...]


def ahead(
  jitted: Any,
  kinds: collections.abc.Sequence[tuple[Any, ...]],
  told: Told = lambda what: None,
) -> collections.abc.Callable[..., Any]:
  """Returns a jitted f(x, batch, ...) that has a program for each of `kinds`.

  Those are its arguments in the abstract, with their shardings; the shapes of
  the batch, a dict, say which program is meant. All processes have compiled all
  of them before this returns. `told` hears what is being compiled.
  """
  programs = {}
  for number, arguments in enumerate(kinds, 1):
    batch = arguments[1]
    told(f"compiling bucket {number} of {len(kinds)}, {size_of(batch)}")
    program = jitted.lower(*arguments).compile()
    room.require(program)
    programs[_shapes(batch)] = program
  distributed.meet()

  def call(x: Any, batch: dict[str, Any], *others: Any) -> Any:
    program = programs.get(_shapes(batch))
    assert program is not None, (_shapes(batch), list(programs))
    return program(x, batch, *others)

  return call


def size_of(batch: collections.abc.Mapping[str, Any]) -> str:
  """Returns height and width of a batch's images, or latents, as 512x768."""
  height, width = batch["mean" if "mean" in batch else "image"].shape[1:3]
  return f"{height}x{width}"


def _shapes(batch: collections.abc.Mapping[str, Any]) -> Shapes:
  return tuple(sorted((key, leaf.shape) for key, leaf in batch.items()))


def abstract(batch: dict[str, Any], sharding: Any) -> dict[str, Any]:
  """Returns the shapes and dtypes of a batch that is divided by `sharding`."""
  placed = functools.partial(jax.ShapeDtypeStruct, sharding=sharding)
  return jax.tree.map(lambda leaf: placed(leaf.shape, leaf.dtype), batch)
