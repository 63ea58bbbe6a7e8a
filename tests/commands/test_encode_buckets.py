"""`flowjax encode` into aspect buckets, and training's batches of them."""

import itertools
import json
import shutil

import numpy as np
import PIL.Image
import pytest

from flowjax import __main__ as door
from flowjax import errors
from flowjax.commands import encode
from flowjax.data import archive, arrayrecord, loader, sources
from flowjax.data import config as config_lib

SIZES = {"8x8": (40, 40), "6x10": (24, 40), "10x6": (50, 30)}
PIXELS = ((8, 8), (6, 10), (10, 6))
LATENTS = ((4, 4), (3, 5), (5, 3))


class Encoder:
  """Latents of half the size; a text is how many letters it has."""

  def __init__(self, kill_after: int = 10**9, vae="halves", empty: int = 0):
    self.calls, self.kill_after = 0, kill_after
    self.vae, self.empty = vae, empty

  def encode(self, image_BHWC):
    self.calls += 1
    if self.calls > self.kill_after:
      raise KeyboardInterrupt
    b, h, w, _ = image_BHWC.shape
    mean = image_BHWC.reshape(b, h // 2, 2, w // 2, 2, -1).mean(axis=(2, 4))
    return mean, mean - 4.0

  def texts(self, captions):
    count_B = np.array([len(c) or self.empty for c in captions], np.float32)
    return {
      "text": np.broadcast_to(count_B[:, None, None], (len(count_B), 2, 3)),
      "pooled": np.broadcast_to(count_B[:, None], (len(count_B), 2)),
    }

  def fingerprint(self):
    return {"vae": self.vae}


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
  """Fifteen captioned images of three aspects."""
  root = tmp_path_factory.mktemp("photos")
  for i in range(15):
    height, width = list(SIZES.values())[i % 3]
    pixels = np.full((height, width, 3), 10 * i, np.uint8)
    PIL.Image.fromarray(pixels).save(root / f"{i:02d}.png")
    (root / f"{i:02d}.txt").write_text("x" * i)
  return root


def config_of(root, **changes) -> config_lib.DataConfig:
  values = {
    "source": f"folder:{root}", "image_size": (8, 8), "channels": 3,
    "buckets": PIXELS, "held_out": 0.0, "batch_size": 2, "originals": True,
  }  # fmt: skip
  return config_lib.DataConfig(**(values | changes))


def encoded(folder, config, encoder, splits=("train",)):
  folder.mkdir(exist_ok=True)
  opened = {split: sources.open(config, split) for split in splits}
  works = [
    encode.begin(
      place, parts, encoder, alone, dtype=None, shard_size=400, batch_size=2
    )
    for place, parts, alone in encode.by_bucket(folder, opened, config)
  ]
  return [encode.encode(work) for work in works]


def content(folder) -> dict[str, bytes]:
  return {
    str(path.relative_to(folder)): path.read_bytes()
    for path in folder.rglob("*")
    if path.is_file()
  }


def latents_of(folder, **changes) -> config_lib.DataConfig:
  values = {"source": f"arrayrecord:{folder}", "image_size": (4, 4)}
  return config_of("", **{**values, "buckets": LATENTS, **changes})


def test_each_bucket_has_a_folder_and_training_has_batches_of_one(
  photos, tmp_path
):
  out = tmp_path / "out"
  encoded(out, config_of(photos), Encoder())
  assert {p.name for p in out.iterdir()} == {archive.BUCKETS, *SIZES}
  config = latents_of(out)
  source = sources.open(config, "train")
  assert source.shape == (4, 4, 3) and source.name == "arrayrecord:out"
  assert [part.shape[:2] for part in source.parts] == list(LATENTS)
  assert [len(part) for part in source.parts] == [5, 5, 5]
  assert source.blank["mean"].shape == (4, 4, 3)
  assert source.blank["text"].shape == (2, 3)
  wanted = sources.open(config_of(photos), "train")
  for part, whole in zip(source.parts, wanted.parts, strict=True):
    for i in range(5):
      image_BHWC = whole[i]["image"][None]
      mean_BHWC, _ = Encoder().encode(image_BHWC)
      np.testing.assert_array_equal(
        part[i]["mean"], mean_BHWC[0].astype(np.float16)
      )
      assert (part[i]["text"] == len(whole[i]["caption"])).all()
      assert part[i]["size"].tolist() == whole[i]["size"].tolist()
  seen = [
    batch["mean"].shape
    for batch in itertools.islice(loader.batches(source, config), 40)
  ]
  assert {(2, *size, 3) for size in LATENTS} == set(seen)
  # Of all, one knows what is the same in each: here that of the reference.
  known = arrayrecord.of(config)
  assert known.shape == (4, 4, 3) and known.empty["text"].shape == (2, 3)


def test_a_kill_leaves_neither_holes_nor_doubles(photos, tmp_path):
  config, out = config_of(photos), tmp_path / "out"
  encoded(tmp_path / "straight", config, Encoder())
  lives = 0
  while True:
    lives += 1
    # Three calls look at the shapes; in a life a few images are encoded.
    try:
      encoded(out, config, Encoder(kill_after=6))
      break
    except KeyboardInterrupt:
      with pytest.raises(errors.DataError, match="encoding was not finished"):
        sources.open(latents_of(out), "train")
  assert lives > 3 and content(out) == content(tmp_path / "straight")


def test_what_is_not_of_these_buckets_is_refused(photos, tmp_path):
  out, config = tmp_path / "out", config_of(photos)
  encoded(out, config, Encoder())
  with pytest.raises(errors.UserError, match="holds the buckets 8x8, 6x10, 10"):
    encoded(out, config_of(photos, buckets=PIXELS[:2]), Encoder())
  with pytest.raises(errors.UserError, match="something else than what"):
    encoded(out, config_of(photos, max_pixels=10**6), Encoder())
  # By the size of a batch buckets are merged.
  with pytest.raises(errors.UserError, match="data.batch_size: 2 -> 3"):
    encoded(out, config_of(photos, batch_size=3), Encoder())
  with pytest.raises(errors.UserError, match="batch_size says which are merg"):
    encoded(out, config_of(photos, batch_size=6), Encoder())
  with pytest.raises(errors.UserError, match="is not empty .'10x6'"):
    encoded(out, config_of(photos, buckets=()), Encoder())
  one = tmp_path / "one"
  encoded(one, config_of(photos, buckets=()), Encoder())
  with pytest.raises(errors.UserError, match="no buckets.json: choose an"):
    encoded(one, config, Encoder())
  with pytest.raises(errors.UserError, match="are all of one size"):
    sources.open(latents_of(one), "train")
  for changes in ({"buckets": ()}, {"buckets": LATENTS[:2]}, {"channels": 4}):
    with pytest.raises(errors.UserError, match="are not those of .*3, 5, 3"):
      sources.open(latents_of(out, **changes), "train")
  # A bucket of the config may be of nobody.
  more = sources.open(latents_of(out, buckets=(*LATENTS, (2, 7))), "train")
  assert len(more.parts) == 3


@pytest.mark.parametrize(
  "other, text",
  [
    (Encoder(vae="thirds"), "records.frozen.vae: 'halves' -> 'thirds'"),
    (Encoder(empty=7), "records.empty: the embedded empty caption"),
    (None, "records.fields.mean: 'float16' -> None"),
  ],
)
def test_buckets_that_others_encoded_are_refused(photos, tmp_path, other, text):
  ours, theirs, config = tmp_path / "a", tmp_path / "b", config_of(photos)
  encoded(ours, config, Encoder())
  encoded(theirs, config, other)
  shutil.rmtree(ours / "10x6")
  shutil.copytree(theirs / "10x6", ours / "10x6")
  if other is None:  # Pixels have twice the size of latents.
    path = ours / "10x6" / archive.INDEX
    values = json.loads(path.read_text())
    values["about"]["shape"] = [5, 3, 3]
    path.write_text(json.dumps(values))
  with pytest.raises(errors.DataError, match="not encoded alike") as error:
    sources.open(latents_of(ours), "train")
  said = str(error.value)
  assert text in said and str(ours / "8x8") in said and "(8x8 -> 10x6)" in said


def test_the_command_encodes_and_verifies(photos, tmp_path, capsys):
  config = tmp_path / "config.py"
  config.write_text(
    "from flowjax.train import experiment\n"
    "def get_config():\n"
    "  c = experiment.defaults('dit')\n"
    f"  c.data.update(source='folder:{photos}', image_size=(8, 8), channels=3,"
    f" buckets={PIXELS}, held_out=0.3, batch_size=2)\n"
    "  return c\n"
  )
  out = tmp_path / "out"
  words = ["encode", f"--config={config}", f"--out={out}"]
  assert door.main(words) == 0
  assert "8x8: train:" in capsys.readouterr().out
  assert door.main(["encode", "--verify", f"--out={out}"]) == 0
  assert capsys.readouterr().out.count("Every byte is as it was") == 3
  values = {"buckets": PIXELS, "image_size": (8, 8), "held_out": 0.3}
  stored = latents_of(out, **values)
  original = config_of(photos, held_out=0.3)
  count = 0
  for split in ("train", "held_out"):
    one, two = sources.open(stored, split), sources.open(original, split)
    assert len(one.parts) == len(two.parts)
    for part, whole in zip(one.parts, two.parts, strict=True):
      for i in range(len(whole)):
        count += 1
        np.testing.assert_array_equal(part[i]["image"], whole[i]["image"])
  assert count == 15
  broken = next((out / "6x10").glob("train*"))
  broken.write_bytes(b"")
  assert door.main(["encode", "--verify", f"--out={out}"]) == 3
  assert "0 bytes" in capsys.readouterr().err
  index = json.loads((out / "6x10" / archive.INDEX).read_text())
  assert index["about"]["data"]["image_size"] == [6, 10]
  assert door.main(words) == 0
  assert door.main(["encode", "--verify", f"--out={out}"]) == 0
  (out / archive.BUCKETS).unlink()
  assert door.main(words) == 2
  assert "has no buckets.json: bring that back" in capsys.readouterr().err
