"""From `--config=FILE[:ARGUMENT] --config.a.b=VALUE ...` to an Experiment."""

import collections.abc
import re

import ml_collections
from absl import flags
from ml_collections import config_flags

from flowjax import errors, schema
from flowjax.train import experiment

HELP = (
  "a Python file with get_config(), run as code; FILE:ARGUMENT calls "
  "get_config(ARGUMENT). Any key can be overridden: --config.optim.b=c"
)


def load(
  file: str, overrides: collections.abc.Sequence[str]
) -> experiment.Experiment:
  """Loads a config file, applies `--config.key=value` words, and checks it.

  Raises UserError for a file that is not there, a key that does not exist
  (naming the closest), a value of the wrong type or an impossible value.
  """
  config = _parse(file, [])
  nones, others = [], []
  for word in overrides:
    (nones if word.endswith("=None") else others).append(word)
  for key in filter(None, map(_key, overrides)):
    _check_key(config, key)
  config = _parse(file, others)
  for word in nones:
    _set_none(config, _key(word))
  return experiment.build(config)


def _parse(file: str, overrides: list[str]) -> ml_collections.ConfigDict:
  values = flags.FlagValues()
  words = ["flowjax", f"--config={file}", *overrides]
  config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=words)
  try:
    rest = values(words)
    config = values["config"].value
  except flags.Error as error:
    raise errors.UserError(str(error)) from error
  except FileNotFoundError as error:
    raise errors.UserError(f"There is no config file {file!r}.") from error
  except OSError as error:
    raise errors.UserError(
      f"The config file {file!r} cannot be loaded: {error}"
    ) from error
  except (AttributeError, KeyError, TypeError, ValueError) as error:
    raise errors.UserError(f"The config file {file!r} fails: {error}") from (
      error
    )
  if rest[1:]:
    raise errors.UserError(f"What is {rest[1]!r}? A key is --config.a.b=value.")
  return config


def _key(word: str) -> str:
  found = re.match(r"--?config\.([^=]+)", word)
  return found.group(1) if found else ""


def _check_key(config: ml_collections.ConfigDict, key: str) -> None:
  node, where = config, "config"
  for part in key.split("."):
    if not isinstance(node, ml_collections.ConfigDict):
      raise errors.UserError(f"{where} is a value and has no key {part!r}.")
    if part not in node:
      raise errors.UserError(
        f"Unknown key {where}.{part}. {schema.closest(part, node.keys())}"
      )
    node, where = node[part], f"{where}.{part}"


def _set_none(config: ml_collections.ConfigDict, key: str) -> None:
  group, _, leaf = key.rpartition(".")
  node = config
  for part in filter(None, group.split(".")):
    node = node[part]
  try:
    node[leaf] = None
  except TypeError as error:
    raise errors.UserError(f"config.{key} cannot be None.") from error
