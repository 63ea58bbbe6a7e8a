"""Local parquet and arrow files: rows by their groups, in bounded memory."""

import io
import itertools
import json
import pickle
import sys

import numpy as np
import PIL.Image
import pytest

from flowjax import errors
from flowjax.data import config as config_lib
from flowjax.data import hf, loader, sources, tables, windows

pa = pytest.importorskip("pyarrow")
import pyarrow.parquet as pq  # noqa: E402

TEXTS = ("ein Häuschen", "赤い家", "дом", "بيت أحمر", "🏠‍🔥")


def encoded(value: int) -> bytes:
  file = io.BytesIO()
  PIL.Image.fromarray(np.full((4, 4, 3), value, np.uint8)).save(file, "PNG")
  return file.getvalue()


def table(numbers, *, struct=True, image="image", text="text", label=False):
  """Rows whose shade is their number."""
  images = [encoded(n) for n in numbers]
  told = [TEXTS[n % 5] for n in numbers]
  if struct:
    images = [{"bytes": content, "path": None} for content in images]
  columns = {image: images, "number": list(numbers)}
  if text:
    columns[text] = pa.array(told, pa.string())
  if label:
    columns["label"] = [n % 3 for n in numbers]
  made = pa.table(columns)
  names = {"names": ["a", "b", "c"], "_type": "ClassLabel"}
  info = {"info": {"features": {"label": names, "text": {"_type": "Value"}}}}
  if label:
    metadata = {b"huggingface": json.dumps(info).encode()}
    made = made.replace_schema_metadata(metadata)
  return made


def write(path, made, rows=8) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  tables.open.cache_clear()  # Another file of the same name may be known.
  if path.suffix == ".parquet":
    return pq.write_table(made, path, row_group_size=rows)
  kind = pa.ipc.new_file if "random" in path.name else pa.ipc.new_stream
  with pa.OSFile(str(path), "wb") as file, kind(file, made.schema) as writer:
    writer.write_table(made, max_chunksize=rows)


def config_of(place, **changes):
  values = {"image_size": (4, 4), "channels": 3, "held_out": 0.0}
  return config_lib.DataConfig(source=f"hf:{place}", **(values | changes))


def opened(place, split="train", **changes):
  return sources.open(config_of(place, **changes), split)


def shade(record) -> int:
  return round((record["image"][0, 0, 0] + 1) * 127.5)


def shades(source) -> list[int]:
  return [shade(source[i]) for i in range(len(source))]


@pytest.mark.parametrize("ending", ["parquet", "arrow", "random.arrow"])
@pytest.mark.parametrize("struct", [True, False])
def test_rows_come_by_their_number(tmp_path, ending, struct):
  write(tmp_path / f"a.{ending}", table(range(20), struct=struct))
  write(tmp_path / f"b.{ending}", table(range(20, 33), struct=struct))
  source = opened(tmp_path)
  assert len(source) == 33 and source.num_classes == 0
  for i in (32, 0, 19, 20, 8, 7):
    assert shade(source[i]) == i and source[i]["caption"] == TEXTS[i % 5]
  copy = pickle.loads(pickle.dumps(source))
  assert shade(copy[21]) == 21 and copy.fingerprint() == source.fingerprint()


def test_labels_are_read_by_the_names_in_the_schema(tmp_path):
  write(tmp_path / "a.parquet", table(range(10), label=True))
  source = opened(tmp_path)
  assert source.class_names == ("a", "b", "c")
  assert [int(source[i]["label"]) for i in (3, 4, 5)] == [0, 1, 2]
  assert opened(tmp_path, captions=True)[3]["caption"] == TEXTS[3]
  templated = opened(tmp_path, templates=("a {}",))
  assert templated[4]["caption"] == "a b"


def test_columns_are_the_usual_or_those_of_the_config(tmp_path):
  made = table(range(10), image="jpg", text="words")
  write(tmp_path / "a.parquet", made)
  assert opened(tmp_path)[3]["caption"] == TEXTS[3]  # The only ones.

  made = made.append_column("more", pa.array(["more"] * 10))
  write(tmp_path / "a.parquet", made)
  with pytest.raises(errors.DataError, match=r"words \(text\).*caption_key"):
    opened(tmp_path)
  assert opened(tmp_path, caption_key="more")[0]["caption"] == "more"
  with pytest.raises(errors.DataError, match="the column 'picture' of images"):
    opened(tmp_path, image_key="picture")
  with pytest.raises(errors.DataError, match="number"):
    opened(tmp_path, caption_key="number")


