"""What one sees of a run: a bar on a terminal, plain lines elsewhere."""

import collections
import collections.abc
import contextlib
import logging
import os
import sys
import time
from typing import Any, Protocol, TextIO

import jax

LINE_SECONDS = 10.0
WINDOW_SECONDS = 10.0
BAR_FROM_COLUMNS = 100
WAIT_SHOWN_FROM = 0.05


class Display(Protocol):
  """Shows how far a task is."""

  def show(self, step: int, facts: str, *, always: bool = False) -> None:
    """Shows a step; where lines are printed, only now and then."""

  def close(self) -> None:
    """Lets go of the terminal."""


class Progress:
  """Measures a run by the steps that are done, and shows it.

  The rates are those of the last seconds. They begin after the first step, in
  which the program is compiled, and leave out what `paused` encloses; the
  estimate of the end does not leave that out. `peak_flops` is of one device.
  """

  def __init__(
    self,
    total_steps: int,
    images_per_step: int,
    flops_per_step: float,
    peak_flops: float | None = None,
    *,
    device_count: int = 1,
    start_step: int = 0,
    stream: TextIO | None = None,
    clock: collections.abc.Callable[[], float] = time.monotonic,
  ):
    self._total, self._last = total_steps, start_step
    self._images, self._flops = images_per_step, flops_per_step
    self._peak = peak_flops and peak_flops * device_count
    self._clock, self._stream = clock, stream
    self._pauses = self._waited = 0.0
    self._first: tuple[int, float] | None = None
    # The steps of the last seconds: number, seconds at work, of these waiting.
    self._marks: collections.deque[tuple[int, float, float]]
    self._marks = collections.deque()
    self._display: Display = _Silent()

  def __enter__(self):
    self._started = self._clock()
    self._display = display("step", self._total, self._stream, self._clock)
    self._display.show(self._last, "compiling", always=True)
    return self

  def __exit__(self, *_):
    self._display.close()

  def say(self, what: str) -> None:
    """Shows what is being done before the next step."""
    self._display.show(self._last, what, always=True)

  def update(self, step: int, loss: float) -> None:
    """Takes note that `step` is done, with its loss."""
    now = self._clock()
    first = self._first is None
    if first:
      self._first = (step, now)
    self._last = step
    self._marks.append((step, now - self._pauses, self._waited))
    while len(self._marks) > 2 and self._span() > WINDOW_SECONDS:
      self._marks.popleft()
    facts = self._facts(loss)
    if first:
      facts += f"  (first step {duration(now - self._started)})"
    self._display.show(step, facts, always=first or step == self._total)

  @contextlib.contextmanager
  def paused(self):
    """Leaves what is done meanwhile out of the rates."""
    start = self._clock()
    try:
      yield
    finally:
      self._pauses += self._clock() - start

  @contextlib.contextmanager
  def waiting(self):
    """Counts what is done meanwhile as time in which there was no batch."""
    start = self._clock()
    try:
      yield
    finally:
      self._waited += self._clock() - start

  def rates(self) -> dict[str, float]:
    """Returns what is done per second; empty before two steps are done.

    `data_wait_seconds` are those per step in which the host waited for a batch.
    The device may have been at work all the same.
    """
    if len(self._marks) < 2:
      return {}
    steps = self._marks[-1][0] - self._marks[0][0]
    rate = steps / max(self._span(), 1e-9)
    rates = {
      "steps_per_second": rate,
      "images_per_second": rate * self._images,
      "tflops_per_second": rate * self._flops / 1e12,
      "data_wait_seconds": (self._marks[-1][2] - self._marks[0][2]) / steps,
    }
    if self._peak:
      rates["mfu"] = rate * self._flops / self._peak
    return rates

  def seconds_left(self) -> float | None:
    """Estimates the time to the end, pauses included."""
    if self._first is None or self._last == self._first[0]:
      return None
    step, start = self._first
    each = (self._clock() - start) / (self._last - step)
    return each * (self._total - self._last)

  def _span(self) -> float:
    return self._marks[-1][1] - self._marks[0][1]

  def _waiting_share(self) -> float:
    waited = self._marks[-1][2] - self._marks[0][2]
    return waited / max(self._span(), 1e-9)

  def _facts(self, loss: float) -> str:
    left, rates = self.seconds_left(), self.rates()
    # The end of the run comes first: a narrow terminal cuts the last.
    facts = [] if left is None else [f"ETA {duration(left)}"]
    facts.append(f"loss {loss:.4f}")
    if rates:
      facts.append(f"{_short(rates['images_per_second'])} images/s")
      facts.append(f"{_short(rates['tflops_per_second'])} TFLOP/s")
    if "mfu" in rates:
      facts.append(f"MFU {100 * rates['mfu']:.1f}%")
    if rates and (share := self._waiting_share()) >= WAIT_SHOWN_FROM:
      facts.append(f"waiting for data {100 * share:.0f}%")
    return "  ".join(facts)


