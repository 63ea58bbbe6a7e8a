"""Reading checkpoints that are proved before they are used.

Orbax trusts directory names and array bytes. Here a step is believed when its
commit marker, its manifest, and the fingerprints of its loaded arrays agree;
otherwise it is unsound, is named with the reason, and the one before it is
tried. A disk that fails says nothing about a step: that is an error, and no
step is passed over for it. Nor is a folder new from which all steps were taken:
a file beside it says which was saved last. Nothing on disk is changed.
"""

import collections.abc
import contextlib
import dataclasses
import json
import logging
import os
import pathlib
import re
import zlib
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from flowjax import errors
from flowjax.train import disk, manifest, quiet

# The marker that Orbax writes last into a step.
COMMITTED = "commit_success.txt"


@dataclasses.dataclass(frozen=True)
class Restored:
  """A sound checkpoint, and why each newer one was passed over, by step."""

  step: int
  state: Any
  extra: Any
  passed_over: dict[int, str]


class Reader:
  """Reads the steps in a folder, which need not exist.

  `unsound` collects the steps that were passed over, with the reason.
  """

  def __init__(self, directory: pathlib.Path):
    self.directory = directory
    self._record = directory.with_name(f"{directory.name}.json")
    self.unsound: dict[int, str] = {}
    # The handler alone: a Checkpointer ends in a barrier, where the others
    # would wait for a process that could not read its part.
    self._orbax = ocp.CompositeCheckpointHandler()

  def close(self) -> None:
    """Lets go of all threads."""
    self._orbax.close()

  def steps(self) -> list[int]:
    """Returns the committed steps, sound or not, oldest first."""
    return [number for number in self._folders() if self._committed(number)]

  def restore(
    self, abstract: Any, step: int | None, *, whole: bool
  ) -> Restored | None:
    """Returns the newest sound step, or the given one, shaped as `abstract`.

    If `whole`, the checkpoint may hold nothing besides.
    """
    named = manifest.named_leaves(abstract)
    wanted = {path: _placed(leaf) for path, leaf in named.items()}

    def look(number: int) -> tuple[Any, Any]:
      leaves, extra = self._inspect(number)
      self._require_fit(number, leaves, wanted, whole)
      arrays = self._load(number, leaves, wanted)
      return jax.tree.unflatten(jax.tree.structure(abstract), arrays), extra

    try:
      with quiet.orbax():
        found = self._walk(step, look)
    finally:
      if self.unsound:
        quiet.let_go()
    if found is None:
      return None
    number, (state, extra), passed_over = found
    return Restored(number, state, extra, passed_over)

  def _walk(
    self, step: int | None, look: collections.abc.Callable[[int], Any]
  ) -> tuple[int, Any, dict[int, str]] | None:
    """Returns what `look` finds in the newest step it does not call unsound."""
    try:
      with _agreement(), _damage("the list of its steps"):
        numbers = self._folders()
    except (_Unsound, _Unreadable) as reason:
      raise self._not_now("What is", reason) from reason
    _require_same(numbers, self.directory)
    if step is not None and step not in numbers:
      raise errors.CheckpointError(
        f"There is no checkpoint of step {step} in {self.directory}. There "
        f"are: {', '.join(map(str, numbers)) or 'none'}."
      )
    passed_over: dict[int, str] = {}
    for number in reversed(numbers) if step is None else [step]:
      try:
        found = look(number)
      except _Unsound as reason:
        passed_over[number] = self.unsound[number] = str(reason)
        logging.warning("Checkpoint %d is passed over: %s.", number, reason)
      except _Unreadable as reason:
        raise self._not_now(f"Checkpoint {number}", reason) from reason
      else:
        if step is None:
          self._say_gone(numbers)
        return number, found, passed_over
    if not passed_over:
      self._require_new()
      return None
    rows = [f"\n  {number}: {text}" for number, text in passed_over.items()]
    raise errors.CheckpointError(
      f"No checkpoint in {self.directory} is sound:{''.join(rows)}\n"
      "Nothing was changed. Bring back a copy of one of them, or start over in "
      "another --workdir."
    )

  def record(self, step: int) -> None:
    """Writes beside the folder that a step was saved in it."""
    partial = self._record.with_name(f"{self._record.name}.partial")
    try:
      partial.write_text(json.dumps({"last_saved": step}) + "\n")
      os.replace(partial, self._record)
    finally:  # Of a full disk.
      partial.unlink(missing_ok=True)

  def last_saved(self) -> int | None:
    """Returns the step that was saved last, None if none was.

    It is -1 where that cannot be told.
    """
    try:
      last = json.loads(self._record.read_text())["last_saved"]
    except FileNotFoundError:
      return None
    except (OSError, ValueError, KeyError, TypeError):
      return -1  # Damaged: but only a save can have made it.
    return last if isinstance(last, int) else -1

  def _say_gone(self, numbers: list[int]) -> None:
    """Warns where the step that was saved last is not there any more."""
    last = self.last_saved()
    if last is not None and last > numbers[-1]:
      logging.warning(
        "Checkpoint %d, which was saved last, is no longer in %s.",
        last, self.directory,
      )  # fmt: skip

  def _require_new(self) -> None:
    """Refuses an empty folder in which a step was saved once."""
    last = self.last_saved()
    if last is None:
      return
    step = "unknown" if last < 0 else last
    raise errors.CheckpointError(
      f"{self.directory} holds no checkpoint, but one was saved in it, the "
      f"last of step {step}: so says {self._record}. Nothing was changed. "
      "Bring back a copy of one, or start over in another --workdir."
    )

  def _not_now(self, what: str, reason: Exception) -> Exception:
    return errors.CheckpointError(
      f"{what} in {self.directory} cannot be read now: {reason}. That says "
      "nothing about what was saved, and nothing was changed. See to the disk, "
      "its permissions and the limit of open files, and run the same command "
      "again."
    )

  def _inspect(self, number: int) -> tuple[dict[str, manifest.Leaf], Any]:
    """Returns the leaves a step's manifest lists, and its extra data."""
    with _agreement(self.directory / str(number)):
      with _damage(f"its {COMMITTED}"):
        if not self._committed(number):
          raise _Unsound(f"it was never committed: it has no {COMMITTED}")
      with _damage("its manifest"):
        items = self._read(
          number, manifest=ocp.args.JsonRestore(), extra=ocp.args.JsonRestore()
        )
      leaves, reason = manifest.read(number, items.manifest, items.extra)
      if reason is not None:
        raise _Unsound(reason)
    return leaves, items.extra

  def _require_fit(
    self,
    number: int,
    leaves: dict[str, manifest.Leaf],
    wanted: dict[str, jax.ShapeDtypeStruct],
    whole: bool,
  ) -> None:
    """Refuses a template that is not what the manifest says was saved."""
    saved = {path: str(leaf) for path, leaf in leaves.items()}
    asked = {path: str(manifest.leaf(item)) for path, item in wanted.items()}
    paths = sorted(saved.keys() | asked.keys())
    if not whole:
      tops = {path.partition("/")[0] for path in asked}
      paths = [path for path in paths if path.partition("/")[0] in tops]
    rows = [
      f"\n  {path}: {saved.get(path, 'nothing')} was saved, "
      f"{asked.get(path, 'nothing')} is wanted"
      for path in paths
      if saved.get(path) != asked.get(path)
    ]
    if rows:
      more = f"\n  and {len(rows) - 10} more" if len(rows) > 10 else ""
      raise errors.CheckpointError(
        f"Checkpoint {number} in {self.directory} does not fit this config in "
        f"{len(rows)} of its arrays:{''.join(rows[:10])}{more}\n"
        "Use the config it was made with, or another --workdir."
      )

  def _load(
    self,
    number: int,
    leaves: dict[str, manifest.Leaf],
    wanted: dict[str, jax.ShapeDtypeStruct],
  ) -> list[jax.Array]:
    """Returns the arrays of a step, each proved by its fingerprint."""
    item = manifest.nested(wanted)
    arguments = ocp.args.PyTreeRestore(
      item=item,
      restore_args=ocp.checkpoint_utils.construct_restore_args(item),
      partial_restore=True,
    )
    folder = self.directory / str(number)
    with _agreement(folder), _damage("its data", wanted):
      state = self._read(number, state=arguments).state
      found = manifest.named_leaves(state)
      # Where its own metadata are damaged, Orbax may hand the template back.
      bad = [p for p in wanted if not isinstance(found.get(p), jax.Array)]
      if bad:
        raise _Unsound(f"it has no {_some(bad)}")
    prints = manifest.fingerprints({path: found[path] for path in wanted})
    bad = [path for path in wanted if prints[path] != leaves[path].fingerprint]
    if bad:
      raise _Unsound(f"the bits of {_some(bad)} are not those that were saved")
    return [found[path] for path in wanted]

  def _read(self, number: int, **arguments: Any) -> Any:
    return self._orbax.restore(
      epath.Path(self.directory / str(number)),
      args=ocp.args.Composite(**arguments),
    )

  def _folders(self) -> list[int]:
    """Returns the numbers of all step folders, committed or not."""
    try:
      with os.scandir(self.directory) as entries:
        names = [entry.name for entry in entries if entry.is_dir()]
    except FileNotFoundError:
      return []
    return sorted(
      int(name) for name in names if name.isdecimal() and str(int(name)) == name
    )

  def _committed(self, number: int) -> bool:
    try:  # `is_file` would be False of a disk that fails, too.
      os.stat(self.directory / str(number) / COMMITTED)
    except (FileNotFoundError, NotADirectoryError):
      return False
    return True


