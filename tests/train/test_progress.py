"""Rates and the estimate of the end, and where they are shown."""

import io
import logging

import jax
import pytest

from flowjax.train import progress


class Clock:
  def __init__(self):
    self.now = 1000.0

  def __call__(self):
    return self.now


class Terminal(io.StringIO):
  def isatty(self):
    return True


def _bar(clock, stream, **options):
  options = {"images_per_step": 8, "flops_per_step": 2e12} | options
  return progress.Progress(100, clock=clock, stream=stream, **options)


def test_rates_leave_out_compilation_and_pauses():
  clock, stream = Clock(), io.StringIO()
  with _bar(clock, stream, peak_flops=10e12, device_count=2) as bar:
    clock.now += 60.0  # The program is compiled.
    bar.update(1, 1.0)
    assert bar.rates() == {} and bar.seconds_left() is None
    clock.now += 0.5
    bar.update(2, 1.0)
    with bar.paused():
      clock.now += 3.5
    clock.now += 0.5
    bar.update(3, 1.0)
    assert bar.rates() == pytest.approx(
      {
        "steps_per_second": 2.0,
        "images_per_second": 16.0,
        "tflops_per_second": 4.0,
        "data_wait_seconds": 0.0,
        "mfu": 0.2,  # 4 of 2 x 10 TFLOP/s.
      }
    )
    # The end is as far as two steps in 4.5 s say, pauses and all.
    assert bar.seconds_left() == pytest.approx(97 * 4.5 / 2)


def test_waiting_for_data_is_told_by_the_step_and_by_its_share():
  clock, stream = Clock(), io.StringIO()
  with _bar(clock, stream) as bar:
    bar.update(1, 1.0)
    for step in range(2, 101):
      with bar.waiting():
        clock.now += 0.3
      clock.now += 0.1
      bar.update(step, 1.0)
      assert bar.rates()["data_wait_seconds"] == pytest.approx(0.3)
    assert bar.rates()["images_per_second"] == pytest.approx(8 / 0.4)
  assert "waiting for data 75%" in stream.getvalue()


def test_nothing_is_said_of_data_that_is_there_in_time():
  clock, stream = Clock(), io.StringIO()
  with _bar(clock, stream) as bar:
    for step in range(1, 101):
      with bar.waiting():
        clock.now += 0.001
      clock.now += 0.5
      bar.update(step, 1.0)
  assert "waiting" not in stream.getvalue()


def test_rates_are_those_of_the_last_seconds():
  clock = Clock()
  with _bar(clock, io.StringIO()) as bar:
    for step in range(1, 50):
      clock.now += 1.0
      bar.update(step, 1.0)
    for step in range(50, 100):
      clock.now += 0.25
      bar.update(step, 1.0)
    assert bar.rates()["steps_per_second"] == pytest.approx(4.0)
    clock.now += 100.0  # One step that is longer than the window.
    bar.update(100, 1.0)
    assert bar.rates()["steps_per_second"] == pytest.approx(0.01)


def test_no_mfu_without_a_peak():
  clock, stream = Clock(), io.StringIO()
  with _bar(clock, stream) as bar:
    for step in (1, 100):
      clock.now += 1.0
      bar.update(step, 1.0)
    assert "mfu" not in bar.rates()
  assert "MFU" not in stream.getvalue()


def test_a_resumed_run_counts_from_where_it_is():
  clock, stream = Clock(), io.StringIO()
  with _bar(clock, stream, start_step=90) as bar:
    for step in (91, 92):
      clock.now += 2.0
      bar.update(step, 1.0)
    assert bar.rates()["steps_per_second"] == pytest.approx(0.5)
    assert bar.seconds_left() == pytest.approx(16.0)
  assert stream.getvalue().startswith("step 90/100  compiling\n")


def test_lines_come_every_ten_seconds_and_at_both_ends():
  clock, stream = Clock(), io.StringIO()
  with _bar(clock, stream, peak_flops=8e12) as bar:
    for step in range(1, 101):
      clock.now += 0.5
      bar.update(step, 1.0 / step)
  lines = stream.getvalue().splitlines()
  assert lines[0] == "step 0/100  compiling"
  assert lines[1] == "step 1/100  loss 1.0000  (first step 0.5s)"
  assert [line.split()[1] for line in lines[2:]] == [
    "21/100",
    "41/100",
    "61/100",
    "81/100",
    "100/100",
  ]
  assert lines[2] == (
    "step 21/100  ETA 40s  loss 0.0476  16 images/s  4 TFLOP/s  MFU 50.0%"
  )


def test_a_terminal_gets_a_bar_and_logs_stay_above_it(monkeypatch):
  monkeypatch.setenv("TERM", "xterm")
  monkeypatch.setenv("COLUMNS", "120")
  clock, terminal = Clock(), Terminal()
  handler = logging.StreamHandler(terminal)
  logging.root.addHandler(handler)
  try:
    monkeypatch.setattr("sys.stderr", terminal)
    with _bar(clock, terminal) as bar:
      bar.update(1, 0.5)
      logging.getLogger().error("saved")
      clock.now += 1.0
      bar.update(100, 0.25)
    assert handler.stream is terminal
  finally:
    logging.root.removeHandler(handler)
  text = terminal.getvalue()
  assert "100/100" in text and "loss 0.2500" in text and "images/s" in text
  # The line of the bar is wiped before the log, and drawn again after it.
  assert "\x1b[2Ksaved" in text
  assert "━" in text and "\x1b[?25h" in text  # And the cursor is back.


def test_a_dumb_terminal_gets_lines(monkeypatch):
  monkeypatch.setenv("TERM", "dumb")
  terminal = Terminal()
  with _bar(Clock(), terminal) as bar:
    bar.update(1, 0.5)
  assert "\x1b" not in terminal.getvalue()
  assert "step 1/100  loss 0.5000" in terminal.getvalue()


def test_other_processes_are_silent(monkeypatch):
  monkeypatch.setattr(jax, "process_index", lambda: 1)
  clock, stream = Clock(), io.StringIO()
  with _bar(clock, stream) as bar:
    for step in (1, 2):
      clock.now += 1.0
      bar.update(step, 1.0)
    assert bar.rates()["steps_per_second"] == pytest.approx(1.0)
  assert stream.getvalue() == ""


def test_counter_shows_how_many_are_made():
  clock, stream = Clock(), io.StringIO()
  with progress.counter("samples", 30, stream=stream, clock=clock) as done:
    for count in (10, 20, 30):
      clock.now += 6.0
      done(count)
  assert stream.getvalue().splitlines() == [
    "samples 20/30  ETA 6.0s",
    "samples 30/30  18s",
  ]


@pytest.mark.parametrize(
  "seconds, text",
  [
    (0.04, "0.0s"),
    (9.9, "9.9s"),
    (9.96, "10s"),
    (59.6, "1m00s"),
    (185, "3m05s"),
    (3599.6, "1h00m"),
    (90061, "25h01m"),
  ],
)
def test_durations(seconds, text):
  assert progress.duration(seconds) == text
