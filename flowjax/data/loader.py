"""Batches whose content is a pure function of the seed and the step."""

# Shape suffixes: B batch of one process, H height, W width, C channels.

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np

from flowjax.data import config as config_lib
from flowjax.data import sources

Batch = dict[str, np.ndarray]


def batches(
  source: sources.Source,
  config: config_lib.DataConfig,
  *,
  start_step: int = 0,
  process_index: int = 0,
  process_count: int = 1,
) -> Iterator[Batch]:
  """Yields this process's part of the batches from `start_step` on, for ever.

  Step s takes the global positions s * batch_size ... (s + 1) * batch_size - 1,
  each process a contiguous part of them. Position p is record
  shuffle(p mod N; seed, epoch p // N) of the N records.
  """
  import grain

  local = _local_size(config.batch_size, process_count)
  indices = grain.MapDataset.range(len(source))
  indices = indices.shuffle(_mix(config.shuffle_seed) % 2**32).repeat()
  read = _Read(source, config.shuffle_seed, config.flip, local)
  batch = indices.batch(local).map_with_index(read)
  batch = batch[start_step * process_count + process_index :: process_count]
  iterator = iter(
    batch.to_iter_dataset(grain.ReadOptions(0, prefetch_buffer_size=0))
  )
  try:
    yield from iterator
  finally:
    iterator.close()


@dataclasses.dataclass(frozen=True)
class _Read:
  """Reads the records of one batch, and flips those whose position says so."""

  source: Any
  seed: int
  flip: bool
  local: int

  def __call__(self, index: int, records_B: np.ndarray) -> Batch:
    batch = self.source.gather(records_B)
    if self.flip:
      position_B = index * self.local + np.arange(self.local)
      flip_B111 = _coin(self.seed, position_B)[:, None, None, None]
      image_BHWC = batch["image"]
      batch["image"] = np.where(flip_B111, image_BHWC[:, :, ::-1], image_BHWC)
    return batch


def _local_size(batch_size: int, process_count: int) -> int:
  if batch_size % process_count:
    raise ValueError(
      f"batch_size={batch_size} must be a multiple of the {process_count} "
      "processes that share it."
    )
  return batch_size // process_count


def _mix(value: int) -> int:
  """Returns 64 well mixed bits of `value` (the finalizer of SplitMix64)."""
  value = (value + 0x9E3779B97F4A7C15) % 2**64
  value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
  value = (value ^ (value >> 27)) * 0x94D049BB133111EB % 2**64
  return value ^ (value >> 31)


def _coin(seed: int, position_B: np.ndarray) -> np.ndarray:
  """Tosses a coin for each global position."""
  return np.array([_mix(_mix(seed) ^ int(p)) & 1 for p in position_B], bool)
