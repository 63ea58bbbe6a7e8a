"""Choosing from a table of factories by the name that a config gives."""

import difflib
import inspect
from collections.abc import Callable, Collection, Mapping
from typing import Any


def check(kind: str, known: Collection[str], name: str) -> None:
  """Raises ValueError for a name that is not known, with the nearest."""
  if name not in known:
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"one of {sorted(known)}."
    raise ValueError(f"There is no {kind} {name!r}: {hint}")


def choose(
  kind: str,
  table: Mapping[str, Callable[..., Any]],
  name: str,
  options: Collection[str],
  given: Collection[str] = (),
) -> Callable[..., Any]:
  """Returns the factory `name` of `table`, which takes all of `options`.

  `given` are the parameters that are not the config's to set. Raises ValueError
  for an unknown name, with the nearest, or an option that it does not take.
  """
  check(kind, table, name)
  parameters = inspect.signature(table[name]).parameters
  takes = [option for option in parameters if option not in given]
  for option in options:
    if option not in takes:
      raise ValueError(
        f"The {kind} {name!r} has no option {option!r}; it takes "
        f"{', '.join(takes) or 'none'}."
      )
  return table[name]
