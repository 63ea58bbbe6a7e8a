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
import subprocess
import sys
import tarfile
import tempfile
import time
from typing import Any
from unittest import mock

import measure

WORDS = "a photograph of a red house by the lake, early in the morning".split()
SOURCES = ("folder", "captions", "webdataset", "hf", "mixture")
FILES = ("folder", "buckets")  # Of millions; the second in aspect buckets.
GROUP = 100  # Rows of a group of parquet.
FOLDERS = 1000


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
  add("--do", choices=("prepare", "begin"), help=argparse.SUPPRESS)
  add("--kind", help=argparse.SUPPRESS)
  flags = parser.parse_args()
  if not (flags.out or flags.do):
    parser.error("the following arguments are required: --out")
  return flags


def write(folder: pathlib.Path, count: int, side: int) -> int:
  """Writes `count` images to every source, and returns their bytes."""
  import numpy as np
  import pyarrow
  import pyarrow.parquet

  rng = np.random.default_rng(0)
  rows = [
    (f"{i:07d}", jpeg(rng, side), f"{' '.join(rng.permutation(WORDS))} {i}")
    for i in range(count)
  ]
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


def jpeg(rng, side: int) -> bytes:
  """Returns a smooth image with noise, of about the bytes of a photograph."""
  import numpy as np
  import PIL.Image

  coarse = rng.integers(0, 256, (side // 16, side // 16, 3), np.uint8)
  image = PIL.Image.fromarray(coarse).resize((side, side))
  noise = rng.integers(-12, 12, (side, side, 3))
  pixels = np.clip(np.asarray(image) + noise, 0, 255).astype(np.uint8)
  file = io.BytesIO()
  PIL.Image.fromarray(pixels).save(file, "JPEG", quality=90)
  return file.getvalue()


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


def prepare(
  folder: pathlib.Path, kind: str, count: int, folders: int = FOLDERS
) -> dict[str, Any]:
  """Makes the index of `count` records, in so many folders or shards.

  The folders are there and their files are not: `os.scandir` is made to tell of
  them, so that a listing is all but what the disk takes. Each shard holds one
  sample, which is all those of its index.
  """
  import numpy as np

  from flowjax.data import index, listing, shards, sizes, sources

  config = millions_of(folder, kind)
  each, cpu = count // folders, time.process_time()
  root = folder / kind
  if kind in FILES:
    for i in range(folders):
      path = root / f"part{i:04d}"
      path.mkdir(parents=True)
      os.utime(path, (1e9, 1e9))
    os.utime(root, (1e9, 1e9))
    real = os.scandir

    def told(path):
      return real(path) if pathlib.Path(path) == root else Told(each)

    def measured(root, found):
      del root
      side_N = np.resize(np.arange(300, 900, 7, np.uint32), len(found))
      return sizes.Sizes(side_N, side_N[::-1])

    with (
      mock.patch.object(listing.os, "scandir", told),
      mock.patch.object(listing, "_sizes", measured),
    ):
      sources.open(config, "train")
    used = time.process_time() - cpu
    return {"list_cpu_seconds": used, "list_peak_bytes": memory()["VmHWM"]}
  root.mkdir()
  content = jpeg(np.random.default_rng(0), 64)
  for i in range(folders):
    path = str(root / f"{i:04d}.tar")
    with tarfile.open(path, "w") as tar:
      add(tar, "0.jpg", content)
      add(tar, "0.txt", b"a caption")
    one = shards.of(path, config.index_dir)
    arrays = {
      name: np.repeat(array, each) for name, array in one.index.arrays.items()
    }
    place = shards.index_path(path, config.index_dir)
    index.save(place, one.index.header, arrays)
  return {}


class Told:
  """What `os.scandir` would tell of a folder of images and their texts."""

  def __init__(self, count: int):
    self._count = count

  def __enter__(self):
    return (
      Entry(f"{i:08d}{ending}")
      for i in range(self._count)
      for ending in (".jpg", ".txt")
    )

  def __exit__(self, *_):
    pass


class Entry:
  """A file that is not there."""

  def __init__(self, name: str):
    self.name = name

  def is_file(self) -> bool:
    return True

  def is_dir(self) -> bool:
    return False


def millions_of(folder: pathlib.Path, kind: str):
  """Returns the config of the source whose index is large."""
  from flowjax.data import buckets

  place = f"folder:{folder}/{kind}"
  if kind == "webdataset":
    place = f"webdataset:{folder}/webdataset/*.tar"
  return config_of(
    folder,
    "folder",
    64,
    source=place,
    index_dir=str(folder / "kept"),
    captions=True,
    buckets=buckets.of_area(64 * 64, 8) if kind == "buckets" else (),
  )


def begin(folder: pathlib.Path, kind: str, count: int) -> dict[str, Any]:
  """Opens the index of `count` records, and reads the first batch."""
  import numpy as np

  from flowjax.data import buckets, loader, sources

  config = millions_of(folder, kind)
  before, cpu = memory(), time.process_time()
  began = time.perf_counter()
  source = sources.open(config, "train")
  opened = time.perf_counter() - began
  if kind in FILES:  # Only now: files that are new make a listing old.
    part, seed, whole = source, config.shuffle_seed, source
    if isinstance(source, buckets.Bucketed):
      part, seed, _ = source.turn(seed, 0)
      whole = part.whole
    drawn = sources.draw(part, seed, np.arange(config.batch_size))
    for i in part.row_N[drawn] if part is not whole else drawn:
      path = folder / kind / whole.file(int(i))
      path.write_bytes(jpeg(np.random.default_rng(0), 64))
      path.with_suffix(".txt").write_text("a caption")
  began = time.perf_counter()
  batch = next(loader.batches(source, config))
  first = time.perf_counter() - began
  began = time.perf_counter()
  source.fingerprint()
  fingerprint = time.perf_counter() - began
  after = memory()
  assert len(batch["image"]) == config.batch_size
  assert len(source) == count
  return {
    "records": len(source),
    "open_seconds": opened,
    "first_batch_seconds": first,
    "fingerprint_seconds": fingerprint,
    "cpu_seconds": time.process_time() - cpu,
    "memory_bytes": after["VmRSS"] - before["VmRSS"],
    # The rest is pages of files, which all processes of a host share.
    "memory_not_shared_bytes": after["RssAnon"] - before["RssAnon"],
    "peak_bytes": after["VmHWM"],
    "index_bytes": sum(p.stat().st_size for p in (folder / "kept").iterdir()),
  }


def memory() -> dict[str, int]:
  """Returns what /proc/self/status says of memory, in bytes."""
  lines = pathlib.Path("/proc/self/status").read_text().splitlines()
  words = [line.split() for line in lines if line.startswith(("Vm", "Rss"))]
  return {key.rstrip(":"): int(value) * 1024 for key, value, _ in words}


def start(flags, do: str, kind: str, folder: str) -> dict[str, Any]:
  """Does something in a process of its own, whose memory is its own."""
  command = [
    *(sys.executable, __file__, f"--do={do}", f"--kind={kind}"),
    *(f"--folder={folder}", f"--millions={flags.millions}"),
  ]
  done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
  return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
  """Writes, reads by turns, begins with millions."""
  flags = parse()
  if flags.do:
    work = {"prepare": prepare, "begin": begin}[flags.do]
    count = round(flags.millions * 1e6)
    print(json.dumps(work(pathlib.Path(flags.folder), flags.kind, count)))
    return
  others = measure.Others([])
  time.sleep(1.0)
  result: dict[str, Any] = {
    "benchmark": "data",
    "machine": measure.machine(),
    "images": flags.images,
    "side": flags.side,
    "size": flags.size,
    "cores_used_by_others": others.cores(),
    "sources": {kind: [] for kind in SOURCES},
    "millions": {},
  }
  with tempfile.TemporaryDirectory(dir=flags.folder) as name:
    folder = pathlib.Path(name)
    each = write(folder, flags.images, flags.side) / flags.images
    result["bytes_per_image"] = each
    for _, kind in itertools.product(range(flags.rounds), SOURCES):
      config = config_of(folder, kind, flags.size)
      result["sources"][kind].append(read(config, each, flags.seconds))
  for kind in (*FILES, "webdataset") if flags.millions else ():
    with tempfile.TemporaryDirectory(dir=flags.folder) as name:
      made = start(flags, "prepare", kind, name)
      result["millions"][kind] = made | start(flags, "begin", kind, name)
  result["load_average_after"] = measure.load_average()
  measure.write(flags.out, result)
  tell(result)


def tell(result: dict[str, Any]) -> None:
  """Prints the fastest round of each source, and what millions take."""
  for kind, rounds in result["sources"].items():
    best = max(rounds, key=lambda row: row["images_per_cpu_second"])
    print(
      f"{kind}: {best['images_per_second']:.0f} images/s, "
      f"{best['bytes_per_second'] / 1e6:.1f} MB/s; of a second of one core "
      f"{best['images_per_cpu_second']:.0f} images"
    )
  for kind, row in result["millions"].items():
    print(
      f"{kind}: {row['records']:,} records, first batch after "
      f"{row['open_seconds'] + row['first_batch_seconds']:.1f} s "
      f"({row['cpu_seconds']:.1f} s of CPU), memory "
      f"{row['memory_bytes'] / 2**20:.0f} MiB, of which not shared "
      f"{row['memory_not_shared_bytes'] / 2**20:.0f}"
    )
  if result["cores_used_by_others"] > 0.1:
    print("The machine was not quiet: its speeds are not to be quoted.")


if __name__ == "__main__":
  main()
