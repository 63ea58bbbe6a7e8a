"""Tar shards with random access, and what may be wrong with them."""

import io
import itertools
import json
import os
import pickle
import tarfile

import numpy as np
import PIL.Image
import pytest

from flowjax import errors
from flowjax.data import config as config_lib
from flowjax.data import loader, shards, sources, webdataset

CAPTIONS = ("ein Häuschen", "赤い家", "дом", "بيت أحمر", "🏠‍🔥", "ʻokina")
COUNT = 6


def encoded(value: int, ending="PNG") -> bytes:
  file = io.BytesIO()
  PIL.Image.fromarray(np.full((4, 4, 3), value, np.uint8)).save(file, ending)
  return file.getvalue()


def write(path, members) -> None:
  """Writes (name, content) pairs; a number is a type, and not a content."""
  with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
    for name, content in members:
      info = tarfile.TarInfo(name)
      if isinstance(content, bytes):
        info.size = len(content)
        tar.addfile(info, io.BytesIO(content))
      else:
        info.type, info.linkname = b"%d" % content, "/etc/passwd"
        tar.addfile(info)


def members(first=0, count=COUNT, form="txt"):
  for i in range(first, first + count):
    name, text = f"dir/{i:03d}", CAPTIONS[i % 6]
    yield f"{name}.png", encoded(i)
    if form == "txt":
      yield f"{name}.txt", text.encode()
    else:
      yield f"{name}.json", json.dumps({"text": text, "n": i}).encode()


def config_of(pattern, **changes):
  values = {"image_size": (4, 4), "channels": 3, "held_out": 0.0}
  return config_lib.DataConfig(
    source=f"webdataset:{pattern}", **(values | changes)
  )


def opened(pattern, split="train", **changes):
  return sources.open(config_of(pattern, **changes), split)


def shade(record) -> int:
  return round((record["image"][0, 0, 0] + 1) * 127.5)


@pytest.fixture
def two(tmp_path):
  """Two shards of six samples."""
  write(tmp_path / "a-008.tar", members())
  write(tmp_path / "a-009.tar", members(COUNT, form="json"))
  return tmp_path


def test_records_come_by_their_place_in_the_shards(two):
  source = opened(two / "a-{008..009}.tar")
  assert len(source) == 2 * COUNT and source.num_classes == 0
  for i in (11, 0, 5, 6, 1):
    assert shade(source[i]) == i and source[i]["caption"] == CAPTIONS[i % 6]


def test_only_the_first_open_reads_the_shards(two, monkeypatch):
  first = opened(two / "*.tar")
  assert sorted(p.name for p in two.glob("*.index")) == [
    "a-008.tar.index",
    "a-009.tar.index",
  ]
  monkeypatch.setattr(tarfile, "open", None)
  again = opened(two / "*.tar")
  assert again.fingerprint() == first.fingerprint()
  copy = pickle.loads(pickle.dumps(again))
  assert shade(copy[7]) == 7
  assert len(pickle.dumps(again)) < 2000


def test_a_shard_that_changed_is_indexed_anew(two):
  before = opened(two / "*.tar").fingerprint()
  webdataset._opened.cache_clear()
  write(two / "a-009.tar", members(40, 3))
  source = opened(two / "*.tar")
  assert [shade(source[i]) for i in range(len(source))] == [
    *range(6),
    40,
    41,
    42,
  ]
  assert source.fingerprint()["hash"] != before["hash"]


def test_indexes_may_lie_elsewhere(two, tmp_path):
  kept = tmp_path / "kept"
  assert len(opened(two / "*.tar", index_dir=str(kept))) == 12
  assert len(list(kept.iterdir())) == 2 and not list(two.glob("*.index"))


def test_where_no_index_can_be_written_the_config_says_where_it_can(two):
  (two / "a-008.tar.index").mkdir()
  with pytest.raises(errors.DataError, match="config.data.index_dir=DIR"):
    opened(two / "*.tar")


def test_the_order_is_the_same_from_any_step_and_for_any_rows(two):
  config = config_of(two / "*.tar", batch_size=4)
  source = sources.open(config, "train")
  whole = [
    [shade({"image": image}) for image in batch["image"]]
    for batch in itertools.islice(loader.batches(source, config), 6)
  ]
  for epoch in np.reshape(whole, (2, 12)):
    assert sorted(epoch) == list(range(12))
  late = next(loader.batches(source, config, start_step=4, rows=[1, 3]))
  assert [shade({"image": x}) for x in late["image"]] == whole[4][1::2]
  assert late["caption"].tolist() == [CAPTIONS[i % 6] for i in whole[4][1::2]]


