"""Encoded records are read in any order, and what is not whole is refused."""

import json
import os
import pickle
import time

import numpy as np
import pytest

from flowjax import errors
from flowjax.data import (
  archive,
  archive_writing,
  arrayrecord,
  loader,
  records,
  sources,
)
from flowjax.data import config as config_lib

SHAPE = (4, 4, 2)
SPLITS = {"train": 21, "held_out": 4}


def plan_of(splits=None, per_shard=8) -> archive.Plan:
  layout = records.Layout(
    (
      records.Field("index", "int64"),
      records.Field("mean", "float16", SHAPE),
      records.Field("log_variance", "float16", SHAPE),
      records.Field("label", "int32"),
    )
  )
  about = {"shape": list(SHAPE), "class_names": list("abc"), "texts": None,
           "frozen": None, "data": {}}  # fmt: skip
  return archive.Plan(layout, splits or SPLITS, per_shard, about)


def values_of(numbers) -> dict[str, np.ndarray]:
  numbers = np.asarray(numbers)
  mean = numbers[:, None, None, None] + np.zeros(SHAPE)
  return {
    "index": numbers,
    "mean": mean,
    "log_variance": -mean,
    "label": numbers % 3,
  }


def write(folder, plan=None) -> archive.Index:
  plan = plan or plan_of()
  folder.mkdir(exist_ok=True)
  archive_writing.begin(folder, plan)
  for split, shard in plan.shards():
    with archive_writing.writing(folder, split, shard) as writer:
      writer.write(plan.layout.pack(values_of(plan.numbers(split, shard))))
  return archive_writing.finish(folder, plan)


def config_of(folder, **changes) -> config_lib.DataConfig:
  values = {"image_size": SHAPE[:2], "channels": SHAPE[2], "batch_size": 8}
  return config_lib.DataConfig(
    source=f"arrayrecord:{folder}", **{**values, **changes}
  )


@pytest.fixture
def folder(tmp_path):
  write(tmp_path / "made")
  return tmp_path / "made"


def test_records_come_one_by_one_and_at_once(folder):
  source = sources.open(config_of(folder), "train")
  assert (len(source), source.shape, source.num_classes) == (21, SHAPE, 3)
  # A source travels to the processes that read.
  again = pickle.loads(pickle.dumps(source))
  order = np.array([20, 0, 7, 8, 8, 15, 16, 3])
  batch = again.gather(order)
  assert batch.pop("skipped").tolist() == [0] * 8
  assert sorted(batch) == ["label", "log_variance", "mean"]
  assert batch["mean"].dtype == np.float16 and batch["label"].dtype == np.int32
  np.testing.assert_array_equal(batch["mean"][:, 0, 0, 0], order)
  for row, i in enumerate(order):
    one = source[int(i)]
    assert one.keys() == batch.keys() == source.blank.keys()
    for key, value in one.items():
      np.testing.assert_array_equal(value, batch[key][row])
  held = sources.open(config_of(folder), "held_out")
  assert held[3]["mean"][0, 0, 0] == 3 and len(held) == 4
  (last,) = list(loader.epoch_batches(held, 8))
  assert last["mask"].sum() == 4 and not last["mean"][4:].any()


def test_processes_read_the_batches_of_one(folder):
  """However many read, and wherever they go on, each row is the same."""
  config = config_of(folder)
  source = sources.open(config, "train")
  whole = loader.batches(source, config)
  want = [next(whole) for _ in range(6)]
  # An epoch holds each record once.
  seen = np.concatenate([batch["mean"][:, 0, 0, 0] for batch in want])[:21]
  assert sorted(seen) == list(range(21)) != list(seen)
  for count, start in ((2, 0), (4, 3)):
    parts = [
      loader.batches(source, config, start_step=start, rows=rows)
      for rows in np.split(np.arange(8), count)
    ]
    for step in range(start, 6):
      found = [next(part) for part in parts]
      for key in want[step]:
        joined = np.concatenate([part[key] for part in found])
        np.testing.assert_array_equal(joined, want[step][key])


@pytest.mark.parametrize(
  ("damage", "text"),
  [
    (lambda p: p.unlink(), "is missing"),
    (lambda p: p.write_bytes(b""), "has 0 bytes, and the index says"),
    (lambda p: p.write_bytes(p.read_bytes()[:100]), "has 100 bytes"),
  ],
)
def test_a_shard_that_is_not_whole_is_named(folder, damage, text):
  path = folder / archive.name("train", 1)
  damage(path)
  with pytest.raises(errors.DataError, match=f"{path.name} {text}"):
    sources.open(config_of(folder), "train")
  # The other split is whole.
  assert len(sources.open(config_of(folder), "held_out")) == 4


