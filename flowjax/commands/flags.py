"""Reads the flags of a command; what is wrong with them is one line."""

import argparse
import collections.abc
import math
import pathlib
import re
from typing import NoReturn

from flowjax import errors, schema

EXIT_CODES = """exit codes:
  0 done    1 a defect of FlowJAX    2 a mistake in a flag or config
  3 data    4 no sound checkpoint    5 numbers that are not finite
  6 another process was lost, or a step hangs: start all of them again
  42 stopped by a signal and saved: run the same command again
  141 nobody reads what is printed, as after `| head`"""


def overview(commands: collections.abc.Mapping[str, str]) -> str:
  """Returns the help of `flowjax` itself: its commands, and what they do."""
  rows = "\n".join(f"  {name:<9} {text}" for name, text in commands.items())
  return f"""FlowJAX trains flow and diffusion transformers.

usage: flowjax COMMAND [--flag=value ...]

{rows}

`flowjax COMMAND --help` says what a command does, with an example.

{EXIT_CODES}"""


def path(text: str) -> pathlib.Path:
  """Reads a flag that names a file or a folder."""
  if not text:
    raise argparse.ArgumentTypeError("it names nothing; is a variable empty?")
  return pathlib.Path(text)


def count(text: str) -> int:
  """Reads a flag that is a number of things: 1, 2, ..."""
  if not text.isdecimal() or int(text) < 1:
    raise argparse.ArgumentTypeError(f"{text!r} must be a number, at least 1")
  return int(text)


def size(text: str) -> int:
  """Reads a size in bytes, such as 5GB or 500MB."""
  found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG])B", text, re.IGNORECASE)
  if not found or not float(found.group(1)):
    raise argparse.ArgumentTypeError(f"{text!r} must be a size, such as 5GB")
  unit = {"K": 10**3, "M": 10**6, "G": 10**9}[found.group(2).upper()]
  return max(1, int(float(found.group(1)) * unit))


def pixels(text: str) -> tuple[int, int]:
  """Reads a height and a width, such as 1024x768."""
  found = re.fullmatch(r"(\d+)x(\d+)", text)
  if not found or not all(map(int, found.groups())):
    raise argparse.ArgumentTypeError(
      f"{text!r} must be height x width in pixels, such as 1024x768"
    )
  return int(found.group(1)), int(found.group(2))


def offset(text: str) -> tuple[int, int]:
  """Reads how far from the top and from the left, such as 64,0."""
  found = re.fullmatch(r"(\d+),(\d+)", text)
  if not found:
    raise argparse.ArgumentTypeError(
      f"{text!r} must be pixels from the top and from the left, such as 64,0"
    )
  return int(found.group(1)), int(found.group(2))


def seed(text: str) -> int:
  """Reads a seed: 0, 1, ... below 2^32."""
  if not text.isdecimal() or int(text) >= 2**32:
    raise argparse.ArgumentTypeError(f"{text!r} must be a number from 0 on")
  return int(text)


def strength(text: str) -> float:
  """Reads a part of the way to noise, above 0 and at most 1."""
  try:
    found = float(text)
  except ValueError:
    found = math.nan
  if not 0.0 < found <= 1.0:
    raise argparse.ArgumentTypeError(
      f"{text!r} must be above 0 and at most 1: 0.3 changes details, 0.6 is "
      "usual, and of 1 nothing of an image is left"
    )
  return found


def numbers(text: str) -> tuple[float, ...]:
  """Reads finite numbers with commas between them, such as 1,1.5,3."""
  try:
    found = tuple(float(word) for word in text.split(","))
  except ValueError:
    found = ()
  if not found or not all(map(math.isfinite, found)):
    raise argparse.ArgumentTypeError(
      f"{text!r} must be a finite number, or some with commas, such as 1,1.5,3"
    )
  return found


def add_compiler_flags(parser) -> None:
  """Adds the flag that leaves the compiler as it is."""
  parser.add_argument(
    "--compiler_flags",
    action=argparse.BooleanOptionalAction,
    default=True,
    help="those of flowjax/parallel/compiler_flags.py, or none but your own",
  )


class Parser(argparse.ArgumentParser):
  """A parser of one command that names the closest flag to a mistyped one.

  Where the command has a flag `--config`, or is `adjustable`, the words
  `--config.KEY=VALUE` are collected as `overrides`.
  """

  adjustable = False

  def __init__(self, name: str, **kwargs):
    self._flags: list[str] = []
    super().__init__(
      prog=f"flowjax {name}",
      epilog=EXIT_CODES,
      formatter_class=argparse.RawDescriptionHelpFormatter,
      allow_abbrev=False,
      **kwargs,
    )

  def add_argument(self, *names, **kwargs) -> argparse.Action:
    """Adds a flag, says its default, and remembers what it is called."""
    default = kwargs.get("default")
    if default not in (None, argparse.SUPPRESS, True, False):
      kwargs["help"] = f"{kwargs['help']} (default: {default})"
    action = super().add_argument(*names, **kwargs)
    self._flags.extend(action.option_strings)
    return action

  def read(self, words: collections.abc.Sequence[str]) -> argparse.Namespace:
    """Returns the flags of `words`; raises UserError for what is wrong."""
    overrides = [w for w in words if w.startswith("--config.")]
    if not self.adjustable and "--config" not in self._flags:
      overrides = []
    for word in overrides:
      if "=" not in word:
        raise errors.UserError(f"{word} needs its value behind an =.")
    others = [word for word in words if word not in overrides]
    # Before argparse looks, which would first miss the flag that is mistyped.
    for name in (word.split("=")[0] for word in others):
      if name.startswith("--") and name not in self._flags:
        # Of a key of the config its group is the flag.
        flag, _, key = name.partition(".")
        known = [other for other in self._flags if "help" not in other]
        hint = schema.closest(flag, known)
        if key:
          hint = hint.replace("'?", f".{key}'?")
        elif "--config" in known:
          hint += (
            f" A key of a config is changed by --config.{name[2:]}=VALUE; the "
            "config of a run is --config=WORKDIR/config.json."
          )
        raise errors.UserError(f"{self.prog} has no flag {name}. {hint}")
    return self.parse_args(others, argparse.Namespace(overrides=overrides))

  def error(self, message: str) -> NoReturn:
    """Raises UserError instead of printing the usage and leaving."""
    # The choices are in quotes, or from Python 3.12 on without.
    found = re.match(
      r"(.*invalid choice: '(.*)') \(choose from (.*)\)", message
    )
    hint = ""
    if found:
      message, word, rest = found.groups()
      hint = " " + schema.closest(word, re.findall(r"[^\s,']+", rest))
    text = message[0].upper() + message[1:]
    raise errors.UserError(
      f"{text}.{hint} `{self.prog} --help` shows the flags."
    )
