"""Configs as frozen dataclasses: what a key means is its field.

`build` is the only way from a mapping to a dataclass. It refuses an unknown
key, a missing type and an impossible value before anything else is built.
"""

import collections.abc
import dataclasses
import difflib
import json
import math
import re
import types
import typing
from typing import Any, TypeVar

from flowjax import errors

T = TypeVar("T")


def closest(word: str, words: collections.abc.Iterable[str]) -> str:
  """Returns a hint that names the closest of `words`, or lists them all."""
  words = sorted(words)
  near = difflib.get_close_matches(word, words, n=1, cutoff=0.5)
  if near:
    return f"Did you mean '{near[0]}'?"
  return f"There are: {', '.join(words)}."


def build(cls: type[T], values: collections.abc.Mapping, where: str) -> T:
  """Builds the dataclass `cls` from `values`, found at `where` in a config.

  Nested dataclasses are built from nested mappings, or from a string that is
  the `name` in them. Raises UserError with the
  key, the value and what would do. A key that is missing has its default; where
  there may be none, `require_all` says so.
  """
  fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
  hints = typing.get_type_hints(cls)
  for key in values:
    if key not in fields:
      raise errors.UserError(
        f"Unknown key {where}.{key}. {closest(str(key), fields)}"
      )
  arguments = {
    key: _convert(values[key], hints[key], f"{where}.{key}") for key in values
  }
  try:
    return cls(**arguments)
  except errors.UserError:
    raise
  except (ValueError, TypeError) as error:
    raise errors.UserError(f"{where}: {error}") from error


def require_among(
  config: Any, **words: collections.abc.Collection[str]
) -> None:
  """Raises ValueError for a word that is not among those of its field."""
  for field, known in words.items():
    if (word := getattr(config, field)) not in known:
      raise ValueError(f"{field}={word!r} is not known. {closest(word, known)}")


def require_patterns(name: str, patterns: collections.abc.Iterable[str]):
  """Raises ValueError for a regex that is none, in the field `name`."""
  for pattern in patterns:
    try:
      re.compile(pattern)
    except re.error as error:
      raise ValueError(
        f"{name}: {pattern!r} is no regular expression: {error}."
      ) from error


def require_all(config: Any, values: collections.abc.Mapping, where: str):
  """Raises UserError for a key of `config` that `values` do not have."""
  for field in dataclasses.fields(config):
    if field.name not in values:
      raise errors.UserError(
        f"{where}.{field.name} is missing: the config was damaged or edited. "
        f"Its default is {_shown(getattr(config, field.name))}."
      )
    item = getattr(config, field.name)
    if dataclasses.is_dataclass(item):
      require_all(item, values[field.name], f"{where}.{field.name}")


def _shown(value: Any) -> str:
  return (
    json.dumps(to_dict(value))
    if dataclasses.is_dataclass(value)
    else repr(value)
  )


def to_dict(config: Any) -> dict[str, Any]:
  """Returns the nested plain dict of a config, as JSON can hold it."""

  def plain(value):
    if isinstance(value, dict):
      return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
      return [plain(item) for item in value]
    return value

  return plain(dataclasses.asdict(config))


def difference(old: dict, new: dict, where: str = "config") -> list[str]:
  """Lists the leaves in which two nested dicts differ, one line each."""
  rows = []
  for key in sorted(set(old) | set(new)):
    name, a, b = f"{where}.{key}", old.get(key), new.get(key)
    if isinstance(a, dict) and isinstance(b, dict):
      rows += difference(a, b, name)
    elif a != b:
      rows.append(f"{name}: {a!r} -> {b!r}")
  return rows


def _convert(value: Any, hint: Any, where: str) -> Any:
  if dataclasses.is_dataclass(hint):
    if dataclasses.is_dataclass(value):
      return value
    if isinstance(value, str) and "name" in typing.get_type_hints(hint):
      value = {"name": value}
    if not isinstance(value, collections.abc.Mapping):
      raise errors.UserError(f"{where} must be a group of keys, not {value!r}.")
    return build(typing.cast(type, hint), value, where)
  origin, arguments = typing.get_origin(hint), typing.get_args(hint)
  if origin in (typing.Union, types.UnionType):
    if value is None and type(None) in arguments:
      return None
    (inner,) = [item for item in arguments if item is not type(None)]
    return _convert(value, inner, where)
  if origin is tuple:
    return _convert_tuple(value, arguments, where)
  if origin is dict or hint is dict:
    return dict(value)
  return _convert_plain(value, hint, where)


def _convert_tuple(value: Any, arguments: tuple, where: str) -> tuple:
  if not isinstance(value, (tuple, list)):
    kinds = ", ".join(
      "..." if item is Ellipsis else item.__name__ for item in arguments
    )
    raise errors.UserError(
      f"{where} must be a tuple ({kinds}), not {value!r}; on a command line "
      f"'--{where}=(A, B)'."
    )
  if len(arguments) == 2 and arguments[1] is Ellipsis:
    arguments = (arguments[0],) * len(value)
  if len(value) != len(arguments):
    raise errors.UserError(
      f"{where} must have {len(arguments)} entries, not {len(value)}: "
      f"{value!r}; on a command line '--{where}=(A, B)'."
    )
  return tuple(
    _convert(item, hint, f"{where}[{i}]")
    for i, (item, hint) in enumerate(zip(value, arguments, strict=True))
  )


def _convert_plain(value: Any, hint: Any, where: str) -> Any:
  if hint is Any:
    return value
  if hint is float and type(value) is int:
    return float(value)
  if hint is float and isinstance(value, float) and not math.isfinite(value):
    raise errors.UserError(
      f"{where} = {value} must be a finite number; leave it out for its "
      "default."
    )
  if type(value) is not hint:
    raise errors.UserError(
      f"{where} must be of type {hint.__name__}, not "
      f"{type(value).__name__}: {value!r}."
    )
  return value
