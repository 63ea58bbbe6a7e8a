"""One writer per workdir: a lock with an owner, a heartbeat and an end.

Two trainers in one workdir leave committed checkpoints that nobody can read.
The first one writes `lock.json` and touches it every BEAT seconds. Whoever
comes second is refused, unless the owner is known to be dead:

  same machine, but the process is gone    taken over at once
  another machine or container             taken over when SILENCE seconds
                                           have passed without a heartbeat
"""

import json
import logging
import os
import pathlib
import platform
import threading
import time
import uuid
from typing import Any

import jax

from flowjax import errors

NAME = "lock.json"
BEAT = 10.0
SILENCE = 60.0


class WorkdirLock:
  """Holds a workdir for this process, from `with` to its end.

  Or another folder, which `flag` has named.

  In a run of several processes only the first one holds the lock. Raises
  UserError if another process has the workdir, or if it cannot be written.
  """

  def __init__(
    self,
    workdir: str | os.PathLike,
    *,
    flag: str = "--workdir",
    beat: float = BEAT,
    silence: float = SILENCE,
  ):
    self.path = pathlib.Path(workdir).absolute() / NAME
    self._kind = "workdir" if flag == "--workdir" else "folder"
    self._flag, self._beat, self._silence = flag, beat, silence
    self._text = json.dumps(
      {
        **_identity(),
        "since": time.strftime("%F %T"),
        "token": uuid.uuid4().hex,
      }
    )
    self._stop = threading.Event()
    self._thread = threading.Thread(
      target=self._keep_beating, name="workdir_heartbeat", daemon=True
    )

  def __enter__(self) -> "WorkdirLock":
    if jax.process_index() == 0:
      self._require_writable()
      self._acquire()
      self._thread.start()
    return self

  def __exit__(self, *exception: object) -> None:
    self._stop.set()
    if self._thread.is_alive():
      self._thread.join()
    if _read(self.path) == self._text:
      self.path.unlink()

  def _require_writable(self) -> None:
    workdir = self.path.parent
    if workdir.is_file():
      raise errors.UserError(
        f"{self._flag}={workdir} is a file; name a folder."
      )
    try:
      workdir.mkdir(parents=True, exist_ok=True)
      self._now()
    except OSError as error:
      raise errors.UserError(
        f"The {self._kind} {workdir} cannot be written: {error.strerror}. "
        f"Choose another {self._flag}, make room, or correct its permissions."
      ) from error

  def _acquire(self) -> None:
    first_beat = None
    while not self._create() and (seen := _read(self.path)) != self._text:
      beat = _time_of(self.path)
      if seen is None or beat is None:
        continue  # Released between two looks.
      age = self._now() - beat
      alive = _is_alive(_parse(seen))
      if alive is False or (alive is None and age > self._silence):
        self._take_over(seen, age)
      elif alive or first_beat not in (None, beat):
        raise errors.UserError(self._refusal(seen, age))
      else:
        self._announce_watch(seen, age, first_beat)
        first_beat = beat
        time.sleep(min(self._beat, 1.0) / 4)

  def _create(self) -> bool:
    """Writes the lock file if there is none, in one indivisible step."""
    try:
      with open(self.path, "x") as file:
        file.write(self._text)
    except FileExistsError:
      return False
    return True

  def _take_over(self, seen: str, age: float) -> None:
    """Replaces a dead owner's lock, unless somebody else is just doing so."""
    claim = self.path.with_name(f"{NAME}.claim")
    try:
      open(claim, "x").close()
    except FileExistsError:
      made = _time_of(claim)
      if made is not None and self._now() - made > self._silence:
        claim.unlink(missing_ok=True)  # Whoever made it died over it.
      time.sleep(min(self._beat, 1.0) / 4)
      return
    try:
      if _read(self.path) == seen:
        partial = self.path.with_name(f"{NAME}.{os.getpid()}.partial")
        partial.write_text(self._text)
        os.replace(partial, self.path)
        logging.warning(
          "Took over %s from %s, which is gone; its last heartbeat was %.0f s "
          "ago.", self.path.parent, _name(_parse(seen)), age,
        )  # fmt: skip
    finally:
      claim.unlink(missing_ok=True)

  def _keep_beating(self) -> None:
    while not self._stop.wait(self._beat):
      try:
        seen = _read(self.path)
        if seen == self._text:
          os.utime(self.path)
        elif seen is not None:
          logging.error(
            "%s was taken over by %s: this process saves nothing more there.",
            self.path.parent, _name(_parse(seen)),
          )  # fmt: skip
          return
        else:
          self._create()  # Somebody removed the file, but nobody came.
      except OSError as error:
        logging.warning("No heartbeat in %s: %s", self.path, error)

  def _now(self) -> float:
    """Returns the file system's idea of now: hosts' clocks may differ."""
    probe = self.path.with_name(f"{NAME}.{uuid.uuid4().hex}.probe")
    probe.write_text(self._text)
    now = probe.stat().st_mtime
    probe.unlink()
    return now

  def _announce_watch(self, seen: str, age: float, first: float | None) -> None:
    if first is None:
      logging.warning(
        "%s is locked by %s, last heartbeat %.0f s ago. Watching whether it "
        "still beats, for at most %.0f s.",
        self.path.parent, _name(_parse(seen)), age, self._silence - age,
      )  # fmt: skip

  def _refusal(self, seen: str, age: float) -> str:
    return (
      f"The {self._kind} {self.path.parent} is in use by "
      f"{_name(_parse(seen))}, last heartbeat {age:.0f} s ago. Stop that "
      f"process, or choose another {self._flag}."
    )


