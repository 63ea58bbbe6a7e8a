"""From `--config=FILE[:ARGUMENT] --config.a.b=VALUE ...` to an Experiment."""

import collections.abc
import copy
import pathlib
import re
import traceback
from typing import Any

import ml_collections
from absl import flags
from ml_collections import config_flags

from flowjax import errors, schema
from flowjax.data import config as data_config
from flowjax.train import experiment, workdir

Words = collections.abc.Sequence[str]
Define = collections.abc.Callable[[flags.FlagValues, list[str]], list[str]]

HELP = (
  "a Python file with get_config(), run as code; FILE:ARGUMENT calls "
  "get_config(ARGUMENT); or the config.json of a workdir. Any key can be "
  "overridden: --config.optim.b=c"
)


def load(file: str, overrides: Words) -> experiment.Experiment:
  """Loads a config file, applies `--config.key=value` words, and checks it.

  Raises UserError for a file that is not there, a key that does not exist
  (naming the closest), a value of the wrong type or an impossible value.
  """
  return _overridden(_from_file(file), overrides, f"--config={file}")


def data(
  file: str, overrides: Words
) -> tuple[data_config.DataConfig, str | None]:
  """Loads what a config says of its data, and the pipeline that encodes it.

  The rest may be of a model that is trained on what that gives.
  """
  values = _values(_from_file(file), overrides, f"--config={file}").to_dict()
  found = schema.build(data_config.DataConfig, values["data"], "config.data")
  return found, values["pipeline"]


def start(file: str) -> ml_collections.ConfigDict:
  """Returns what a config file says, before anything is overridden."""
  return _parse(_from_file(file), [], f"--config={file}")


def overridden(
  config: ml_collections.ConfigDict, overrides: Words, where: str
) -> experiment.Experiment:
  """Applies `--config.key=value` words to a config, and checks it."""
  return _overridden(_from_dict(config), overrides, where)


def adjusted(
  config: experiment.Experiment, overrides: Words, group: str
) -> experiment.Experiment:
  """Applies `--config.group.key=value` words to the config of a run."""
  for key in map(_key, overrides):
    if key.split(".")[0] != group:
      raise errors.UserError(
        f"config.{key} is part of how the run was trained; only config.{group} "
        "can be changed here."
      )

  start = experiment.to_config_dict(config)
  return overridden(start, overrides, f"config.{group}")


def _beside(path: pathlib.Path) -> str:
  """Returns a hint at what there is in the place of a missing config."""
  folder = path.parent
  found = [p.name for p in (*folder.glob("*.py"), *folder.glob("*.json"))]
  if found:
    return f"In {folder}: {schema.closest(path.name, found)}"
  here = pathlib.Path.cwd()
  return f"There is none in {folder} at all, seen from {here}."


def _from_file(file: str) -> Define:
  path = pathlib.Path(file.partition(":")[0])
  if not path.is_file():
    raise errors.UserError(
      f"There is no config file {str(path)!r}. {_beside(path)}"
    )
  if path.suffix == ".json":
    config = workdir.read_config(path.parent)
    return _from_dict(experiment.to_config_dict(config))

  def define(values, words):
    argv = ["flowjax", f"--config={file}", *words]
    config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=argv)
    return argv

  return define


def _from_dict(config: ml_collections.ConfigDict) -> Define:
  def define(values, words):
    argv = ["flowjax", *words]
    # A copy, as what is overridden is written into it.
    config_flags.DEFINE_config_dict(
      "config",
      copy.deepcopy(config),
      flag_values=values,
      sys_argv=argv,
    )
    return argv

  return define


def _overridden(
  define: Define, overrides: Words, where: str
) -> experiment.Experiment:
  return experiment.build(_values(define, overrides, where))


def _values(
  define: Define, overrides: Words, where: str
) -> ml_collections.ConfigDict:
  """Returns a config with what overrides it; its values are not looked at."""
  before = _parse(define, [], where)
  nones = [word for word in overrides if word.endswith("=None")]
  others = [word for word in overrides if word not in nones]
  for key in filter(None, map(_key, overrides)):
    _check_key(before, key)
  try:
    config = _parse(define, others, where)
  except errors.UserError as error:
    found = re.search(r"flag --config\.([\w.]+)=(.*?): .", str(error))
    if not found:
      raise
    key, value = found.groups()
    raise errors.UserError(
      f"config.{key} cannot be {value!r}: {_kind(before, key)}."
    ) from error
  _forget_options(before, config, {_key(word) for word in overrides})
  for word in nones:
    _set_none(config, _key(word))
  return config


def _reason(error: Exception) -> str:
  """Returns what a config raised and, if it did not mean to, in which line.

  With an argument it comes wrapped in an error whose text is its traceback.
  """
  text = str(error).strip() or type(error).__name__
  what, wrapped = text.splitlines()[-1], "Traceback (most recent" in text
  if isinstance(error, ValueError) and not wrapped:
    return f": {what}"
  if what.startswith("ValueError: "):
    return f": {what.removeprefix('ValueError: ')}"
  trace = traceback.format_tb(error.__traceback__)
  found = re.findall(
    r"line (\d+), in (?:get_config|<module>)",
    text if wrapped else "".join(trace),
  )
  return f", line {found[-1]}: {what}" if found else f": {what}"


def _forget_options(
  before: ml_collections.ConfigDict,
  config: ml_collections.ConfigDict,
  given: set[str],
) -> None:
  """Takes from a group whose name was changed the options of the old name.

  Those are the keys that are None by default; what was given stays.
  """
  plain = experiment.defaults(config.model.name)
  for key in given:
    group, _, leaf = key.rpartition(".")
    old, new, default = before, config, plain
    for part in filter(None, group.split(".")):
      old, new, default = old[part], new[part], default[part]
    if leaf != "name" or group == "model" or old.name == new.name:
      continue
    for option in new:
      if default[option] is None and f"{group}.{option}" not in given:
        new[option] = None


def _parse(
  define: Define, words: list[str], where: str
) -> ml_collections.ConfigDict:
  values = flags.FlagValues()
  argv = define(values, words)
  try:
    rest = values(argv)
  # The file is the user's code, and whatever it raises is the answer.
  except Exception as error:
    raise errors.UserError(f"{where}{_reason(error)}") from error
  config = values["config"].value
  if not isinstance(config, ml_collections.ConfigDict):
    raise errors.UserError(
      f"{where}: get_config() must return a ConfigDict, such as that of "
      f"flowjax.train.experiment.defaults(), not {type(config).__name__}."
    )
  if rest[1:]:
    raise errors.UserError(f"What is {rest[1]!r}? A key is --config.a.b=value.")
  return config


def _kind(config: ml_collections.ConfigDict, key: str) -> str:
  """Says of what type the value of a key has to be."""
  node: Any = config
  for part in key.split("."):
    kind = node.get_type(part)
    node = node[part]
  return f"it must be of type {kind.__name__}" + (
    "" if node is None else f", such as {node!r}"
  )


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
  if isinstance(node, ml_collections.ConfigDict):
    raise errors.UserError(
      f"{where} is a group of keys: set one of them, {where}."
      + f", {where}.".join(list(node.keys())[:3])
      + ", ..."
    )


def _set_none(config: ml_collections.ConfigDict, key: str) -> None:
  group, _, leaf = key.rpartition(".")
  node = config
  for part in filter(None, group.split(".")):
    node = node[part]
  try:
    node[leaf] = None
  except TypeError as error:
    raise errors.UserError(f"config.{key} cannot be None.") from error
