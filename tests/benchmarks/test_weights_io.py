"""The benchmark of reading weights reads what it says, in both ways."""

import io
import json
import os
import pathlib
import subprocess
import sys

import pytest
import weights_io

SCRIPT = pathlib.Path(weights_io.__file__)


@pytest.mark.slow
def test_it_writes_what_it_promises(tmp_path):
  out = tmp_path / "result.json"
  words = ["--size=tiny", "--rounds=1", f"--out={out}", f"--folder={tmp_path}"]
  run = subprocess.run(
    [sys.executable, str(SCRIPT), *words],
    env={**os.environ, "OMP_NUM_THREADS": "1"},
    capture_output=True,
    text=True,
  )
  assert run.returncode == 0, run.stdout + run.stderr
  assert list(tmp_path.iterdir()) == [out]
  result = json.loads(out.read_text())
  assert result["machine"]["date"] and result["machine"]["command"]
  assert result["shards"] > 1
  (row,) = result["rounds"]
  disk = min(row["plain_1"]["seconds"], row["plain_8"]["seconds"])
  beyond = []
  for name in weights_io.IMPORTS:
    imported = row[name]
    assert imported["versions"] and imported["device"]
    assert (imported["touch_seconds"] is None) == (name == "import")
    # In float32, but for the headers of the files.
    assert imported["arrays_on_host_bytes"] == 4 * imported["parameters"]
    assert 0 < result["bytes"] - 4 * imported["parameters"] < 20_000
    share = disk / imported["seconds"]
    assert result["share_of_disk"][name] == pytest.approx(share)
    speed = result["bytes"] / imported["seconds"] / 1e9
    assert result["gb_per_second"][name] == pytest.approx(speed)
    peak = imported["peak_bytes"] - imported["before_bytes"]
    beyond.append(peak - imported["arrays_on_host_bytes"])
  assert result["memory_over_largest_shard"] == pytest.approx(
    max(beyond) / result["largest_shard_bytes"]
  )


def test_plain_reading_reads_every_byte(tmp_path, monkeypatch):
  read = []

  class File(io.FileIO):
    def readinto(self, buffer):
      read.append(super().readinto(buffer))
      return read[-1]

  monkeypatch.setattr(weights_io, "BLOCK", 1000)
  monkeypatch.setattr(
    weights_io, "open", lambda path, *_, **__: File(path), raising=False
  )
  files = [tmp_path / "a", tmp_path / "b"]
  for path, size in zip(files, (2500, 1000), strict=True):
    path.write_bytes(bytes(size))
  weights_io.read_plainly(files, threads=2)
  assert sorted(read) == [500, 1000, 1000, 1000]