class _Unsound(Exception):
  """Why a step is passed over."""


class _Unreadable(Exception):
  """Why nothing can be said about a step now."""


@contextlib.contextmanager
def _damage(what: str, paths: collections.abc.Iterable[str] = ()):
  """Turns whatever damaged files raise into a reason to pass a step over."""
  try:
    yield
  except (_Unsound, jax.errors.JaxRuntimeError, MemoryError):
    raise  # Too little memory is no damage.
  except Exception as error:
    # On disk an array's name has dots, and a file or a chunk behind it.
    names = set(re.findall(r"[\"']([^\"'/]+)/", str(error)))
    bad = [path for path in paths if path.replace("/", ".") in names]
    where = f" at {_some(bad)}" if bad else ""
    kind = _Unreadable if disk.cannot_read(error) else _Unsound
    raise kind(f"{what} cannot be read{where}: {brief(error)}") from error


@contextlib.contextmanager
def _agreement(folder: pathlib.Path | None = None):
  """Makes a step unsound, or unreadable, for all processes if it is for one.

  No step is unsound while a file in its `folder` cannot be read at all.
  """
  reason: Exception | None = None
  try:
    yield
  except (_Unsound, _Unreadable) as error:
    reason = error
  if isinstance(reason, _Unsound) and folder is not None:
    refusal = disk.unreadable(folder)
    reason = reason if refusal is None else _Unreadable(brief(refusal))
  if jax.process_count() > 1:
    mine = (type(None), _Unsound, _Unreadable).index(type(reason))
    verdicts = multihost_utils.process_allgather(np.array(mine))
    if verdicts.max() > mine:
      kind = (_Unsound, _Unreadable)[verdicts.max() - 1]
      reason = kind(f"process {verdicts.argmax()} cannot read it")
  if reason is not None:
    raise reason


