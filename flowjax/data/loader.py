"""Batches whose content is a pure function of the seed and the step."""

# Shape suffixes: B batch of one process, H height, W width, C channels.

import dataclasses
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from flowjax import errors, schema
from flowjax.data import (
  buckets,
  canvas,
  order,
  pairs,
  prefetch,
  reading,
  sources,
  workers,
)
from flowjax.data import config as config_lib

Batch = dict[str, np.ndarray]


def batches(
  source: sources.Source,
  config: config_lib.DataConfig,
  *,
  start_step: int = 0,
  rows: Sequence[int] | np.ndarray | None = None,
) -> Iterator[Batch]:
  """Iterates over the batches from `start_step` on; there is no end.

  Step s takes the positions s * batch_size ... (s + 1) * batch_size - 1, and
  `order` says which record each one is. Of several processes each reads but the
  `rows` of a batch that its devices hold. Of a source in aspect buckets step s
  is of one of them, and takes the next positions of that one.

  Under on_corrupt="skip" the batches of a source that reads its records one by
  one carry "skipped", int32 [B]: 1 where the record was corrupt and the next
  sound one stands in its place. It is for counting, not for the model. Close
  the generator to end the workers.
  """
  import grain

  row_B = _rows(rows, config.batch_size)
  steps = grain.MapDataset.range(sys.maxsize).map(_Read(source, config, row_B))
  mine = steps[start_step:]
  # `to_device` reads ahead; a thread of Grain's beside it would gain nothing.
  dataset = mine.to_iter_dataset(
    grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
  )
  if config.workers:
    workers.let_grain_read_its_flags()
    dataset = dataset.mp_prefetch(
      grain.MultiprocessingOptions(config.workers, config.prefetch),
      worker_init_fn=workers.start,
    )
  return _closing(iter(dataset))


def _closing(iterator: Any) -> Iterator[Batch]:
  try:
    with workers.deaths_explained():
      yield from map(workers.own, iterator)
  finally:
    iterator.close()


def epoch_batches(
  source: sources.Source,
  batch_size: int,
  *,
  rows: Sequence[int] | np.ndarray | None = None,
  on_corrupt: str = "skip",
) -> Iterator[Batch]:
  """Yields every record once, in order; of each batch the `rows`, if given.

  Aspect buckets come one after the other, so that each batch is of one.
  Each batch has a float32 "mask" [B]: 1 for a record, 0 for what pads the last
  batch, and for a corrupt record under on_corrupt="skip".
  """
  row_B = _rows(rows, batch_size)
  tried = sound = 0
  for part in buckets.parts_of(source):
    blank, count = sources.blank(part), len(part)
    for start in range(0, count, batch_size):
      records = [int(start + row) for row in row_B if start + row < count]
      read = reading.each(part, records, on_corrupt)
      read += [None] * (len(row_B) - len(read))
      batch = reading.stack([blank if e is None else e for e in read])
      mask_B = np.array([e is not None for e in read], np.float32)
      tried, sound = tried + len(records), sound + int(mask_B.sum())
      yield batch | {"mask": mask_B}
  if tried and not sound:
    raise errors.DataError(f"All {tried} records of {source.name} are corrupt.")


def to_device(
  iterator: Iterator[Batch], put: Callable[[Batch], Any], size: int
) -> prefetch.Prefetch:
  """Places batches by `put` in a thread, at most `size` ahead of their use."""
  return prefetch.Prefetch(iterator, put, size)


@dataclasses.dataclass(frozen=True)
class _Read:
  """Reads rows of a step's batch, and flips those whose position says so.

  Of two sources that are paired, each has an order and flips of its own.
  """

  source: Any
  config: config_lib.DataConfig
  row_B: np.ndarray

  def __call__(self, step: int) -> Batch:
    return canvas.of(self._batch(step), self.config)

  def _batch(self, step: int) -> Batch:
    source, seed = self.source, self.config.shuffle_seed
    if isinstance(source, buckets.Bucketed):
      source, seed, step = source.turn(seed, step)
    position_B = step * self.config.batch_size + self.row_B
    if not isinstance(source, pairs.Paired):
      return self._read(source, seed, position_B)
    batch = self._read(source.first, seed, position_B)
    other = self._read(source.other, seed + 1, position_B)
    if "skipped" in other:
      batch["skipped"] = batch.get("skipped", 0) + other["skipped"]
    return {**batch, "source": other["image"]}

  def _read(self, source: Any, seed: int, position_B: np.ndarray) -> Batch:
    records_B = sources.draw(source, seed, position_B)
    batch = _gathered(source, records_B)
    if batch is None:
      batch = reading.sound(source, records_B.tolist(), self.config.on_corrupt)
    if self.config.flip:
      flip_B111 = order.coins(seed, position_B)[:, None, None, None]
      image_BHWC = batch["image"]
      batch["image"] = np.where(flip_B111, image_BHWC[:, :, ::-1], image_BHWC)
    return batch


def _gathered(source: Any, records_B: np.ndarray) -> Batch | None:
  """Returns the records at once, if the source can and none is corrupt."""
  if not hasattr(source, "gather"):
    return None
  try:
    return source.gather(records_B)
  except sources.Corrupt:
    return None


def state(
  config: config_lib.DataConfig,
  step: int,
  source: sources.Source | None = None,
) -> dict[str, Any]:
  """Returns what the batches after `step` hang on, as JSON can hold it.

  Without `source` the training split is opened to take its fingerprint.
  """
  source = source or sources.open(config, "train")
  return {
    "step": step,
    "seed": config.shuffle_seed,
    "batch_size": config.batch_size,
    "flip": config.flip,
    "source": source.name,
    "fingerprint": source.fingerprint(),
  }


def check_state(
  saved: dict[str, Any],
  config: config_lib.DataConfig,
  source: sources.Source | None = None,
) -> None:
  """Refuses to go on from `saved` if the batches would be others."""
  step = saved.get("step", 0)
  rows = schema.difference(saved, state(config, step, source), "data")
  if rows:
    cut = [row if len(row) < 200 else row[:200] + " ..." for row in rows]
    raise errors.DataError(
      f"The data is not that of the checkpoint at step {step}, so training "
      "would not see each image once per epoch:\n  " + "\n  ".join(cut) + "\n"
      "Restore config.data and the files, or begin in a new workdir."
    )


def _rows(
  rows: Sequence[int] | np.ndarray | None, batch_size: int
) -> np.ndarray:
  row_B = np.arange(batch_size) if rows is None else np.asarray(rows, np.int64)
  assert (np.diff(row_B) > 0).all() and 0 <= row_B[0] <= row_B[-1] < batch_size
  return row_B
