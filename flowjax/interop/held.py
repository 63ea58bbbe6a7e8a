"""Which formats hold a network: what they leave open, and what they fix."""

import collections.abc
from typing import Any

from flowjax import errors

Faults = collections.abc.Mapping[str, list[str]]


def faults(config: Any, fixed: collections.abc.Mapping[str, Any]) -> list[str]:
  """Returns what a config says that is other there, where it is fixed."""
  return [
    f"{name} = {getattr(config, name)!r}, there {value!r}"
    for name, value in fixed.items()
    if getattr(config, name) != value
  ]


def require(format: str, network: str, found: Faults) -> None:
  """Refuses a config that a format would compute something else of.

  `found` are the faults of each format, but for torch, which holds all.
  """
  if found[format]:
    can = [name for name in found if not found[name]] + ["torch"]
    raise errors.UserError(
      f"The {format} {network} is another network, whose numbers would "
      "differ:\n  "
      + "\n  ".join(found[format])
      + f"\nFormats that hold this one: {', '.join(can)}."
    )
