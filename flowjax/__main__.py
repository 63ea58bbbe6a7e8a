"""The door: `flowjax COMMAND ...`, also `python -m flowjax COMMAND ...`."""

import argparse
import importlib
import logging
import sys

from flowjax import errors, schema

COMMANDS = {
  "train": "train a network from a config, or continue a workdir",
  "sample": "draw a grid of samples from a workdir",
  "evaluate": "score the samples of a workdir against held-out data",
  "export": "write the weights of a workdir for PyTorch",
  "describe": "show parameters, FLOPs, sharding and memory of a config",
  "bench": "time the training step of a config on this machine",
}

EXIT_CODES = """exit codes:
  0 done    1 a defect of FlowJAX    2 a mistake in a flag or config
  3 data    4 no sound checkpoint    5 numbers that are not finite
  42 stopped by a signal and saved: run the same command again"""


def main(words: list[str] | None = None) -> int:
  """Runs one command and returns its exit code."""
  words = sys.argv[1:] if words is None else words
  logging.basicConfig(level=logging.INFO, format="%(message)s")
  for name in ("absl", "orbax", "jax", "grain"):
    logging.getLogger(name).setLevel(logging.WARNING)
  try:
    return _run(words)
  except (errors.UserError, errors.NumericError, errors.Preempted) as error:
    print(f"flowjax: {error}", file=sys.stderr)
    return error.exit_code


def _run(words: list[str]) -> int:
  if not words or words[0] in ("-h", "--help"):
    print(_overview())
    return 0
  name = words[0]
  if name not in COMMANDS:
    raise errors.UserError(
      f"There is no command {name!r}. {schema.closest(name, COMMANDS)}"
    )
  command = importlib.import_module(f"flowjax.commands.{name}")
  parser = argparse.ArgumentParser(
    prog=f"flowjax {name}",
    description=command.__doc__,
    epilog=EXIT_CODES,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  command.add_flags(parser)
  command.run(_parse(parser, words[1:]))
  return 0


def _parse(parser: argparse.ArgumentParser, words: list[str]):
  """Parses the flags; `--config.*` words become `overrides`."""
  known = [flag for a in parser._actions for flag in a.option_strings]
  takes_config = "--config" in known
  overrides: list[str] = []
  others: list[str] = []
  bare = [w for w in words if w.startswith("--config.") and "=" not in w]
  if bare:
    raise errors.UserError(f"{bare[0]} needs its value behind an =.")
  for word in words:
    is_override = takes_config and word.startswith("--config.")
    (overrides if is_override else others).append(word)
  for word in others:
    flag = word.split("=")[0]
    if flag.startswith("--") and flag not in known:
      raise errors.UserError(
        f"{parser.prog} has no flag {flag}. {schema.closest(flag, known)}"
      )
  return parser.parse_args(others, argparse.Namespace(overrides=overrides))


def _overview() -> str:
  width = max(map(len, COMMANDS))
  rows = [f"  {name:<{width}}  {text}" for name, text in COMMANDS.items()]
  return "\n".join(
    [
      "FlowJAX trains flow and diffusion transformers.",
      "",
      "usage: flowjax COMMAND [--flag=value ...]",
      "",
      *rows,
      "",
      "`flowjax COMMAND --help` says what a command does, with an example.",
      "",
      EXIT_CODES,
    ]
  )


def entry() -> None:
  """Runs the command of this process."""
  sys.exit(main())


if __name__ == "__main__":
  entry()
