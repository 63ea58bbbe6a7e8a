import numpy as np
import pytest

from flowjax.data import order


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 16, 17, 1000, 70001])
def test_every_epoch_is_a_permutation(count):
  for epoch in (0, 1, 10**6):
    position_B = epoch * count + np.arange(count)
    record_B = order.records(3, count, position_B)
    np.testing.assert_array_equal(np.sort(record_B), np.arange(count))


def test_a_position_needs_no_neighbours():
  position_B = np.arange(300)
  record_B = order.records(0, 77, position_B)
  mixed_B = np.random.default_rng(0).permutation(position_B)
  np.testing.assert_array_equal(
    order.records(0, 77, mixed_B), record_B[mixed_B]
  )
  alone = [order.records(0, 77, position_B[i : i + 1])[0] for i in range(300)]
  np.testing.assert_array_equal(alone, record_B)


@pytest.mark.parametrize("count", [2, 3, 5, 10, 37])
def test_every_record_is_as_likely_at_every_place(count):
  epochs, draws = 2000, []
  for seed in range(6):
    positions = np.arange(count * epochs)
    record_EN = order.records(seed, count, positions).reshape(epochs, count)
    hits_NN = np.stack(
      [np.bincount(record_N, minlength=count) for record_N in record_EN.T]
    )
    expected = epochs / count
    draws.append(np.sum((hits_NN - expected) ** 2 / expected))
  # Each of the n^2 counts has the variance epochs (1/n) (1 - 1/n).
  mean = count * (count - 1)
  spread = np.sqrt(2.0) * (count - 1) * count / (count - 1) / np.sqrt(6)
  assert abs(np.mean(draws) - mean) < 4 * spread


def test_neighbours_in_a_source_are_not_neighbours_in_an_epoch():
  record_B = order.records(0, 5000, np.arange(5000))
  assert abs(np.corrcoef(record_B, np.arange(5000))[0, 1]) < 0.06
  assert abs(np.corrcoef(record_B[1:], record_B[:-1])[0, 1]) < 0.06


def test_coins_are_fair_and_differ_by_seed():
  one, two = (order.coins(seed, np.arange(20000)) for seed in (0, 1))
  assert abs(one.mean() - 0.5) < 0.015 and abs(two.mean() - 0.5) < 0.015
  assert abs((one == two).mean() - 0.5) < 0.015
  assert abs((one[1:] == one[:-1]).mean() - 0.5) < 0.015


def test_the_order_outlives_a_version():
  """A checkpoint continues an order: these numbers may never change."""
  found = order.records(0, 10, np.arange(20)).tolist()
  assert found == [0, 2, 7, 1, 4, 5, 6, 3, 9, 8, 0, 5, 6, 9, 1, 7, 2, 3, 4, 8]
  coins = order.coins(0, np.arange(10)).astype(int).tolist()
  assert coins == [0, 1, 1, 0, 1, 1, 0, 1, 0, 0]
