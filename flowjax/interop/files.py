"""Folders that are either complete or untouched."""

import collections.abc
import contextlib
import errno
import json
import os
import pathlib
import shutil

from flowjax import errors

# Its presence marks a folder in which an export of ours was cut short.
_STAGING = ".flowjax-export"
# The entry of a marker with the names of the files that belong to it.
LISTED = "files"


@contextlib.contextmanager
def export_folder(
  directory: pathlib.Path, *, format: str, marker: str
) -> collections.abc.Iterator[pathlib.Path]:
  """Yields a folder whose files move into `directory` when all are written.

  An earlier export stays as it was if anything goes wrong before that. The
  file `marker`, JSON whose "format" is `format`, goes first and comes last:
  a folder that has it is complete, and only such a folder is written over.
  """
  _refuse_stranger(directory, format=format, marker=marker)
  staging = directory / _STAGING
  is_new = not directory.exists()
  try:
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    yield staging
    for path in filter(pathlib.Path.is_file, staging.rglob("*")):
      with open(path, "rb+") as file:
        os.fsync(file.fileno())
  except BaseException as error:
    shutil.rmtree(directory if is_new else staging, ignore_errors=True)
    if isinstance(error, OSError):
      full = error.errno == errno.ENOSPC
      remedy = "Make room, or choose" if full else "Choose"
      raise errors.UserError(
        f"The export {directory} cannot be written: {error}. {remedy} "
        "another folder."
      ) from error
    raise
  _publish(staging, directory, marker)


def _publish(staging: pathlib.Path, directory: pathlib.Path, marker: str):
  """Moves the files, without a moment in which the marker tells a lie."""
  earlier = _listed(directory / marker)
  (directory / marker).unlink(missing_ok=True)
  for name in earlier:
    _remove(directory / name)
  names = sorted(path.name for path in staging.iterdir())
  for name in sorted(names, key=lambda name: name == marker):
    if (directory / name).is_dir():
      _remove(directory / name)
    os.replace(staging / name, directory / name)
  staging.rmdir()


def _remove(path: pathlib.Path) -> None:
  if path.is_dir() and not path.is_symlink():
    shutil.rmtree(path)
  else:
    path.unlink(missing_ok=True)


def _refuse_stranger(directory: pathlib.Path, *, format: str, marker: str):
  if not directory.exists():
    return
  if not directory.is_dir():
    raise errors.UserError(
      f"{directory} is a file. Choose a folder for the export."
    )
  names = {path.name for path in directory.iterdir()}
  if not names or _STAGING in names:
    return
  if format_of(directory / marker) != format:
    raise errors.UserError(
      f"{directory} holds files that are no earlier export "
      f"({', '.join(sorted(names)[:3])}). Choose another folder or empty it."
    )


def _listed(marker: pathlib.Path) -> list[str]:
  """Returns what an earlier export wrote: fewer shards may follow more."""
  if format_of(marker) is None:
    return []
  names = json.loads(marker.read_text()).get(LISTED, [])
  return [name for name in names if pathlib.PurePath(name).name == name]


def format_of(path: pathlib.Path) -> str | None:
  """Returns the "format" of a JSON file, None if there is no such thing."""
  try:
    content = json.loads(path.read_text())
  except (OSError, ValueError):
    return None
  return content.get("format") if isinstance(content, dict) else None
