"""Which parameters stay as they are: by name, in a tree of their own.

What is frozen has no gradient, no moments in the optimizer and no average: the
step differentiates the rest of the tree alone.
"""

import collections.abc
import re
from typing import Any

from flowjax.train import manifest

Names = collections.abc.Set[str]
NONE: Names = frozenset()


def names(
  patterns: collections.abc.Iterable[str], params: dict[str, Any]
) -> Names:
  """Returns the names of the parameters that a regex matches as a whole.

  Raises ValueError for a regex that matches none, and if they match all.
  """
  every = list(manifest.named_leaves(params))
  found: set[str] = set()
  for pattern in patterns:
    matched = {name for name in every if re.fullmatch(pattern, name)}
    if not matched:
      raise ValueError(
        f"{pattern!r} matches no parameter. There are {', '.join(every)}."
      )
    found |= matched
  if len(found) == len(every):
    raise ValueError("Every parameter is frozen: nothing is left to train.")
  return frozenset(found)


def split(params: Any, frozen: Names) -> tuple[Any, Any]:
  """Returns the parameters that are trained, and the others."""
  if not frozen:
    return params, {}
  trained: dict[str, Any] = {}
  rest: dict[str, Any] = {}
  for name, leaf in manifest.named_leaves(params).items():
    (rest if name in frozen else trained)[name] = leaf
  return manifest.nested(trained), manifest.nested(rest)


def overlaid(below: Any, above: Any) -> Any:
  """Returns the leaves of both trees, those of `above` where both have one."""
  if not isinstance(above, dict):
    return above
  merged = dict(below)
  for key, value in above.items():
    merged[key] = overlaid(below.get(key, {}), value)
  return merged
