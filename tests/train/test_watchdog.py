"""A run that hangs is ended; one that works or saves is not."""

import threading
import time

from flowjax.train import watchdog


class Left:
  def __init__(self):
    self.codes, self.done = [], threading.Event()

  def __call__(self, code):
    self.codes.append(code)
    self.done.set()


def test_silence_ends_the_run_and_shows_every_thread(capfd):
  leave = Left()
  with watchdog.Watchdog(0.1, leave):
    assert leave.done.wait(60)
  said = capfd.readouterr().err
  assert leave.codes == [6]
  assert "No step has ended" in said
  assert "test_silence_ends_the_run_and_shows_every_thread" in said


def test_progress_and_pauses_do_not():
  leave = Left()
  with watchdog.Watchdog(1.0, leave) as dog:
    for _ in range(12):
      time.sleep(0.1)
      dog.beat()
    with dog.paused():
      time.sleep(1.3)
  assert not leave.codes


def test_zero_is_never():
  leave = Left()
  with watchdog.Watchdog(0, leave):
    time.sleep(0.2)
  assert not leave.codes
