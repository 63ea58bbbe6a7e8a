"""The door: `flowjax COMMAND ...`, also `python -m flowjax COMMAND ...`."""

import importlib
import sys

import flowjax
from flowjax import commands, errors, schema
from flowjax.commands import flags, output, quiet


def main(words: list[str] | None = None) -> int:
  """Runs one command and returns its exit code."""
  words = sys.argv[1:] if words is None else words
  quiet.libraries()
  quiet.without_tpu()
  try:
    return output.written(_run(words))
  except errors.KNOWN as error:
    print(f"flowjax: {error}", file=sys.stderr)
    return error.exit_code
  except OSError as error:
    return output.failed(error)


def _run(words: list[str]) -> int:
  if not words or words[0] in ("-h", "--help"):
    print(flags.overview(commands.COMMANDS))
    return 0
  if words[0] == "--version":
    print(f"flowjax {flowjax.__version__}")
    return 0
  name = words[0]
  if name not in commands.COMMANDS:
    raise errors.UserError(
      f"There is no command {name!r}. {schema.closest(name, commands.COMMANDS)}"
    )
  command = importlib.import_module(f"flowjax.commands.{name}")
  parser = flags.Parser(name, description=command.__doc__)
  command.add_flags(parser)
  args = parser.read(words[1:])
  if name in commands.ALONE:
    command.run(args)
    return 0
  # Not before: it imports jax, and help comes at once.
  from flowjax.parallel import distributed

  with distributed.job(vars(args)):
    command.run(args)
  return 0


def entry() -> None:
  """Runs the command of this process."""
  sys.exit(main())


if __name__ == "__main__":
  entry()