def test_an_index_that_is_none_is_named(folder, tmp_path):
  path, config = folder / archive.INDEX, config_of(folder)
  good = path.read_text()
  for text, message in (
    ("{", "index.json is damaged"),
    ("[]", "holds no JSON object"),
    ("{}", "index.json is damaged: 'shards'"),
    (good.replace('"format": 1', '"format": 9'), "its format is 9"),
    (good.replace('"float16"', '"object"', 1), "cannot be"),
  ):
    path.write_text(text)
    os.utime(path, (1, time.time() + len(text)))
    with pytest.raises(errors.DataError, match=message):
      sources.open(config, "train")
  path.unlink()
  with pytest.raises(errors.DataError, match="none of `flowjax encode`"):
    sources.open(config, "train")
  (folder / archive.PLAN).write_text("{}")
  with pytest.raises(errors.DataError, match="was not finished"):
    sources.open(config, "train")
  with pytest.raises(errors.DataError, match="There is no folder"):
    sources.open(config_of(tmp_path / "nowhere"), "train")
  with pytest.raises(errors.UserError, match="must be arrayrecord:<dir>"):
    sources.open(config_lib.DataConfig(source="arrayrecord:"), "train")


def test_a_corrupt_record_is_named_skipped_and_counted(folder, caplog):
  path = folder / archive.name("train", 1)
  content = bytearray(path.read_bytes())
  # The latents of record 8 + 3 = 11, which fill its bytes with one number.
  at = content.index(np.float16(11).tobytes() * 16)
  content[at] ^= 1
  path.write_bytes(content)
  config = config_of(folder)
  source = sources.open(config, "train")
  with pytest.raises(sources.Corrupt, match=f"Record 3 of .*{path.name}"):
    source[11]
  assert source[10]["mean"][0, 0, 0] == 10
  batches = loader.batches(source, config)
  epoch = [next(batches) for _ in range(3)]
  skipped = np.concatenate([batch["skipped"] for batch in epoch])[:21]
  numbers = np.concatenate([b["mean"][:, 0, 0, 0] for b in epoch])[:21]
  assert skipped.sum() == 1 and numbers[skipped == 1] == 12
  assert "Record 3 of" in caplog.text
  stop = loader.batches(source, config_of(folder, on_corrupt="stop"))
  with pytest.raises(errors.DataError, match="on_corrupt='skip'"):
    for _ in range(3):
      next(stop)


def test_what_does_not_suit_is_refused(folder):
  source = sources.open(config_of(folder), "train")
  with pytest.raises(errors.UserError, match="gives images of 4x4x2, but the"):
    sources.check(
      source, batch_size=8, num_classes=3, channels=16, image_size=(4, 4)
    )
  with pytest.raises(errors.UserError, match="a mirrored latent is not"):
    sources.open(config_of(folder, flip=True), "train")
  values = json.loads((folder / archive.INDEX).read_text())
  values["splits"]["held_out"], values["shards"]["held_out"] = 0, []
  (folder / archive.INDEX).write_text(json.dumps(values))
  with pytest.raises(errors.DataError, match="no records of the split 'held_"):
    sources.open(config_of(folder), "held_out")
  with pytest.raises(errors.UserError, match="has no captions"):
    source.captions([0])


def test_ten_million_records_open_in_seconds(tmp_path):
  """The same shard, a thousand times: what is opened is but the index."""
  each, count = 10_000, 1_000
  index = write(tmp_path / "one", plan_of({"train": each}, each))
  folder = tmp_path / "many"
  folder.mkdir()
  plan = plan_of({"train": each * count}, each)
  for number in range(count):
    os.link(
      tmp_path / "one" / archive.name("train", 0),
      folder / archive.name("train", number),
    )
  many = archive.Index(plan, {"train": index.shards["train"] * count})
  archive.write_json(folder / archive.INDEX, many.to_json())
  before = time.process_time()
  config = config_of(folder)
  source = sources.open(config, "train")
  batch = next(loader.batches(source, config))
  assert time.process_time() - before < 5.0
  assert len(source) == 10_000_000 and len(pickle.dumps(source)) < 2**20
  # Beside the index of a shard that is open, 8 bytes for each of its records.
  assert source.first_S.nbytes < 10_000
  position = int(np.flatnonzero(batch["mean"][:, 0, 0, 0] < 2**11)[0])
  assert batch["mean"][position, 0, 0, 0] % 3 == batch["label"][position]


def test_only_so_many_shards_are_open_at_once():
  assert 64 <= arrayrecord._reader.cache_parameters()["maxsize"] <= 4096