def is_ours(folder: pathlib.Path) -> bool:
  """Says whether this process holds the lock of a folder, or of that above."""
  return _owner_of(folder) == _identity()


def require_no_other(folder: pathlib.Path) -> None:
  """Raises UserError if the lock of a folder now names another process."""
  owner = _owner_of(folder)
  if owner not in (None, _identity()):
    raise errors.UserError(
      f"{folder} was taken over by {_name(owner)} while this process was "
      "silent. Only one may write: this one stops without saving."
    )


def _owner_of(folder: pathlib.Path) -> dict[str, Any] | None:
  """Returns the identity in the lock of a folder or of the one above."""
  for path in (folder / NAME, folder.parent / NAME):
    if (text := _read(path)) is not None:
      owner = _parse(text)
      return {key: owner.get(key) for key in _identity()}
  return None


def _identity() -> dict[str, Any]:
  """Returns what tells this process from every other, dead ones included."""
  pid = os.getpid()
  return {"machine": _machine(), "host": platform.node(), "pid": pid,
          "start": _start(pid)}  # fmt: skip


def _machine() -> str:
  """Returns a name for what process ids are counted in: a boot, a container."""
  try:
    boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {os.readlink('/proc/self/ns/pid')}"
  except OSError:
    return platform.node()


def _start(pid: int) -> str | None:
  """Returns when a process began, or None if there is no such process.

  Clock ticks since boot, on Linux: a pid that was given out again differs.
  """
  try:
    os.kill(pid, 0)
  except ProcessLookupError:
    return None
  except PermissionError:
    pass  # It lives, and is another user's.
  try:
    stat = pathlib.Path(f"/proc/{pid}/stat").read_text()
  except OSError:
    return "unknown"
  state, *rest = stat.rpartition(")")[2].split()
  return None if state in "ZX" else rest[18]


def _is_alive(owner: dict[str, Any]) -> bool | None:
  """Says whether an owner lives; None if it cannot be seen from here."""
  if owner.get("machine") != _machine():
    return None
  return _start(owner["pid"]) == owner["start"]


def _read(path: pathlib.Path) -> str | None:
  try:
    return path.read_text(errors="replace")
  except FileNotFoundError:
    return None


def _time_of(path: pathlib.Path) -> float | None:
  try:
    return path.stat().st_mtime
  except FileNotFoundError:
    return None


def _parse(text: str) -> dict[str, Any]:
  """Returns the owner a lock names; nothing if it is empty or damaged."""
  try:
    owner = json.loads(text)
  except json.JSONDecodeError:
    return {}
  return owner if isinstance(owner, dict) else {}


def _name(owner: dict[str, Any]) -> str:
  if not owner:
    return "an unknown process (its lock.json cannot be read)"
  since = f" since {owner['since']}" if "since" in owner else ""
  return f"process {owner.get('pid')} on host {owner.get('host')}{since}"
