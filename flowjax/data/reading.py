"""Reading records one by one, and what becomes of the corrupt ones."""

# Shape suffixes: B batch of one process.

import concurrent.futures
import functools
import itertools
import logging
import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np

from flowjax import errors
from flowjax.data import sources

IN_A_ROW = 100  # Corrupt records, after which it is no accident any more.

S = TypeVar("S")
T = TypeVar("T")
Example = dict[str, Any]

log = logging.getLogger(__name__)


def sound(
  source: sources.Source, records: Sequence[int], on_corrupt: str
) -> Example:
  """Reads records into a batch; the next sound one replaces a corrupt one.

  Which one that is follows from the record alone. Under on_corrupt="skip" the
  batch has "skipped", int32 [B], which marks what was replaced.
  """
  if on_corrupt == "stop":
    return stack(each(source, records, on_corrupt))
  search = functools.partial(_next_sound, source)
  examples, skipped = zip(*mapped(search, records), strict=True)
  return stack(examples) | {"skipped": np.array(skipped, np.int32)}


def each(
  source: sources.Source, records: Sequence[int], on_corrupt: str
) -> list[Example | None]:
  """Reads records; None stands for a corrupt one under on_corrupt="skip"."""
  results = attempts(source, records)
  failed = [r for r in results if isinstance(r, sources.Corrupt)]
  if failed and on_corrupt == "stop":
    raise stopped(failed[0])
  for error in failed:
    _warn(f"{error} It is left out.")
  return [None if isinstance(r, sources.Corrupt) else r for r in results]


def attempts(
  source: sources.Source, records: Sequence[int]
) -> list[Example | sources.Corrupt]:
  """Reads records; of a corrupt one there is what `Corrupt` says."""
  return mapped(functools.partial(_attempt, source), records)


def stack(examples) -> Example:
  return {key: np.stack([e[key] for e in examples]) for key in examples[0]}


def _next_sound(source: sources.Source, record: int) -> tuple[Example, bool]:
  tries = min(IN_A_ROW, len(source))
  for further in range(tries):
    # Within the records of the same variant.
    variant, place = divmod(record, len(source))
    place = (place + further) % len(source)
    result = _attempt(source, place + variant * len(source))
    if not isinstance(result, sources.Corrupt):
      return result, further > 0
    _warn(f"{result} The next sound image is taken instead.")
  raise errors.DataError(
    f"{tries} records in a row are corrupt, up to this one: {result} That is "
    f"no accident: look whether the files of {source.name} are complete."
  )


def _attempt(source: sources.Source, record: int) -> Any:
  try:
    return source[record]
  except sources.Corrupt as error:
    return error


def stopped(error: sources.Corrupt) -> errors.DataError:
  """Returns what ends a run under on_corrupt="stop"."""
  return errors.DataError(
    f"{error} Repair or remove it, or set config.data.on_corrupt='skip'."
  )


@functools.lru_cache(maxsize=4096)
def _warn(text: str) -> None:
  """Says it once, not once an epoch."""
  log.warning(text)


def mapped(function: Callable[[S], T], records: Sequence[S]) -> list[T]:
  """Maps in threads: decoding and reading leave the interpreter's lock.

  Each thread takes one run of the records; handing them out one by one costs
  more than a small image does. One record alone is read in this thread, which
  may be one of these.
  """
  if len(records) <= 1:
    return [function(record) for record in records]
  count = min(16, os.cpu_count() or 1)
  size = max(1, -(-len(records) // count))
  runs = [records[i : i + size] for i in range(0, len(records), size)]
  done = _pool(count).map(lambda run: [function(i) for i in run], runs)
  return list(itertools.chain.from_iterable(done))


@functools.cache
def _pool(count: int) -> concurrent.futures.Executor:
  return concurrent.futures.ThreadPoolExecutor(count, "flowjax-read")
