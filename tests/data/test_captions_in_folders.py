"""Folders of images with captions: where those are, and what is refused."""

import itertools
import json
import os
import pickle

import numpy as np
import PIL.Image
import pytest

from flowjax import errors
from flowjax.data import config as config_lib
from flowjax.data import index, listing, loader, names, sources

SCRIPTS = ("ein Häuschen", "赤い家", "дом", "بيت أحمر", "🏠‍🔥", "ʻokina")


def config_of(root, **changes) -> config_lib.DataConfig:
  values = {"image_size": (4, 4), "channels": 3, "held_out": 0.0}
  return config_lib.DataConfig(source=f"folder:{root}", **(values | changes))


def opened(root, split="train", **changes):
  return sources.open(config_of(root, **changes), split)


def save(path, shade=0) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  PIL.Image.fromarray(np.full((4, 4, 3), shade, np.uint8)).save(path)


def write_list(path, rows) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  lines = [
    row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows
  ]
  path.write_bytes(b"\n".join(lines) + b"\n")


def captions_of(source) -> list[str]:
  return [source[i]["caption"] for i in range(len(source))]


@pytest.fixture
def beside(tmp_path):
  """An image and a text for each script, some in folders."""
  for i, text in enumerate(SCRIPTS):
    folder = tmp_path / "data" / ("", "deep/deeper")[i % 2]
    save(folder / f"{i}.png", i)
    (folder / f"{i}.txt").write_text(f"{text}\n", encoding="utf-8")
  return tmp_path / "data"


def test_captions_of_any_script_are_those_beside_the_images(beside):
  source = opened(beside)
  assert source.num_classes == 0 and source.class_names == ()
  order = [0, 2, 4, 1, 3, 5]  # Those in the root come first.
  assert captions_of(source) == [SCRIPTS[i] for i in order]
  shades = [round((source[i]["image"][0, 0, 0] + 1) * 127.5) for i in range(6)]
  assert shades == order


def test_captions_come_in_batches_with_their_images(beside):
  config = config_of(beside, batch_size=6)
  batch = next(loader.batches(sources.open(config, "train"), config))
  assert sorted(batch["caption"].tolist()) == sorted(SCRIPTS)
  for image, caption in zip(batch["image"], batch["caption"], strict=True):
    assert SCRIPTS[round((image[0, 0, 0] + 1) * 127.5)] == caption
  held = list(loader.epoch_batches(sources.open(config, "train"), 4))
  assert held[1]["caption"].tolist()[2:] == ["", ""]  # What fills it up.


@pytest.mark.parametrize("name", listing.LISTS)
def test_captions_of_a_list_are_found_by_the_name_of_the_file(tmp_path, name):
  for i in range(6):
    save(tmp_path / f"sub/{i}.png", i)
  rows = [{"file_name": f"{i}.png", "text": SCRIPTS[i]} for i in range(6)]
  rows[0] = b"\xef\xbb\xbf" + json.dumps(rows[0]).encode()  # As some editors.
  write_list(tmp_path / "sub" / name, [*rows[::-1], b"  "])
  assert captions_of(opened(tmp_path)) == list(SCRIPTS)

  (tmp_path / "sub" / name).unlink()  # From above, with longer names.
  rows = [{"file_name": f"sub/{i}.png", "said": SCRIPTS[i]} for i in range(6)]
  write_list(tmp_path / name, rows)
  assert captions_of(opened(tmp_path, caption_key="said")) == list(SCRIPTS)


def test_lists_and_texts_at_once_are_refused(beside):
  write_list(beside / "metadata.jsonl", [{"file_name": "0.png", "text": "x"}])
  with pytest.raises(errors.DataError, match="6 .txt files.*keep one of both"):
    opened(beside)


def test_what_could_be_labels_or_captions_must_be_said(tmp_path):
  for name in "ab":
    save(tmp_path / name / "x.png")
  (tmp_path / "a/x.txt").write_text("a caption")
  (tmp_path / "b/x.txt").write_text("another")
  with pytest.raises(errors.DataError, match="captions=True.*or False"):
    opened(tmp_path)
  assert captions_of(opened(tmp_path, captions=True)) == [
    "a caption",
    "another",
  ]
  assert opened(tmp_path, captions=False).class_names == ("a", "b")


def test_captions_that_are_asked_for_must_be_there(tmp_path):
  save(tmp_path / "a/x.png")
  (tmp_path / "a/notes.txt").write_text("of no image")
  with pytest.raises(errors.DataError, match="no captions in .*captions=False"):
    opened(tmp_path, captions=True)


