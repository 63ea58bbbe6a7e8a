"""From a source to shards: what `flowjax encode` does, batch by batch."""

# Shape suffixes: B batch, H height, W width, C channels.

import dataclasses
import logging
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from flowjax import errors
from flowjax.commands import encode_plan
from flowjax.data import (
  archive,
  archive_writing,
  embeddings,
  prefetch,
  reading,
  records,
  sources,
)

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Work:
  """What is to be written where: sources by split, a plan, and an encoder."""

  folder: pathlib.Path
  splits: Mapping[str, sources.Source]
  plan: archive.Plan
  encoder: encode_plan.Encoder | None
  batch_size: int
  on_corrupt: str

  def write(
    self,
    keys: Sequence[tuple[str, int]],
    done: Callable[[int], None] = lambda count: None,
  ) -> None:
    """Writes shards; `done` is told how many records are read so far."""
    count = 0
    with prefetch.Prefetch(self._chunks(keys), lambda chunk: chunk, 2) as read:
      for split, shard in keys:
        with archive_writing.writing(self.folder, split, shard) as writer:
          for _ in self._starts(split, shard):
            numbers, found = next(read)
            self._write(writer, numbers, found)
            count += len(numbers)
            done(count)

  def _starts(self, split: str, shard: int) -> list[range]:
    """Returns the batches of a shard, which end where it ends."""
    numbers = self.plan.numbers(split, shard)
    return [
      numbers[start : start + self.batch_size]
      for start in range(0, len(numbers), self.batch_size)
    ]

  def _chunks(self, keys: Sequence[tuple[str, int]]) -> Iterator[tuple]:
    for split, shard in keys:
      for numbers in self._starts(split, shard):
        yield numbers, reading.attempts(self.splits[split], list(numbers))

  def _write(self, writer: archive_writing.Writer, numbers, found) -> None:
    """Encodes and writes a batch of what was read, or says what failed."""
    sound = []
    for number, result in zip(numbers, found, strict=True):
      if isinstance(result, sources.Corrupt):
        self._fail(writer, number, result)
      else:
        sound.append((number, result))
    if not sound:
      return
    values, captions = self._values([example for _, example in sound])
    values[archive.NUMBER] = np.array([number for number, _ in sound])
    finite_B = np.ones(len(sound), bool)
    for field in self.plan.layout.fields:
      if field.dtype in records.FLOATS:
        flat_BN = np.asarray(values[field.name]).reshape(len(sound), -1)
        finite_B &= np.isfinite(flat_BN).all(axis=1)
    for number in values[archive.NUMBER][~finite_B].tolist():
      reason = f"Record {number} is not finite, once it is encoded."
      self._fail(writer, number, sources.Corrupt(reason))
    kept = np.flatnonzero(finite_B)
    try:
      writer.write(
        self.plan.layout.pack(
          {name: value[kept] for name, value in values.items()},
          [captions[row] for row in kept],
        )
      )
    except OverflowError as error:
      raise errors.UserError(f"{error} Set --dtype=bfloat16.") from error

  def _fail(self, writer, number: int, error: sources.Corrupt) -> None:
    if self.on_corrupt == "stop":
      raise reading.stopped(error)
    log.warning("%s It is left out.", error)
    writer.fail(number, str(error))

  def _values(self, examples) -> tuple[dict[str, np.ndarray], list[str]]:
    """Returns the fields of examples, but for their number, and captions.

    They are encoded in batches of one size always: one program serves all, and
    what fills a batch up changes nothing of the rest.
    """
    captions = [str(example.get("caption", "")) for example in examples]
    batch = reading.stack(
      [{k: v for k, v in e.items() if k != "caption"} for e in examples]
    )
    layout, texts = self.plan.layout, self.plan.about["texts"]
    parts = embeddings.Texts.from_json(texts) if texts else None
    if self.encoder is None:
      if layout.dtype["image"].base == np.uint8:
        batch["image"] = _as_bytes(batch["image"])
      if parts:
        batch |= parts.apart(batch)
    else:
      count = len(examples)
      full = np.minimum(np.arange(self.batch_size), count - 1)
      found = dict(
        zip(
          ("mean", "log_variance"),
          self.encoder.encode(batch["image"][full]),
          strict=True,
        )
      )
      if "embedding" in self.plan.layout.names:
        embed = self.encoder.embed  # type: ignore[attr-defined]
        found["embedding"] = embed(batch["image"][full])
      if parts:
        found |= parts.apart(self.encoder.texts([captions[i] for i in full]))
      batch |= {k: np.asarray(v)[:count] for k, v in found.items()}
    return {
      name: batch[name] for name in layout.names if name in batch
    }, captions


def _as_bytes(image: np.ndarray) -> np.ndarray:
  """Returns images in [-1, 1] as 256 levels."""
  if np.abs(image).max() > 1.0 + 1e-3:
    raise errors.UserError(
      f"--dtype=uint8: the images go up to {np.abs(image).max():.3g}, and "
      "bytes hold what is in [-1, 1]. Set --dtype=float16."
    )
  return np.round(np.clip(image, -1.0, 1.0) * 127.5 + 127.5).astype(np.uint8)
