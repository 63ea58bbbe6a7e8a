"""How fast encoded latents are read: images per second of one CPU core.

Synthetic shards are written, and batches of random records read as training
reads them, by `gather`, in this process. Seconds are those of the processor,
user and system, so that a machine with other work gives the same figure; the
shards are in the memory of the system, so that a disk is not measured.

  python -m benchmarks.arrayrecord_data
"""

import json
import pathlib
import resource
import tempfile
import time
from typing import Any

import numpy as np

from flowjax.data import (
  archive,
  archive_writing,
  embeddings,
  loader,
  records,
  sources,
)
from flowjax.data import config as data_config

SHAPE = (32, 32, 16)


def measure(
  folder: pathlib.Path,
  *,
  count: int = 4096,
  shards: int = 8,
  batch_size: int = 128,
  batches: int = 64,
  dtype: str = "float16",
  texts: embeddings.Texts | None = None,
) -> dict[str, Any]:
  """Writes `count` records into `folder` and reads batches of them."""
  config = write(folder, count, shards, batch_size, dtype, texts)
  opening = _seconds()
  source = sources.open(config, "train")
  opened = _seconds() - opening
  iterator = loader.batches(source, config)
  next(iterator)
  before, size = _seconds(), 0
  for _ in range(batches):
    size += sum(value.nbytes for value in next(iterator).values())
  taken = _seconds() - before
  return {
    "source": "arrayrecord",
    "latents": list(SHAPE),
    "dtype": dtype,
    "text_bytes": _text_bytes(texts, dtype),
    "records": count,
    "shards": shards,
    "batch_size": batch_size,
    "open_cpu_seconds": opened,
    "images_per_cpu_second": batches * batch_size / taken,
    "bytes_per_cpu_second": size / taken,
  }


def write(
  folder: pathlib.Path,
  count: int,
  shards: int,
  batch_size: int,
  dtype: str = "float16",
  texts: embeddings.Texts | None = None,
) -> data_config.DataConfig:
  """Writes random latents, and returns the config that reads them."""
  fields = [records.Field(archive.NUMBER, "int64")]
  fields += [records.Field(n, dtype, SHAPE) for n in ("mean", "log_variance")]
  classes = [] if texts else ["one"]
  fields += texts.fields(dtype) if texts else [records.Field("label", "int32")]
  layout = records.Layout(tuple(fields), captioned=texts is not None)
  about = {
    "shape": list(SHAPE),
    "class_names": classes,
    "texts": texts.to_json() if texts else None,
    "frozen": None,
    "data": {},
  }
  plan = archive.Plan(layout, {"train": count}, -(-count // shards), about)
  archive_writing.begin(folder, plan)
  rng = np.random.default_rng(0)
  for split, shard in plan.shards():
    numbers = plan.numbers(split, shard)
    with archive_writing.writing(folder, split, shard) as writer:
      for start in range(0, len(numbers), batch_size):
        some = np.array(numbers[start : start + batch_size])
        values: dict[str, Any] = {
          f.name: rng.standard_normal((len(some), *f.shape), np.float32)
          for f in layout.fields
        }
        values |= {archive.NUMBER: some, "label": np.zeros(len(some))}
        writer.write(layout.pack(values, ["a caption"] * len(some)))
  archive_writing.finish(folder, plan)
  return data_config.DataConfig(
    source=f"arrayrecord:{folder}",
    image_size=SHAPE[:2],
    channels=SHAPE[2],
    batch_size=batch_size,
  )


def main() -> None:
  """Prints the figures of latents alone, and of those with SD3's CLIPs."""
  clips = embeddings.Texts(
    77,
    2048,
    2048,
    False,
    (
      embeddings.Part("clip_l", (0, 77), (0, 768), (0, 768)),
      embeddings.Part("clip_g", (0, 77), (768, 2048), (768, 2048)),
    ),
  )
  for texts in (None, clips):
    with tempfile.TemporaryDirectory() as folder:
      print(json.dumps(measure(pathlib.Path(folder), texts=texts), indent=2))


def _text_bytes(texts: embeddings.Texts | None, dtype: str) -> int:
  if texts is None:
    return 0
  return records.Layout(tuple(texts.fields(dtype))).dtype.itemsize


def _seconds() -> float:
  """Returns the processor's seconds of this process, all threads together."""
  used = resource.getrusage(resource.RUSAGE_SELF)
  return used.ru_utime + used.ru_stime


if __name__ == "__main__":
  started = time.monotonic()
  main()
