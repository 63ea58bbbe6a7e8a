"""The order of records that come in groups, of which few are open at a time."""

# Shape suffixes: B positions, G groups, V windows.

import numpy as np

from flowjax.data import order


class Windows:
  """Deals out groups in windows of `size`, whose records come in any order.

  In each epoch the groups are permuted; the first `size` of them are the first
  window, and so on, and the records of a window are permuted together. Each
  record comes once an epoch, and which one stands where follows from the seed
  and the position, as in data/order.py.
  """

  def __init__(self, count_G: np.ndarray, size: int):
    self.count_G, self.size = np.asarray(count_G, np.int64), size
    self.begin_G = np.cumsum(self.count_G) - self.count_G
    self.total = int(self.count_G.sum())
    self._epochs: dict[tuple[int, int], tuple] = {}

  def within(self, row_M: np.ndarray) -> "Windows":
    """Returns the windows of some of the records, which ascend."""
    ends = np.searchsorted(row_M, [*self.begin_G, self.total])
    return Windows(np.diff(ends), self.size)

  def draw(self, seed: int, position_B: np.ndarray) -> np.ndarray:
    """Returns the record of each position."""
    epoch_B, place_B = np.divmod(np.asarray(position_B, np.int64), self.total)
    record_B = np.zeros(len(place_B), np.int64)
    for epoch in np.unique(epoch_B):
      group_G, end_G, end_V = self._epoch(seed, int(epoch))
      mine_B = np.flatnonzero(epoch_B == epoch)
      window_B = np.searchsorted(end_V, place_B[mine_B], side="right")
      for window in np.unique(window_B):
        at_B = mine_B[window_B == window]
        begin = int(end_V[window - 1]) if window else 0
        count = int(end_V[window]) - begin
        # Each window of each epoch has a permutation of its own.
        turn = int(epoch) * len(end_V) + int(window)
        inner_B = order.records(
          seed, count, place_B[at_B] - begin + turn * count
        )
        slot_B = np.searchsorted(end_G, begin + inner_B, side="right")
        within_B = begin + inner_B - end_G[slot_B]
        group_B = group_G[slot_B]
        record_B[at_B] = (
          self.begin_G[group_B] + self.count_G[group_B] + within_B
        )
    return record_B

  def _epoch(self, seed: int, epoch: int) -> tuple:
    """Returns the groups of an epoch, and where they and windows end."""
    if (seed, epoch) not in self._epochs:
      if len(self._epochs) > 4:
        self._epochs.clear()
      count = len(self.count_G)
      place_G = np.arange(count) + epoch * count
      group_G = order.records(seed, count, place_G)
      end_G = np.cumsum(self.count_G[group_G])
      last_V = np.arange(self.size, count + self.size, self.size) - 1
      end_V = end_G[np.minimum(last_V, count - 1)]
      self._epochs[seed, epoch] = group_G, end_G, end_V
    return self._epochs[seed, epoch]