def test_the_splits_are_disjoint_complete_and_stable(two):
  def shades(split):
    source = opened(two / "*.tar", split, held_out=0.4)
    return {shade(source[i]) for i in range(len(source))}

  train, held = shades("train"), shades("held_out")
  assert not train & held and train | held == set(range(12)) and held
  write(two / "a-010.tar", members(12))
  assert shades("train") >= train and shades("held_out") >= held
  with pytest.raises(errors.DataError, match="held_out=0.0"):
    opened(two / "*.tar", "held_out")


def test_latents_are_taken_where_no_image_has_as_many_channels(tmp_path):
  latents = np.arange(4 * 4 * 5, dtype=np.float16).reshape(4, 4, 5)
  file = io.BytesIO()
  np.save(file, latents)
  rows = [("x.png", encoded(3)), ("x.npy", file.getvalue()), ("x.txt", b"t")]
  write(tmp_path / "a.tar", rows)
  source = opened(tmp_path / "a.tar", channels=5)
  np.testing.assert_array_equal(source[0]["image"], latents)
  assert shade(opened(tmp_path / "a.tar")[0]) == 3


def test_long_names_and_dots_in_names(tmp_path):
  name = "d.ir/" + "é" * 120
  rows = [(f"{name}.png", encoded(7)), (f"{name}.txt", b"long")]
  write(tmp_path / "a.tar", rows)
  source = opened(tmp_path / "a.tar")
  assert len(source) == 1 and source[0]["caption"] == "long"


@pytest.mark.parametrize(
  "policy, expected", [("empty", ["", "b"]), ("skip", ["b"]), ("stop", None)]
)
def test_samples_without_a_caption(tmp_path, policy, expected, caplog):
  rows = [("a.png", encoded(0)), ("b.png", encoded(1)), ("b.txt", b"b")]
  write(tmp_path / "a.tar", [*rows, ("c.txt", b"of no image")])
  pattern = tmp_path / "a.tar"
  if expected is None:
    with pytest.raises(errors.DataError, match="1 of 2 samples.*a.tar.*'skip'"):
      opened(pattern)
    return
  source = opened(pattern, on_no_caption=policy)
  assert [source[i]["caption"] for i in range(len(source))] == expected
  assert "1 of 2 samples" in caplog.text


def test_images_alone_need_no_captions(tmp_path):
  rows = [("a.png", encoded(0)), ("b.png", encoded(1)), ("b.txt", b"\xff")]
  write(tmp_path / "a.tar", rows)
  source = opened(tmp_path / "a.tar", images_alone=True)
  assert [shade(source[i]) for i in range(len(source))] == [0, 1]
  assert all(set(source[i]) == {"image"} for i in range(2))
  assert source.fingerprint()["captions"] is False


@pytest.mark.parametrize(
  "name", ["/abs/x.png", "../x.png", "a/../../x.png", "a\\..\\x.png"]
)
def test_a_path_that_leaves_the_folder_is_refused(two, name):
  write(two / "a-010.tar", [(name, encoded(0))])
  with pytest.raises(errors.DataError, match="a-010.tar has a member"):
    opened(two / "*.tar")


def unsound(two, caplog, pattern="*.tar", **changes) -> tuple[list[int], str]:
  """Returns what is left, and what was said; `stop` must refuse it."""
  source = opened(two / pattern, **changes)
  with pytest.raises(errors.DataError, match="on_corrupt='skip'"):
    opened(two / pattern, on_corrupt="stop", **changes)
  return [shade(source[i]) for i in range(len(source))], caplog.text


def test_a_member_of_zero_bytes_is_named_and_left_out(two, caplog):
  rows = [("e.png", b""), ("e.txt", b"e"), ("f.png", b""), ("f.txt", b"f")]
  write(two / "a-010.tar", rows)
  left, said = unsound(two, caplog)
  assert left == list(range(12))
  assert "2 are of zero bytes, the first is e.png (a-010.tar)" in said


def test_a_shard_of_zero_bytes_is_named_and_left_out(two, caplog):
  (two / "a-010.tar").write_bytes(b"")
  left, said = unsound(two, caplog)
  assert left == list(range(12)) and "a-010.tar" in said and "empty" in said


def test_a_shard_that_is_none_is_named_and_left_out(two, caplog):
  (two / "a-010.tar").write_bytes(os.urandom(5000))
  left, said = unsound(two, caplog)
  assert left == list(range(12)) and "no tar files" in said


