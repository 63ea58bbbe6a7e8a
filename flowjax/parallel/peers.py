"""The other processes of a job: what they say, and whether they still live.

All of it goes through the key-value store of jax's coordination service, which
lives in process 0:

  news/0, news/1, ...   what any process tells all, in one order for all
  beat/P                a number that process P raises while it lives
  step/P                the step that P is in, when all are to stop

A thread of each process waits for news, and says that it lives. When a process
has failed, or is not heard of for `timeout` seconds, the others end: in a
collective that waits for it they would be until the end of time.
"""

import collections.abc
import contextlib
import json
import logging
import os
import sys
import threading
import time
from typing import Any

from flowjax import errors

# Of the timeout: how often a process says that it lives.
BEATS = 6
# How long a process may tidy up after another has ended, in seconds.
GRACE = 5.0

News = dict[str, Any]


class Peers:
  """The processes of a job, seen from one of them."""

  def __init__(
    self,
    client: Any,
    index: int,
    count: int,
    *,
    timeout: float,
    host: str,
    leave: collections.abc.Callable[[int], None] | None = None,
  ):
    self.index, self.count, self._timeout = index, count, timeout
    self._client, self._leave = client, leave or _exit
    self._period = timeout / BEATS
    self._beats = 0
    self._awaited = 0  # The number of the news that is waited for.
    self._heard: dict[int, tuple[str, float]] = {}
    self._state = threading.Condition()
    self._step: int | None = None  # The one that the main thread is in.
    self._stop: News | None = None
    self._last: int | None = None  # The step after which all stop.
    self._end: News | None = None
    self._closed = threading.Event()
    self._client.key_value_set(f"flowjax/host/{index}", host)
    self._beat()
    self._thread = threading.Thread(
      target=self._listen, name="peers", daemon=True
    )
    self._thread.start()

  def tell(self, **news: Any) -> None:
    """Tells all processes, this one included, in the order of all news."""
    text, number = json.dumps({"process": self.index, **news}), 0
    while True:
      try:
        self._client.key_value_set(f"flowjax/news/{number}", text)
        return
      except RuntimeError as error:
        if "ALREADY_EXISTS" not in str(error):
          raise
      number += 1

  def ask_to_stop(self, why: str) -> None:
    """Asks all processes to stop after one and the same step."""
    self.tell(kind="stop", why=why)

  def begin(self, step: int) -> None:
    """Takes note that the step after `step` begins now."""
    with self._state:
      self._step = step + 1
      self._state.notify_all()

  def stop_after(self, step: int) -> str | None:
    """Returns why all stop after this step, or None: then the next begins.

    Every process ends the step that it is in when it hears that one is to stop;
    the last of these steps is where all stop.
    """
    with self._state:
      if self._stop is not None:
        self._state.wait_for(lambda: self._last is not None or self._end)
      if self._stop is not None and self._last == step:
        return self._stop["why"]
      self._step = step + 1
      return None

  def hosts(self) -> list[str]:
    """Returns the host of each process."""
    return [
      self._client.blocking_key_value_get(f"flowjax/host/{p}", 10_000)
      for p in range(self.count)
    ]

  def wait_for_end(self, seconds: float) -> News | None:
    """Waits whether another process ends; returns what is said of it."""
    with self._state:
      self._state.wait_for(lambda: self._end is not None, seconds)
      return self._end

  @property
  def patience(self) -> float:
    """Seconds within which it is known that a process is lost."""
    return self._timeout + 2 * self._period

  def meet(self, name: str, seconds: float) -> bool:
    """Waits for all processes to come here; tells whether they did."""
    try:
      self._client.wait_at_barrier(f"flowjax/{name}", int(1000 * seconds))
    except RuntimeError:
      return False
    return True

  def close(self) -> None:
    """Ends the thread: from here on the others may end as they like."""
    self._closed.set()
    text = json.dumps({"process": self.index, "kind": "done"})
    with contextlib.suppress(RuntimeError):  # Other news ends the wait as well.
      self._client.key_value_set(f"flowjax/news/{self._awaited}", text)
    self._thread.join(2 * self._period)

  def _listen(self) -> None:
    while not self._closed.is_set():
      try:
        text = self._client.blocking_key_value_get(
          f"flowjax/news/{self._awaited}", int(1000 * self._period)
        )
      except RuntimeError as error:
        if self._closed.is_set():
          return
        if "DEADLINE_EXCEEDED" not in str(error):
          self.lost([0], "where all processes meet")
          return
        self._beat()
      else:
        self._awaited += 1
        self._heed(json.loads(text))
      with contextlib.suppress(RuntimeError):  # Process 0 may not have begun.
        self._look_for_silence()

  def _beat(self) -> None:
    self._beats += 1
    try:
      self._client.key_value_set(
        f"flowjax/beat/{self.index}", str(self._beats), allow_overwrite=True
      )
    except RuntimeError:
      pass  # The next wait for news says so.

  def _look_for_silence(self) -> None:
    """Tells all if one is silent: process 0 hears all others, and they it."""
    now, seen = time.monotonic(), "flowjax/beat/"
    if self.index == 0:
      found = dict(self._client.key_value_dir_get(seen))
    else:
      found = {"0": self._client.key_value_try_get(f"{seen}0")}
    beats = {int(key.rpartition("/")[2]): beat for key, beat in found.items()}
    for process, beat in beats.items():
      if self._heard.get(process, ("", 0.0))[0] != beat:
        self._heard[process] = beat, now
    silent = [
      process
      for process, (_, heard) in sorted(self._heard.items())
      if now - heard > self._timeout
    ]
    if silent and self._end is None:
      self.tell(kind="lost", lost=silent)

  def _heed(self, news: News) -> None:
    if news["kind"] == "stop":
      with self._state:
        if self._stop is not None:
          return
        self._stop = news
      threading.Thread(target=self._agree_on_last, daemon=True).start()
    elif news["kind"] == "lost":
      self.lost(news["lost"], f"not heard of for {self._timeout:.0f} s")
    elif news["kind"] == "failed" and news["process"] != self.index:
      text = f"Process {news['process']} has ended: {news['text']}"
      self._end_too(news, text, news["code"])

  def _agree_on_last(self) -> None:
    with self._state:
      self._state.wait_for(lambda: self._step is not None)
      # The main thread goes no further until the last step is known.
      mine = self._step
    self._client.key_value_set(f"flowjax/step/{self.index}", str(mine))
    steps = [
      int(self._client.blocking_key_value_get(f"flowjax/step/{p}", 10**9))
      for p in range(self.count)
    ]
    with self._state:
      self._last = max(steps)
      self._state.notify_all()

  def lost(self, processes: list[int], why: str) -> None:
    """Ends this process, as others are no more."""
    names = ", ".join(f"{p}{self._host(p)}" for p in processes)
    text = lost_text(names, why)
    print(f"flowjax: {text}", file=sys.stderr, flush=True)
    news = {"kind": "lost", "lost": processes}
    self._end_too(news, text, errors.Lost.exit_code)

  def _host(self, process: int) -> str:
    if process == 0:
      return ""
    try:
      key = f"flowjax/host/{process}"
      return f" (host {self._client.key_value_try_get(key)})"
    except RuntimeError:
      return ""

  def _end_too(self, news: News, text: str, code: int) -> None:
    with self._state:
      if self._end is not None:
        return
      self._end = {**news, "text": text, "code": code}
      self._state.notify_all()
    time.sleep(GRACE)
    # The main thread still waits for others, or it would have ended us.
    if news["kind"] != "lost":
      print(f"flowjax: {text}", file=sys.stderr, flush=True)
    self._leave(code)


def _exit(code: int) -> None:
  logging.shutdown()
  os._exit(code)


def lost_text(names: str, why: str) -> str:
  """Says which processes are lost, and what becomes of the others."""
  return (
    f"Lost process {names}, {why}: it was killed, its machine is gone, or it "
    "hangs. All processes end. Start all of them again: the same command goes "
    "on from the newest checkpoint."
  )
