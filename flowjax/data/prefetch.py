"""A thread that reads ahead; it hides no error and does not outlive its use."""

import queue
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

T = TypeVar("T")

_POLL_SECONDS = 0.1
_JOIN_SECONDS = 30.0  # A disk that hangs must not hold up the end of a run.


class Prefetch(Generic[T]):
  """An iterator over put(item), at most `size` of them ahead.

  An error of the iterator or of `put` is raised where its item would have
  come, and again at every later call. `close`, the end of a `with` block and
  the loss of the last reference end the thread, which closes the iterator.
  """

  def __init__(
    self, iterator: Iterator[Any], put: Callable[[Any], T], size: int
  ):
    self._ready: queue.Queue = queue.Queue(size)
    self._error: BaseException | None = None
    stop = threading.Event()
    # The thread does not know `self`, or nobody could ever lose it.
    thread = threading.Thread(
      target=_fill,
      args=(iterator, put, self._ready, stop),
      name="flowjax-prefetch",
      daemon=True,
    )
    self._end = weakref.finalize(self, _end, self._ready, stop, thread)
    thread.start()

  def __iter__(self) -> "Prefetch[T]":
    return self

  def __next__(self) -> T:
    if self._error is None:
      item, self._error = self._ready.get()
    if self._error is not None:
      raise self._error
    return item

  def __enter__(self) -> "Prefetch[T]":
    return self

  def __exit__(self, *unused: Any) -> None:
    self.close()

  def close(self) -> None:
    self._error = self._error or StopIteration()
    self._end()


def _fill(
  iterator: Iterator[Any],
  put: Callable[[Any], Any],
  ready: queue.Queue,
  stop: threading.Event,
) -> None:
  try:
    for item in iterator:
      if not _offer((put(item), None), ready, stop):
        return
    _offer((None, StopIteration()), ready, stop)
  except BaseException as error:
    _offer((None, error), ready, stop)
  finally:
    # Only this thread may: a generator cannot be closed while it runs.
    if hasattr(iterator, "close"):
      iterator.close()


def _offer(entry: tuple, ready: queue.Queue, stop: threading.Event) -> bool:
  while not stop.is_set():
    try:
      ready.put(entry, timeout=_POLL_SECONDS)
      return True
    except queue.Full:
      continue
  return False


def _end(
  ready: queue.Queue, stop: threading.Event, thread: threading.Thread
) -> None:
  stop.set()
  thread.join(_JOIN_SECONDS)
  while not ready.empty():
    ready.get_nowait()  # Frees what lies on the device.
