"""Reads synthetic images from each source, and begins with ten million.

  python benchmarks/data.py --out=benchmarks/results/data.json

Writes the same JPEG images as a folder, tar shards and parquet, and reads them
by turns in the order of training. `--millions` makes an index of as many
records, of which only the first batch has files, and opens that.
benchmarks/README.md says how to read the result.
"""

import argparse
import io
import itertools
import json
import os
import pathlib
import resource
import subprocess
import sys
import tarfile
import tempfile
import time
from typing import Any

import measure

WORDS = "a photograph of a red house by the lake, early in the morning".split()
SOURCES = ("folder", "captions", "webdataset", "hf", "mixture")
GROUP = 100


def parse() -> argparse.Namespace:
  """Reads the flags."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  add = parser.add_argument
  add("--out", type=pathlib.Path, help="where the JSON goes")
  add("--folder", help="on the disk to measure; default: that of temporaries")
  add("--images", type=int, default=2000)
  add("--side", type=int, default=320, help="of the images in the files")
  add("--size", type=int, default=256, help="of the images in a batch")
  add("--seconds", type=float, default=10.0, help="of each source and round")
  add("--rounds", type=int, default=3)
  add("--millions", type=float, default=10.0, help="records of an index")
  # What the processes that this one starts are to do.
  add("--do", choices=("folder", "webdataset"), help=argparse.SUPPRESS)
  flags = parser.parse_args()
  if not (flags.out or flags.do):
    parser.error("the following arguments are required: --out")
  return flags


def write(folder: pathlib.Path, count: int, side: int) -> int:
  """Writes `count` images to every source, and returns their bytes."""
  import numpy as np
  import PIL.Image
  import pyarrow
  import pyarrow.parquet

  rng = np.random.default_rng(0)
  rows = []
  for i in range(count):
    # Smooth with some noise: about as many bytes as a photograph has.
    coarse = rng.integers(0, 256, (side // 16, side // 16, 3), np.uint8)
    image = PIL.Image.fromarray(coarse).resize((side, side))
    noise = rng.integers(-12, 12, (side, side, 3))
    pixels = np.clip(np.asarray(image) + noise, 0, 255).astype(np.uint8)
    file = io.BytesIO()
    PIL.Image.fromarray(pixels).save(file, "JPEG", quality=90)
    text = f"{' '.join(rng.permutation(WORDS))} {i}"
    rows.append((f"{i:07d}", file.getvalue(), text))
  for name, content, text in rows:
    for kind, inner in (("folder", f"class{int(name) % 10}"), ("captions", "")):
      place = folder / kind / inner
      place.mkdir(parents=True, exist_ok=True)
      (place / f"{name}.jpg").write_bytes(content)
      if kind == "captions":
        (place / f"{name}.txt").write_text(text)
  (folder / "webdataset").mkdir()
  for first in range(0, count, 500):
    path = folder / f"webdataset/{first:07d}.tar"
    with tarfile.open(path, "w") as tar:
      for name, content, text in rows[first : first + 500]:
        add(tar, f"{name}.jpg", content)
        add(tar, f"{name}.txt", text.encode())
  (folder / "hf").mkdir()
  table = pyarrow.table(
    {
      "image": [{"bytes": content, "path": name} for name, content, _ in rows],
      "text": [text for *_, text in rows],
    }
  )
  path = folder / "hf/data.parquet"
  pyarrow.parquet.write_table(table, path, row_group_size=GROUP)
  return sum(len(content) for _, content, _ in rows)


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
  """Writes one member of a tar."""
  info = tarfile.TarInfo(name)
  info.size = len(content)
  tar.addfile(info, io.BytesIO(content))


def config_of(folder: pathlib.Path, kind: str, size: int, **changes):
  """Returns the config that reads a source."""
  from flowjax.data import config as config_lib

  names = {
    "folder": f"folder:{folder}/folder",
    "captions": f"folder:{folder}/captions",
    "webdataset": f"webdataset:{folder}/webdataset/*.tar",
    "hf": f"hf:{folder}/hf",
    "mixture": "mixture",
  }
  values: dict[str, Any] = {
    "source": names[kind],
    "image_size": (size, size),
    "channels": 3,
    "held_out": 0.0,
    "batch_size": 64,
  }
  if kind == "mixture":
    values["mixture"] = ((names["webdataset"], 3.0), (names["captions"], 1.0))
  return config_lib.DataConfig(**(values | changes))


def read(config, image_bytes: float, seconds: float) -> dict[str, Any]:
  """Reads batches for some seconds, in this process alone."""
  from flowjax.data import loader, sources

  began = time.perf_counter()
  source = sources.open(config, "train")
  opened = time.perf_counter() - began
  batches = loader.batches(source, config)
  next(batches)  # What is opened, and kept, by the first.
  began, cpu = time.perf_counter(), time.process_time()
  count = 0
  while (wall := time.perf_counter() - began) < seconds:
    count += len(next(batches)["image"])
  used = time.process_time() - cpu
  batches.close()
  return {
    "open_seconds": opened,
    "images": count,
    "images_per_second": count / wall,
    "images_per_cpu_second": count / used,
    "bytes_per_second": count * image_bytes / wall,
    "bytes_per_cpu_second": count * image_bytes / used,
  }


def begin(folder: pathlib.Path, kind: str, count: int) -> dict[str, Any]:
  """Opens an index of `count` records and reads the first batch.

  Every record is the same file: what is measured is the index, not the disk.
  """
  import numpy as np

  from flowjax.data import index, listing, loader, sources

  config = config_of(folder, kind, 64, index_dir=str(folder / "kept"))
  if kind == "folder":
    synthetic_folder(folder, count, config)
  else:
    synthetic_shards(folder, count, config)
  del index, listing, np
  before = measured_memory()
  began, cpu = time.perf_counter(), time.process_time()
  source = sources.open(config, "train")
  opened = time.perf_counter() - began
  batch = next(loader.batches(source, config))
  fingerprint = time.perf_counter()
  source.fingerprint()
  fingerprint = time.perf_counter() - fingerprint
  after = measured_memory()
  assert len(batch["image"]) == config.batch_size and len(source) == count
  return {
    "records": count,
    "open_seconds": opened,
    "first_batch_seconds": time.perf_counter() - began - fingerprint,
    "fingerprint_seconds": fingerprint,
    "cpu_seconds": time.process_time() - cpu,
    "memory_bytes": after["rss"] - before["rss"],
    "memory_not_shared_bytes": after["anonymous"] - before["anonymous"],
    "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
  }