def test_an_epoch_holds_each_record_once_and_opens_few_groups(
  tmp_path, monkeypatch
):
  write(tmp_path / "a.parquet", table(range(100)), rows=7)
  size = max(g.size for g in tables.open(str(tmp_path / "a.parquet")).groups(
    ("image", "text")))  # fmt: skip
  monkeypatch.setattr(hf, "WINDOW_BYTES", 3 * size)
  config = config_of(tmp_path, batch_size=10)
  source = sources.open(config, "train")
  assert source.windows.size == 3
  decoded = []
  monkeypatch.setattr(
    tables.File,
    "read",
    lambda self, group, columns, read=tables.File.read: (
      decoded.append(group),
      read(self, group, columns),
    )[1],
  )
  batches = list(itertools.islice(loader.batches(source, config), 20))
  seen = [shade({"image": x}) for b in batches for x in b["image"]]
  assert sorted(seen[:100]) == sorted(seen[100:]) == list(range(100))
  assert seen[:100] != seen[100:] and seen[:100] != list(range(100))
  # Each group once an epoch, but for those at the ends of windows.
  assert set(decoded) == set(range(15)) and len(decoded) <= 2 * 15 + 6
  assert len(source.cache._kept) <= 6


def test_splits_are_disjoint_complete_and_stable(tmp_path):
  write(tmp_path / "a.parquet", table(range(60)))
  train, held = (
    set(shades(opened(tmp_path, split, held_out=0.3)))
    for split in sources.SPLITS
  )
  assert not train & held and train | held == set(range(60))
  assert 8 <= len(held) <= 28
  write(tmp_path / "b.parquet", table(range(60, 70)))
  assert set(shades(opened(tmp_path, "held_out", held_out=0.3))) >= held


@pytest.mark.parametrize("ending", ["parquet", "arrow"])
@pytest.mark.parametrize("policy", ["empty", "skip", "stop"])
def test_rows_without_a_caption(tmp_path, ending, policy, caplog):
  made = table(range(30), text=None)
  said = [None if i in (3, 20) else TEXTS[i % 5] for i in range(30)]
  made = made.append_column("text", pa.array(said))
  write(tmp_path / f"a.{ending}", made)
  if policy == "stop":
    with pytest.raises(errors.DataError, match="2 of 30 rows.*row 3 of"):
      opened(tmp_path)
    return
  source = opened(tmp_path, on_no_caption=policy)
  skipped = {3, 20} if policy == "skip" else set()
  assert shades(source) == [i for i in range(30) if i not in skipped]
  assert "2 of 30 rows" in caplog.text
  expected = [text or "" for i, text in enumerate(said) if i not in skipped]
  assert [source[i]["caption"] for i in range(len(source))] == expected


@pytest.mark.parametrize("text", [None, "text"])
def test_images_alone_need_neither_labels_nor_captions(tmp_path, text):
  made = table(range(9), text=None)
  if text:
    made = made.append_column(text, pa.array([None] * 9, pa.string()))
  write(tmp_path / "a.parquet", made)
  source = opened(tmp_path, images_alone=True)
  assert shades(source) == list(range(9))
  assert set(source[0]) == set(sources.blank(source)) == {"image"}


def test_a_corrupt_image_is_named_by_its_row(tmp_path):
  made = table(range(10))
  rows = made.to_pylist()
  rows[9]["image"]["bytes"] = b"no image"
  rows[2]["image"] = None
  write(tmp_path / "a.parquet", pa.Table.from_pylist(rows, made.schema))
  for row in (2, 9):
    with pytest.raises(sources.Corrupt, match=f"Row {row} of .*a.parquet"):
      opened(tmp_path)[row]


def test_a_text_that_is_no_utf_8_is_corrupt(tmp_path):
  raw = pa.array(["ä".encode("latin-1")] * 10).view(pa.string())
  made = table(range(10), text=None).append_column("text", raw)
  write(tmp_path / "a.arrow", made)
  with pytest.raises(sources.Corrupt, match="Row 4 of .* no UTF-8"):
    opened(tmp_path)[4]