def _require_same(numbers: list[int], directory: pathlib.Path) -> None:
  """Refuses to restore where processes see other steps in their folders.

  Each would take its own newest, and a state would be of two steps.
  """
  if jax.process_count() == 1:
    return
  newest, digest = max(numbers, default=0), zlib.crc32(repr(numbers).encode())
  seen = multihost_utils.process_allgather(
    np.array([len(numbers), newest, digest], np.uint32)
  )
  others = np.flatnonzero((seen != seen[0]).any(axis=1))
  if others.size:
    other = int(others[0])
    raise errors.CheckpointError(
      f"Process {other} sees {seen[other, 0]} checkpoints in {directory}, up "
      f"to step {seen[other, 1]}, and process 0 sees {seen[0, 0]}, up to step "
      f"{seen[0, 1]}. A workdir lies on a disk that all processes share. If it "
      "does, that disk lags: run the same command again."
    )


def _placed(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
  """Returns a template whose array lives somewhere: by default, device 0."""
  default = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  return jax.ShapeDtypeStruct(
    leaf.shape, leaf.dtype, sharding=leaf.sharding or default
  )


def _some(paths: list[str]) -> str:
  more = f" and {len(paths) - 3} more" if len(paths) > 3 else ""
  return ", ".join(paths[:3]) + more


def brief(error: BaseException) -> str:
  """Returns the first cause of an error, in one line of 200 characters."""
  while error.__cause__ is not None:
    error = error.__cause__
  text = " ".join(f"{type(error).__name__}: {error}".split())
  text = re.sub(r" \[\w+(\[\d+\])?=.*", "", text)  # What TensorStore appends.
  return text if len(text) <= 200 else f"{text[:40]} ... {text[-160:]}"
