"""Sizes from headers, of every kind of source, and so which bucket it is."""

import io
import itertools
import os
import pickle
import tarfile

import numpy as np
import PIL.Image
import pytest

from flowjax.data import config as config_lib
from flowjax.data import images, loader, sources

THREE = ((8, 8), (6, 10), (10, 6))
SIZES = ((40, 40), (24, 40), (50, 30))
EXIF = PIL.Image.Exif()
EXIF[0x0112] = 6  # On its side.


def encoded(size, shade=255, ending="PNG", **options) -> bytes:
  file = io.BytesIO()
  pixels = np.full((*size, 3), shade, np.uint8)
  PIL.Image.fromarray(pixels).save(file, ending, **options)
  return file.getvalue()


def contents() -> dict[str, bytes]:
  """Twelve images of three aspects, one on its side by its Exif, one broken."""
  found = {f"{i:02d}.png": encoded(SIZES[i % 3], 20 * i) for i in range(12)}
  found["12.jpg"] = encoded((30, 50), ending="JPEG", exif=EXIF)
  return found | {"13.png": b"no image"}


def opened(source, split="train", **changes):
  values = {"channels": 3, "held_out": 0.0, "buckets": THREE, "batch_size": 4}
  config = config_lib.DataConfig(source=source, **{**values, **changes})
  return sources.open(config, split)


def check(source) -> None:
  """Each part has its images, in its shape, and says what they were."""
  shades = [
    [round((part[i]["image"][0, 0, 0] + 1) * 127.5) // 20 for i in range(4)]
    for part in source.parts
  ]
  assert shades == [[0, 3, 6, 9], [1, 4, 7, 10], [2, 5, 8, 11]]
  assert [len(part) for part in source.parts] == [5, 4, 5]
  captions = [part[0]["caption"] for part in source.parts]
  assert captions == ["number 00", "number 01", "number 02"]
  square, wide, tall = source.parts
  assert wide[1]["image"].shape == wide.shape == (6, 10, 3)
  assert wide[1]["size"].tolist() == [24, 40]
  assert tall[4]["size"].tolist() == [50, 30]
  # Nothing of an image of the bucket's own aspect is cropped.
  assert wide[1]["crop"].tolist() == tall[4]["crop"].tolist() == [0, 0]
  with pytest.raises(sources.Corrupt, match="corrupt"):
    square[4]


@pytest.fixture
def photos(tmp_path):
  for name, content in contents().items():
    (tmp_path / name).write_bytes(content)
    (tmp_path / name).with_suffix(".txt").write_text(f"number {name[:2]}")
  return tmp_path


def test_a_size_is_upright_and_none_of_a_broken_header():
  def of(content):
    return images.size(io.BytesIO(content))

  assert of(encoded((3, 7))) == (3, 7)
  for ending in ("PNG", "JPEG", "WEBP"):
    assert of(encoded((3, 7), ending=ending, exif=EXIF)) == (7, 3)
  whole = encoded((300, 70), ending="JPEG")
  assert of(whole[:700]) == (300, 70)
  assert of(b"") is of(b"no image") is of(whole[:20]) is None


def test_a_folder_goes_into_buckets_by_the_headers_of_its_files(photos, caplog):
  source = opened(f"folder:{photos}", originals=True)
  check(source)
  assert f"1 images of {photos} have no size that can be read" in caplog.text
  assert "13.png: they go to the bucket config.data.image_size" in caplog.text
  config = config_lib.DataConfig(buckets=THREE, batch_size=4)
  batches = itertools.islice(loader.batches(source, config), 32)
  assert sum(batch["skipped"].sum() for batch in batches) > 0


def test_sizes_of_a_folder_are_kept(photos, tmp_path_factory, monkeypatch):
  kept = str(tmp_path_factory.mktemp("kept"))
  for path in (*photos.iterdir(), photos):
    os.utime(path, (1e9, 1e9))
  plain = opened(f"folder:{photos}", index_dir=kept, buckets=())
  one = opened(f"folder:{photos}", index_dir=kept)
  monkeypatch.setattr(images, "size", None)
  again = opened(f"folder:{photos}", index_dir=kept)
  assert one.fingerprint() == again.fingerprint()
  assert [len(part) for part in again.parts] == [5, 4, 5]
  assert len(plain) == 14


def write_tar(path, names) -> None:
  with tarfile.open(path, "w") as tar:
    for name in names:
      content = contents()[name]
      text = f"number {name[:2]}".encode()
      for member, data in ((name, content), (f"{name[:2]}.txt", text)):
        info = tarfile.TarInfo(member)
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))


def test_tar_shards_keep_their_sizes_beside_them(tmp_path, caplog, monkeypatch):
  names = sorted(contents())
  write_tar(tmp_path / "0.tar", names[:5])
  write_tar(tmp_path / "1.tar", names[5:])
  # The first bytes of an image do not always say it.
  monkeypatch.setattr("flowjax.data.webdataset._HEAD", 40)
  source = opened(f"webdataset:{tmp_path}/{{0,1}}.tar", originals=True)
  check(source)
  assert "1.tar have no size that can be read, the first is 13" in caplog.text
  monkeypatch.setattr(images, "size", None)
  again = opened(f"webdataset:{tmp_path}/{{0,1}}.tar")
  assert again.fingerprint() == source.fingerprint()
  again = pickle.loads(pickle.dumps(again))
  np.testing.assert_array_equal(
    again.parts[1][3]["image"], source.parts[1][3]["image"]
  )
  halves = [
    opened(f"webdataset:{tmp_path}/*.tar", split, held_out=0.4)
    for split in sources.SPLITS
  ]
  assert sum(map(len, halves)) == 14 and all(map(len, halves))


def test_parquet_has_sizes_in_its_images(tmp_path, caplog, monkeypatch):
  pa = pytest.importorskip("pyarrow")
  import pyarrow.parquet as pq

  found = contents()
  columns = {
    "image": list(found.values()),
    "text": [f"number {name[:2]}" for name in found],
    # Of other files, as in data from the web.
    "height": [90] * 14,
    "width": [10] * 14,
  }
  path = tmp_path / "some.parquet"
  pq.write_table(pa.table(columns), path, row_group_size=6)
  source = opened(f"hf:{path}", originals=True)
  check(source)
  assert f"1 images of {path} have no size" in caplog.text
  assert "the first is row 13" in caplog.text
  monkeypatch.setattr(images, "size", None)
  again = pickle.loads(pickle.dumps(opened(f"hf:{path}")))
  assert again.fingerprint() == source.fingerprint()
  # Each bucket deals out its own rows, group by group, once an epoch.
  config = config_lib.DataConfig(buckets=THREE, batch_size=4)
  for part in again.parts:
    drawn = sources.draw(part, 3, np.arange(3 * len(part)))
    for epoch in drawn.reshape(3, -1):
      assert sorted(epoch) == list(range(len(part)))
  shapes = {
    batch["image"].shape[1:3]
    for batch in itertools.islice(loader.batches(again, config), 30)
  }
  assert shapes == set(THREE)


def test_what_has_no_size_is_refused(tmp_path):
  with pytest.raises(sources.errors.UserError, match="latents in .npy"):
    opened(f"folder:{tmp_path}", channels=4)