@pytest.mark.parametrize("ending", ["parquet", "arrow"])
def test_an_unsound_file_is_named_and_left_out(tmp_path, ending, caplog):
  write(tmp_path / f"a.{ending}", table(range(10)))
  (tmp_path / f"b.{ending}").write_bytes(b"")
  (tmp_path / f"c.{ending}").write_bytes(
    (tmp_path / f"a.{ending}").read_bytes()[:-700]
  )
  if ending == "parquet":  # A stream that is cut off has whole batches.
    assert shades(opened(tmp_path)) == list(range(10))
    assert "2 of 3 files are left out" in caplog.text
  else:
    assert shades(opened(tmp_path))[:10] == list(range(10))
    assert f"b.{ending}" in caplog.text
  tables.open.cache_clear()
  with pytest.raises(errors.DataError, match=f"[bc].{ending}"):
    opened(tmp_path, on_corrupt="stop")


def test_a_broken_page_is_a_corrupt_record(tmp_path):
  path = tmp_path / "a.parquet"
  write(path, table(range(64)), rows=16)
  content = bytearray(path.read_bytes())
  at = content.find(b"\x89PNG", len(content) // 2)
  content[at - 400 : at + 400] = b"\xff" * 800
  path.write_bytes(content)
  tables.open.cache_clear()
  source = opened(tmp_path)
  broken = 0
  for i in range(len(source)):
    try:
      assert shade(source[i]) == i
    except sources.Corrupt as error:
      assert "a.parquet" in str(error)
      broken += 1
  assert 1 <= broken <= 32


def test_files_that_differ_are_refused(tmp_path):
  write(tmp_path / "a.parquet", table(range(3)))
  write(tmp_path / "b.parquet", table(range(3), text="said"))
  with pytest.raises(errors.DataError, match="b.parquet has 'text' as None"):
    opened(tmp_path)


def test_several_splits_in_one_folder_must_be_told_apart(tmp_path):
  write(tmp_path / "data/train-00000-of-00001.parquet", table(range(5)))
  write(tmp_path / "data/test-00000-of-00001.parquet", table(range(5, 8)))
  write(tmp_path / "data/cache-1234.arrow", table(range(8, 9)))
  with pytest.raises(errors.DataError, match="test, train.*train.*parquet"):
    opened(tmp_path)
  assert shades(opened(f"{tmp_path}/**/train*.parquet")) == list(range(5))


def test_a_place_without_tables_is_refused(tmp_path):
  with pytest.raises(errors.DataError, match="Nothing is downloaded"):
    opened(tmp_path)
  with pytest.raises(errors.DataError, match="not there"):
    opened(tmp_path / "a.parquet")


def test_a_missing_pyarrow_says_what_to_install(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "pyarrow", None)
  with pytest.raises(errors.UserError, match=r"pip install -e '.\[hf\]'"):
    opened(tmp_path)


@pytest.mark.parametrize("size", [1, 2, 3, 50])
def test_windows_deal_out_each_record_once_an_epoch(size):
  count_G = np.array([3, 0, 5, 1, 0, 0, 7, 2, 4, 0])
  total = int(count_G.sum())
  order = windows.Windows(count_G, size)
  position = np.arange(4 * total)
  stream = order.draw(5, position)
  epochs = stream.reshape(4, total)
  for epoch in epochs:
    assert sorted(epoch) == list(range(total))
  assert len({tuple(epoch) for epoch in epochs}) == 4
  # Any position by itself, and neighbours from at most `size` groups.
  single = [
    windows.Windows(count_G, size).draw(5, p[None])[0] for p in position
  ]
  np.testing.assert_array_equal(stream, single)
  owner = np.repeat(np.arange(10), count_G)
  first = {int(g) for g in owner[epochs[0][:3]]}
  assert len(first) <= size + 1
  assert not (order.draw(6, position) == stream).all()


def test_a_window_has_another_permutation_in_each_epoch():
  order = windows.Windows(np.array([20]), 1)
  epochs = order.draw(0, np.arange(100)).reshape(5, 20)
  assert len({tuple(epoch) for epoch in epochs}) == 5