def test_images_deeper_than_a_class_are_told_and_left_out(tmp_path, caplog):
  save(tmp_path / "a/x.png")
  save(tmp_path / "a/small/x.png")
  save(tmp_path / "b/x.png")
  source = opened(tmp_path)
  assert [source.file(i) for i in range(len(source))] == ["a/x.png", "b/x.png"]
  assert [int(source[i]["label"]) for i in range(2)] == [0, 1]
  assert "1 images lie in folders inside" in caplog.text


@pytest.mark.parametrize("kind", ["beside", "list"])
@pytest.mark.parametrize(
  "policy, expected",
  [("empty", ["zero", "", "two"]), ("skip", ["zero", "two"]), ("stop", None)],
)
def test_an_image_without_a_caption(tmp_path, kind, policy, expected, caplog):
  texts = {"0.png": "zero", "2.png": "two"}
  for i in range(3):
    save(tmp_path / f"{i}.png")
  if kind == "list":
    rows = [{"file_name": name, "text": text} for name, text in texts.items()]
    rows += [{"file_name": "1.png", "text": None}]
    write_list(tmp_path / "metadata.jsonl", rows)
  else:
    for name, text in texts.items():
      (tmp_path / name).with_suffix(".txt").write_text(text)

  if expected is None:
    with pytest.raises(errors.DataError, match="1 of 3.*1.png.*'skip'"):
      opened(tmp_path, on_no_caption=policy)
  else:
    source = opened(tmp_path, on_no_caption=policy)
    assert captions_of(source) == expected
    assert "1 of 3 images" in caplog.text and "1.png" in caplog.text
    assert "those of the split 'train'" in caplog.text


def test_a_text_of_another_encoding_is_named_skipped_and_counted(beside):
  (beside / "2.txt").write_bytes("Häuschen".encode("latin-1"))
  config = config_of(beside, batch_size=6)
  source = sources.open(config, "train")
  with pytest.raises(sources.Corrupt, match="2.txt is no UTF-8.*byte 1"):
    source[1]
  (batch,) = itertools.islice(loader.batches(source, config), 1)
  assert batch["skipped"].sum() == 1
  with pytest.raises(errors.DataError, match="on_corrupt='skip'"):
    config = config_of(beside, batch_size=6, on_corrupt="stop")
    next(loader.batches(source, config))


@pytest.mark.parametrize(
  "line, why",
  [
    (b"no json", "Expecting value"),
    (b'{"text": "of nothing"}', "file_name"),
    (b'["0.png", "text"]', "file_name"),
    (b'{"file_name": "1.png", "text": 3}', "'text' is int"),
    (b'{"file_name": "1.png", "text": ["a", "b"]}', "'text' is list"),
    ('{"file_name": "1.png", "text": "ä"}'.encode("latin-1"), "utf-8"),
  ],
)
def test_a_broken_line_is_named_and_left_out(tmp_path, line, why, caplog):
  for i in range(2):
    save(tmp_path / f"{i}.png")
  rows = [{"file_name": "0.png", "text": "zero"}, line]
  write_list(tmp_path / "metadata.jsonl", rows)
  assert captions_of(opened(tmp_path, on_no_caption="skip")) == ["zero"]
  assert "line 2" in caplog.text and why in caplog.text
  with pytest.raises(errors.DataError, match="line 2"):
    opened(tmp_path, on_corrupt="stop")


def test_captions_of_no_image_and_second_ones_are_counted(tmp_path, caplog):
  save(tmp_path / "0.png")
  rows = [
    {"file_name": name, "text": text}
    for name, text in [("0.png", "first"), ("0.png", "again"), ("9.png", "no")]
  ]
  write_list(tmp_path / "metadata.jsonl", rows)
  assert captions_of(opened(tmp_path)) == ["first"]
  assert "2 of the 3 captions" in caplog.text


@pytest.mark.parametrize("name", ["/etc/x.png", "../x.png", "a\\x.png"])
def test_a_name_outside_the_folder_is_refused(tmp_path, name):
  save(tmp_path / "0.png")
  write_list(tmp_path / "metadata.jsonl", [{"file_name": name, "text": "x"}])
  with pytest.raises(errors.DataError, match="does not lie below"):
    opened(tmp_path)


