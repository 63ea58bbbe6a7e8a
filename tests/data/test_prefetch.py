import gc
import threading
import time

import pytest

from flowjax.data import loader


def threads() -> list[threading.Thread]:
  return [t for t in threading.enumerate() if t.name == "flowjax-prefetch"]


def wait_for(condition) -> bool:
  end = time.monotonic() + 5
  while not condition() and time.monotonic() < end:
    time.sleep(0.01)
  return condition()


class Counter:
  """Counts for ever, and how far, and whether it was closed."""

  def __init__(self):
    self.given = 0
    self.closed = False

  def __iter__(self):
    return self

  def __next__(self):
    self.given += 1
    return self.given

  def close(self):
    self.closed = True


def test_items_come_in_order_and_placed():
  with loader.to_device(iter(range(50)), lambda i: 10 * i, 3) as ready:
    assert list(ready) == [10 * i for i in range(50)]
    with pytest.raises(StopIteration):
      next(ready)


def test_it_reads_ahead_but_no_further_than_asked():
  counter = Counter()
  with loader.to_device(counter, lambda i: i, 4) as ready:
    assert wait_for(lambda: counter.given == 5)  # Four ready, one in hand.
    time.sleep(0.3)
    assert counter.given == 5
    assert next(ready) == 1
    assert wait_for(lambda: counter.given == 6)


def test_placing_happens_in_the_thread():
  names = []
  put = lambda i: names.append(threading.current_thread().name)  # noqa: E731
  with loader.to_device(iter(range(3)), put, 1) as ready:
    list(ready)
  assert names == ["flowjax-prefetch"] * 3


def failing():
  yield 1
  yield 2
  raise OSError("the disk is gone")


def test_an_error_comes_where_its_batch_would_have_come():
  with loader.to_device(failing(), lambda i: i, 8) as ready:
    assert next(ready) == 1 and next(ready) == 2
    for _ in range(2):
      with pytest.raises(OSError, match="the disk is gone"):
        next(ready)
  assert wait_for(lambda: not threads())


def test_an_error_of_placing_is_raised_too():
  def put(i):
    raise MemoryError("the device is full")

  with loader.to_device(iter(range(3)), put, 2) as ready:
    with pytest.raises(MemoryError, match="the device is full"):
      next(ready)


@pytest.mark.parametrize("take", [0, 3])
def test_closing_ends_the_thread_and_the_iterator(take):
  counter = Counter()
  ready = loader.to_device(counter, lambda i: i, 2)
  for _ in range(take):
    next(ready)

  ready.close()

  assert not threads() and counter.closed
  with pytest.raises(StopIteration):
    next(ready)
  ready.close()  # Once more does no harm.


@pytest.mark.slow
def test_a_lost_reference_ends_the_thread():
  counter = Counter()
  ready = loader.to_device(counter, lambda i: i, 2)
  next(ready)
  assert threads()

  del ready
  gc.collect()

  assert wait_for(lambda: not threads()) and counter.closed
