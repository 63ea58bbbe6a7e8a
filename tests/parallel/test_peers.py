"""What processes tell each other, with a store that is but a dict."""

import threading
import time

import pytest

from flowjax.parallel import peers
from flowjax.train import signals


class Store:
  """The key-value store of jax's coordination service, as `Peers` sees it."""

  def __init__(self):
    self.values, self.changed = {}, threading.Condition()
    self.gone = False

  def key_value_set(self, key, value, allow_overwrite=False):
    with self.changed:
      if key in self.values and not allow_overwrite:
        raise RuntimeError(f"ALREADY_EXISTS: {key}")
      self.values[key] = value
      self.changed.notify_all()

  def blocking_key_value_get(self, key, milliseconds):
    with self.changed:
      self.changed.wait_for(
        lambda: key in self.values or self.gone, milliseconds / 1000
      )
      if self.gone:
        raise RuntimeError("UNAVAILABLE: Socket closed")
      if key not in self.values:
        raise RuntimeError(f"DEADLINE_EXCEEDED: {key}")
      return self.values[key]

  def key_value_try_get(self, key):
    if key not in self.values:
      raise RuntimeError(f"NOT_FOUND: {key}")
    return self.values[key]

  def key_value_dir_get(self, start):
    return [(k, v) for k, v in self.values.items() if k.startswith(start)]


class Left:
  """Notes with which code a process would have left."""

  def __init__(self):
    self.code, self.done = None, threading.Event()

  def __call__(self, code):
    self.code = code
    self.done.set()


@pytest.fixture(name="job")
def _job(monkeypatch):
  monkeypatch.setattr(peers, "GRACE", 0.1)
  store, made = Store(), []

  def make(count, timeout=1.0):
    for index in range(count):
      leave = Left()
      one = peers.Peers(
        store, index, count, timeout=timeout, host=f"h{index}", leave=leave
      )
      made.append((one, leave))
    return store, made

  yield make
  for one, _ in made:
    one.close()


@pytest.mark.parametrize("where", [(5, 5, 5), (5, 7, 6)])
def test_all_stop_after_the_furthest_step_that_any_is_in(job, where):
  _, made = job(3, timeout=60.0)
  last = []

  def train(one, first):
    one.begin(first)
    for step in range(first + 1, 1000):
      time.sleep(0.002)  # The step.
      if why := one.stop_after(step):
        last.append((step, why))
        return

  threads = [
    threading.Thread(target=train, args=(one, first), daemon=True)
    for (one, _), first in zip(made, where, strict=True)
  ]
  for thread in threads:
    thread.start()
  time.sleep(0.05)
  # Two at once are one request.
  made[1][0].ask_to_stop("SIGTERM")
  made[2][0].ask_to_stop("SIGINT")
  for thread in threads:
    thread.join(10)
  assert len(last) == 3 and len(set(last)) == 1
  assert last[0][1] == "SIGTERM" and last[0][0] > max(where)


def test_a_request_before_the_first_step_waits_for_it(job):
  _, made = job(2, timeout=60.0)
  made[0][0].ask_to_stop("SIGTERM")
  made[0][0].begin(3)
  made[1][0].begin(3)
  time.sleep(0.1)
  assert [one.stop_after(4) for one, _ in made] == ["SIGTERM"] * 2


@pytest.mark.parametrize(
  "ready, last", [((4, 4), (4, 4)), ((5, 4), (None, None))]
)
def test_before_the_first_step_all_stop_where_all_are(
  job, monkeypatch, ready, last
):
  """With 4 steps done; who has begun the fifth already takes it to its end."""
  _, made = job(2, timeout=60.0)
  requests = []
  for (one, _), step in zip(made, ready, strict=True):
    monkeypatch.setattr(signals.distributed, "peers", lambda one=one: one)
    requests.append(signals.StopRequest())
    requests[-1].begin(4)
    if step == 5:
      assert requests[-1].after(4) is None
  made[1][0].ask_to_stop("SIGTERM")
  time.sleep(0.1)
  for request, step, wanted in zip(requests, ready, last, strict=True):
    if step == 4:
      assert request.after(4) == (wanted and "SIGTERM")
  if None in last:
    assert [request.after(5) for request in requests] == ["SIGTERM"] * 2


def test_nobody_stops_unasked(job):
  _, made = job(2)
  for one, _ in made:
    one.begin(0)
    assert [one.stop_after(step) for step in (1, 2, 3)] == [None] * 3


def test_a_silent_process_is_named_and_the_others_leave(job, capfd):
  store, made = job(3, timeout=1.5)
  silent, _ = made[1]
  silent.close()
  for i in (0, 2):
    one, leave = made[i]
    assert leave.done.wait(20) and leave.code == 6
    assert one.wait_for_end(0)["kind"] == "lost"
  assert "Lost process 1 (host h1), not heard of" in capfd.readouterr().err


def test_the_silence_of_process_0_is_heard_too(job):
  _, made = job(3, timeout=1.5)
  made[0][0].close()
  for one, leave in made[1:]:
    assert leave.done.wait(20) and leave.code == 6
    assert one.wait_for_end(0)["lost"] == [0]


def test_who_is_done_waits_for_no_news_and_is_not_lost(job):
  _, made = job(3, timeout=600.0)
  began = time.monotonic()
  for one, leave in made:
    one.close()
    assert not one._thread.is_alive() and leave.code is None
  assert time.monotonic() - began < 60  # News are waited for in hundreds.


def test_those_that_speak_are_not_lost(job):
  _, made = job(3, timeout=1.5)
  time.sleep(2.5)
  assert all(leave.code is None for _, leave in made)


def test_a_failure_of_one_ends_all_with_its_code(job, capfd):
  _, made = job(2, timeout=60.0)
  made[1][0].tell(kind="failed", code=3, text="no data")
  one, leave = made[0]
  assert leave.done.wait(20) and leave.code == 3
  assert "Process 1 has ended: no data" in capfd.readouterr().err
  # Whoever has failed ends by itself.
  assert made[1][1].code is None


def test_the_end_of_the_store_is_that_of_process_0(job, capfd):
  store, made = job(2, timeout=60.0)
  with store.changed:
    store.gone = True
    store.changed.notify_all()
  for _, leave in made:
    assert leave.done.wait(20) and leave.code == 6
  assert "Lost process 0" in capfd.readouterr().err