def test_the_fingerprint_tells_captions_from_labels(tmp_path):
  for name in "ab":
    save(tmp_path / name / "x.png")
    (tmp_path / name / "x.txt").write_text("caption")
  told, labelled = (opened(tmp_path, captions=c) for c in (True, False))
  assert told.fingerprint()["captions"] is True
  assert labelled.fingerprint()["classes"] == ["a", "b"]
  assert told.fingerprint()["hash"] == labelled.fingerprint()["hash"]


def test_a_folder_that_links_to_itself_ends(tmp_path):
  save(tmp_path / "a/x.png")
  os.symlink(tmp_path, tmp_path / "a/loop")
  assert len(opened(tmp_path)) == 1


# The listing that is kept.


def age(root) -> None:
  """Makes all that lies there older than a tick of any clock."""
  for folder, _, _ in os.walk(root):
    os.utime(folder, ns=(10**18, 10**18))


def test_a_listing_is_kept_until_a_folder_changes(beside, tmp_path):
  kept = tmp_path / "kept"
  kept.mkdir()
  config = config_of(beside, index_dir=str(kept))
  first = sources.open(config, "train")
  assert not list(kept.iterdir())  # A change just now might go unseen.

  age(beside)
  again = sources.open(config, "train")
  assert len(list(kept.iterdir())) == 1
  third = sources.open(config, "train")
  assert third.listing.arrays.path and third.listing.arrays.path == str(
    next(kept.iterdir())
  )
  for source in (again, third, pickle.loads(pickle.dumps(third))):
    assert captions_of(source) == captions_of(first)
    assert source.fingerprint() == first.fingerprint()

  save(beside / "deep/6.png")
  (beside / "deep/6.txt").write_text("new")
  assert "new" in captions_of(sources.open(config, "train"))


def test_a_kept_listing_ends_with_its_list_of_captions(tmp_path):
  save(tmp_path / "data/0.png")
  path = tmp_path / "data/metadata.jsonl"
  config = config_of(tmp_path / "data", index_dir=str(tmp_path / "kept"))
  for text in ("one", "another"):
    write_list(path, [{"file_name": "0.png", "text": text}])
    age(tmp_path / "data")
    assert captions_of(sources.open(config, "train")) == [text]


def test_what_a_worker_gets_is_the_path_of_the_listing(beside, tmp_path):
  config = config_of(beside, index_dir=str(tmp_path / "kept"))
  age(beside)
  for i in range(200):
    (beside / f"more_{i}").mkdir()
    save(beside / f"more_{i}/{'x' * 100}.png")
  config = config_of(
    beside, index_dir=str(tmp_path / "kept"), on_no_caption="empty"
  )
  age(beside)
  source = sources.open(config, "train")
  assert len(pickle.dumps(source.listing.arrays)) < 300


@pytest.mark.parametrize(
  "spoil", [lambda c: b"", lambda c: c[:-1], lambda c: b"x"]
)
def test_a_broken_index_is_made_anew(beside, tmp_path, spoil):
  kept = tmp_path / "kept"
  config = config_of(beside, index_dir=str(kept))
  age(beside)
  expected = captions_of(sources.open(config, "train"))
  (path,) = kept.iterdir()
  path.write_bytes(spoil(path.read_bytes()))
  assert captions_of(sources.open(config, "train")) == expected
  assert index.load(str(path), {}) is not None


def test_an_index_that_cannot_be_written_says_where_else(beside, tmp_path):
  (tmp_path / "kept").write_text("a file")
  age(beside)
  with pytest.raises(errors.DataError, match="config.data.index_dir"):
    opened(beside, index_dir=str(tmp_path / "kept"))


def test_an_index_within_what_it_lists_is_refused(beside):
  with pytest.raises(errors.UserError, match="index_dir.* lies within"):
    opened(beside, index_dir=str(beside / "kept"))


def test_names_come_back_and_hash_as_those_that_are_chosen():
  rng = np.random.default_rng(0)
  many = ["é" * int(rng.integers(0, 9)) + str(i) for i in range(1000)] + [
    "\udcff no utf-8"
  ]
  built = names.Builder()
  built.extend(many[:400])
  built.extend(many[400:])
  found = built.done()
  assert list(found) == many and len(names.Builder().done()) == 0

  rows = np.flatnonzero(rng.random(len(many)) < 0.3)
  alone = names.Builder()
  alone.extend(many[i] for i in rows)
  every = np.arange(len(rows))
  assert found.hash(rows) == alone.done().hash(every)
  assert found.hash(rows) != found.hash(rows[1:])