@pytest.mark.parametrize("part", [0.3, 0.5, 0.7, 0.95])
def test_a_shard_that_is_cut_off_keeps_what_is_whole(two, caplog, part):
  path = two / "a-009.tar"
  content = path.read_bytes().rstrip(b"\0")
  path.write_bytes(content[: int(part * len(content))])
  left, said = unsound(two, caplog, on_no_caption="skip")
  assert left[:6] == list(range(6)) and 6 < len(left) < 12
  assert left == list(range(len(left)))
  assert "1 are cut off" in said or "end too early" in said


def test_an_image_that_is_cut_off_is_named_and_left_out(two, caplog):
  path = two / "a-010.tar"
  write(path, [("x.txt", b"a text"), ("x.png", encoded(3) + bytes(9000))])
  path.write_bytes(path.read_bytes()[:5000])
  left, said = unsound(two, caplog, on_no_caption="skip")
  assert left == list(range(12))
  assert "1 are cut off, the first is x.png (a-010.tar)" in said


def test_a_broken_header_ends_a_shard_and_is_told(two, caplog):
  path = two / "a-008.tar"
  with tarfile.open(path) as tar:
    offset = tar.getmembers()[6].offset
  content = bytearray(path.read_bytes())
  content[offset : offset + 512] = os.urandom(512)
  path.write_bytes(content)
  left, said = unsound(two, caplog)
  assert left == [0, 1, 2, *range(6, 12)]
  assert "broken inside, the first is a-008.tar" in said


def test_links_and_devices_are_never_followed(two, caplog):
  rows = [("x.png", int(tarfile.SYMTYPE)), ("y.png", int(tarfile.LNKTYPE))]
  rows += [("z.png", int(tarfile.CHRTYPE)), ("d", int(tarfile.DIRTYPE))]
  write(two / "a-010.tar", [*rows, ("x.txt", b"no")])
  left, said = unsound(two, caplog)
  assert left == list(range(12)) and "3 are links or other things" in said


def test_a_corrupt_image_or_text_is_named_with_its_shard(tmp_path):
  png = encoded(1)
  rows = [("a.png", png[:40]), ("a.txt", b"a")]
  rows += [("b.png", png), ("b.txt", "ä".encode("latin-1"))]
  rows += [("c.png", png), ("c.json", b"{}"), ("d.png", png), ("d.json", b"{")]
  write(tmp_path / "s.tar", rows)
  source = opened(tmp_path / "s.tar")
  names = ("a.png in .*s.tar is corrupt", "b.txt in .*s.tar is no UTF-8",
    "c.json in .*caption_key", "d.json in .* is no JSON")  # fmt: skip
  for i, text in enumerate(names):
    with pytest.raises(sources.Corrupt, match=text):
      source[i]


def test_an_image_bomb_is_corrupt_before_it_is_decoded(tmp_path):
  file = io.BytesIO()
  PIL.Image.new("1", (9100, 9100)).save(file, "PNG")  # 10 kB.
  write(tmp_path / "s.tar", [("a.png", file.getvalue()), ("a.txt", b"a")])
  with pytest.raises(sources.Corrupt, match="82,810,000 pixels, more than"):
    opened(tmp_path / "s.tar")[0]


def test_a_compressed_shard_is_refused_with_the_remedy(two):
  with tarfile.open(two / "a.tar.gz", "w:gz"):
    pass
  with pytest.raises(errors.DataError, match="unpack it to a plain .tar"):
    opened(two / "a.tar.gz")


def test_a_shard_that_is_not_there_is_named(two):
  with pytest.raises(errors.DataError, match="1 of the shards.*a-010.tar"):
    opened(two / "a-{008..010}.tar")
  with pytest.raises(errors.DataError, match="not there"):
    opened(two / "b*.tar")


def test_patterns_expand_as_in_a_shell():
  assert webdataset.expand("a{08..11}.{x,y}") == [
    f"a{n}.{e}" for n in ("08", "09", "10", "11") for e in "xy"
  ]
  assert webdataset.expand("{9..10}") == ["9", "10"]
  assert webdataset.expand("plain") == ["plain"]


def test_a_negative_size_does_not_hang(tmp_path):
  write(tmp_path / "s.tar", members())
  content = bytearray((tmp_path / "s.tar").read_bytes())
  with tarfile.open(tmp_path / "s.tar") as tar:
    offset = tar.getmembers()[4].offset
  header = bytearray(content[offset : offset + 512])
  header[124:136] = b"\xff" * 4 + (2**64 - 4096).to_bytes(8, "big")
  header[148:156] = b" " * 8
  header[148:156] = b"%06o\0 " % sum(header)
  content[offset : offset + 512] = header
  (tmp_path / "s.tar").write_bytes(content)
  assert len(shards.of(str(tmp_path / "s.tar"), None)) == 2
