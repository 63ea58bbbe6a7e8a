"""The benchmark of the sources reads each, and begins with many records."""

import data
import pytest


@pytest.fixture(scope="module")
def written(tmp_path_factory):
  folder = tmp_path_factory.mktemp("written")
  return folder, data.write(folder, 20, 64)


@pytest.mark.parametrize("kind", data.SOURCES)
def test_every_source_gives_all_images(written, kind):
  folder, size = written
  row = data.read(data.config_of(folder, kind, 32), size / 20, 0.01)
  assert row["images"] >= 64 and row["images_per_cpu_second"] > 0
  seconds = row["images"] / row["images_per_second"]
  expected = row["images"] * size / 20 / seconds
  assert row["bytes_per_second"] == pytest.approx(expected)


@pytest.mark.parametrize("kind", [*data.FILES, "webdataset"])
def test_an_index_of_many_records_is_opened_and_read(tmp_path, kind):
  data.prepare(tmp_path, kind, 3000, folders=10)
  row = data.begin(tmp_path, kind, 3000)
  assert row["records"] == 3000 and row["index_bytes"] > 3000 * 20
  assert row["memory_not_shared_bytes"] <= row["peak_bytes"]