@contextlib.contextmanager
def counter(
  name: str,
  total: int,
  *,
  stream: TextIO | None = None,
  clock: collections.abc.Callable[[], float] = time.monotonic,
):
  """Yields `done(count)`, which shows how many of `total` are made."""
  shown = display(name, total, stream, clock)
  start = clock()

  def done(count: int) -> None:
    passed = clock() - start
    left = passed / max(count, 1) * (total - count)
    facts = f"ETA {duration(left)}" if count < total else duration(passed)
    shown.show(count, facts, always=count == total)

  with contextlib.closing(shown):
    yield done


def duration(seconds: float) -> str:
  """Writes a time as 42s, 3m05s or 2h07m."""
  if seconds < 9.95:
    return f"{seconds:.1f}s"
  whole = round(seconds)
  if whole < 60:
    return f"{whole}s"
  if whole < 3600:
    return f"{whole // 60}m{whole % 60:02d}s"
  return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def display(
  name: str,
  total: int,
  stream: TextIO | None = None,
  clock: collections.abc.Callable[[], float] = time.monotonic,
) -> Display:
  """Returns a bar if `stream`, by default stderr, is a terminal, else lines.

  Only process 0 shows anything.
  """
  stream = stream or sys.stderr
  if jax.process_index() != 0:
    return _Silent()
  if stream.isatty() and os.environ.get("TERM") != "dumb":
    return _Bar(name, total, stream)
  return _Lines(name, total, stream, clock)


class _Silent:
  """Shows nothing."""

  def show(self, step: int, facts: str, *, always: bool = False) -> None:
    pass

  def close(self) -> None:
    pass


class _Lines:
  """One line every few seconds."""

  def __init__(self, name: str, total: int, stream: TextIO, clock):
    self._name, self._total, self._stream = name, total, stream
    self._clock, self._next = clock, clock() + LINE_SECONDS

  def show(self, step: int, facts: str, *, always: bool = False) -> None:
    if not always and self._clock() < self._next:
      return
    self._next = self._clock() + LINE_SECONDS
    line = f"{self._name} {step}/{self._total}  {facts}"
    print(line, file=self._stream, flush=True)

  def close(self) -> None:
    pass


class _Bar:
  """A bar at the foot of a terminal, over which other output scrolls."""

  def __init__(self, name: str, total: int, stream: TextIO):
    from rich import console, progress, table

    self._stream = stream
    terminal = console.Console(file=stream)
    whole = table.Column(no_wrap=True, min_width=len(f"{total}/{total}"))
    cut = table.Column(no_wrap=True, overflow="ellipsis")
    columns: list[Any] = [
      progress.TextColumn("{task.description}"),
      progress.MofNCompleteColumn(table_column=whole),
      progress.TextColumn("{task.fields[facts]}", table_column=cut),
    ]
    if terminal.width >= BAR_FROM_COLUMNS:
      columns.insert(2, progress.BarColumn(bar_width=20))
    self._bar = progress.Progress(
      *columns, console=terminal, refresh_per_second=4
    )
    self._task = self._bar.add_task(name, total=total, facts="")
    self._bar.start()
    # rich has put a proxy in the place of stderr, which writes above the bar.
    # Loggers still hold the stream itself, and would write across it.
    self._handlers = [
      handler
      for handler in logging.root.handlers
      if isinstance(handler, logging.StreamHandler) and handler.stream is stream
    ]
    for handler in self._handlers:
      handler.setStream(sys.stderr)

  def show(self, step: int, facts: str, *, always: bool = False) -> None:
    self._bar.update(self._task, completed=step, facts=facts, refresh=always)

  def close(self) -> None:
    for handler in self._handlers:
      handler.setStream(self._stream)
    self._bar.stop()


def _short(value: float) -> str:
  """Writes a number with three digits, and commas from a thousand on."""
  return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
