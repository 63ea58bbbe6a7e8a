"""`flowjax encode`: what it writes, after whatever end, by however many."""

import dataclasses
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys

import numpy as np
import PIL.Image
import pytest

from flowjax import __main__ as door
from flowjax import errors
from flowjax.commands import encode
from flowjax.data import (
  archive,
  archive_writing,
  embeddings,
  scenes,
  sources,
)
from flowjax.data import config as config_lib
from flowjax.models import dit
from flowjax.train import experiment, lock

ROOT = pathlib.Path(__file__).parents[2]
CAPTIONS = ("a red 3", "eine rote 3", "लाल ३", "أحمر", "")


class Encoder:
  """Latents of half the size; each text encoder knows the letters."""

  parts = (
    embeddings.Part("one", (0, 2), (0, 3), (0, 2)),
    embeddings.Part("two", (2, 4), (0, 5), None),
  )

  def __init__(self, kill_after: int = 10**9, scale: float = 0.5):
    self.calls, self.kill_after, self.scale = 0, kill_after, scale

  def encode(self, image_BHWC):
    self.calls += 1
    if self.calls > self.kill_after:
      raise KeyboardInterrupt
    b, h, w, _ = image_BHWC.shape
    mean = image_BHWC.reshape(b, h // 2, 2, w // 2, 2, -1).mean(axis=(2, 4))
    return self.scale * mean, mean - 4.0

  def texts(self, captions):
    seeds = [sum(caption.encode()) for caption in captions]
    text = np.zeros((len(seeds), 4, 5), np.float32)
    text[:, :2, :3] = np.array(seeds)[:, None, None]
    text[:, 2:] = np.array(seeds)[:, None, None] + 1.0
    pooled = np.array(seeds, np.float32)[:, None] * np.ones(2, np.float32)
    return {"text": text, "pooled": pooled}

  def fingerprint(self):
    return {"vae": {"scaling_factor": self.scale}}


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
  """Twelve images of 8x8 with captions, of which one is broken."""
  root = tmp_path_factory.mktemp("photos")
  rng = np.random.default_rng(0)
  for i in range(12):
    pixels = rng.integers(0, 256, (8, 8, 3), np.uint8)
    PIL.Image.fromarray(pixels).save(root / f"{i:02d}.png")
    (root / f"{i:02d}.txt").write_text(CAPTIONS[i % 5], encoding="utf-8")
  (root / "05.png").write_bytes(b"no image")
  return root


def config_of(root, **changes) -> config_lib.DataConfig:
  values = {"image_size": (8, 8), "channels": 3, "held_out": 0.0}
  values |= {"on_no_caption": "empty", **changes}
  return config_lib.DataConfig(source=f"folder:{root}", **values)


def work_of(folder, config, encoder=None, *, shard_size=600, **options):
  options = {"dtype": None, "batch_size": 2, **options}
  folder.mkdir(exist_ok=True)
  splits = {"train": sources.open(config, "train")}
  return encode.begin(
    folder, splits, encoder, config, shard_size=shard_size, **options
  )


def reopened(folder, **changes):
  values = {"image_size": (8, 8), "channels": 3, **changes}
  config = config_lib.DataConfig(source=f"arrayrecord:{folder}", **values)
  return sources.open(config, "train")


def content(folder) -> dict[str, bytes]:
  return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_images_and_captions_are_as_they_were(photos, tmp_path):
  config = config_of(photos)
  index = encode.encode(work_of(tmp_path / "out", config))
  assert [f.dtype for f in index.plan.layout.fields] == ["int64", "uint8"]
  source, stored = sources.open(config, "train"), reopened(tmp_path / "out")
  assert len(stored) == len(source) - 1
  kept = [i for i in range(12) if i != 5]
  for i, j in enumerate(kept):
    np.testing.assert_array_equal(stored[i]["image"], source[j]["image"])
    assert stored[i]["caption"] == source[j]["caption"]
  assert stored.captions([0, 2, 3]) == ["a red 3", "लाल ३", "أحمر"]
  told = dict(tokenizer="bytes", tokens=16)
  tokens = reopened(tmp_path / "out", **told).gather(np.array([2, 10]))
  wanted = sources.open(config_of(photos, **told), "train")
  for row, j in enumerate((2, 11)):
    for key in ("token", "token_mask", "truncated"):
      np.testing.assert_array_equal(tokens[key][row], wanted[j][key])
  # The broken one is named, and counted.
  ((number, reason),) = index.shards["train"][1].failed
  assert number == 5 and "05.png is corrupt" in reason
  assert index.to_json()["failed"] == 1
  assert "1 records failed" in encode.summary(tmp_path / "out", index)


class Embedding(Encoder):
  """One that also says three numbers of an image."""

  embeds = 3

  def embed(self, image_BHWC):
    return image_BHWC.mean(axis=(1, 2))


def test_embeddings_and_boxes_are_stored(tmp_path):
  boxes = dict(boxes=3, box_names=scenes.NAMES, channels=3)
  config = config_lib.DataConfig(source="scenes", image_size=(32, 32), **boxes)
  source = scenes.of_digits(config, "train", "seen", length=3)
  (tmp_path / "out").mkdir()
  work = encode.begin(
    tmp_path / "out", {"train": source}, Embedding(), config,
    dtype="float32", batch_size=2, shard_size=10**6,
  )  # fmt: skip
  encode.encode(work)
  stored = reopened(tmp_path / "out", image_size=(16, 16), **boxes)
  batch, wanted = stored.gather(np.arange(3)), source.gather(np.arange(3))
  for key in ("boxes", "box_mask"):
    np.testing.assert_array_equal(batch[key], wanted[key])
  np.testing.assert_allclose(
    batch["embedding"], wanted["image"].mean(axis=(1, 2)), rtol=1e-5
  )
  for changes in (dict(boxes=4), dict(box_names=scenes.NAMES[::-1])):
    with pytest.raises(errors.UserError, match="has 3 boxes an image, of 60"):
      reopened(tmp_path / "out", image_size=(16, 16), **{**boxes, **changes})


def test_latents_and_texts_of_each_encoder(photos, tmp_path):
  config, encoder = config_of(photos), Encoder()
  encode.encode(work_of(tmp_path / "out", config, encoder, shard_size=10**6))
  stored = reopened(tmp_path / "out", image_size=(4, 4))
  assert stored.shape == (4, 4, 3) and stored.num_classes == 0
  names = stored.encoded.layout.names
  assert {"text.one", "text.two", "pooled.one"} < set(names)
  assert "pooled.two" not in names
  source, row = sources.open(config, "train"), stored[4]
  mean, log_variance = encoder.encode(source[4]["image"][None])
  np.testing.assert_array_equal(row["mean"], mean[0].astype(np.float16))
  np.testing.assert_array_equal(
    row["log_variance"], log_variance[0].astype(np.float16)
  )
  told = encoder.texts([source[4]["caption"]])
  for key in ("text", "pooled"):
    np.testing.assert_array_equal(row[key], told[key][0])
    np.testing.assert_array_equal(
      stored.encoded.empty[key], encoder.texts([""])[key][0]
    )
  # The size of a batch is no part of what is stored.
  other = work_of(
    tmp_path / "other", config, Encoder(), shard_size=10**6, batch_size=5
  )
  encode.encode(other)
  assert content(tmp_path / "out") == content(tmp_path / "other")


def test_a_kill_leaves_neither_holes_nor_doubles(photos, tmp_path):
  config, out = config_of(photos), tmp_path / "out"
  encode.encode(work_of(tmp_path / "straight", config, Encoder()))
  want = content(tmp_path / "straight")
  assert len(want) > 5
  lives = 0
  while not (out / archive.INDEX).exists():
    lives += 1
    # One call looks at the shapes; in a life a shard and a half are written.
    try:
      encode.encode(work_of(out, config, Encoder(kill_after=2 + lives % 3)))
    except KeyboardInterrupt:
      assert not list(out.glob("*.partial"))
  assert lives > 2 and content(out) == want
  # Nothing is left to do, and nothing is touched.
  before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
  encode.encode(work_of(out, config, Encoder(kill_after=1)))
  assert before == {path: path.stat().st_mtime_ns for path in out.iterdir()}


def test_however_many_processes_write_it_is_the_same(photos, tmp_path):
  config = config_of(photos)
  encode.encode(work_of(tmp_path / "one", config, Encoder()))
  out = tmp_path / "many"
  for count in (3, 2):
    work = work_of(out, config, Encoder())
    missing = archive_writing.missing(out, work.plan)
    for process in range(count):
      # Three begin, each with one shard; then there are two for the rest.
      mine = missing[process::count]
      work.write(mine[:1] if count == 3 else mine)
  assert not archive_writing.missing(out, work.plan)
  archive_writing.finish(out, work.plan)
  assert content(out) == content(tmp_path / "one")


KILLED = """
import os, signal, sys
from flowjax import __main__ as door
from flowjax.commands import encoding
write, shards = encoding.Work._write, []
def killed(self, writer, numbers, found):
  write(self, writer, numbers, found)
  shards.append(writer)
  if len(set(map(id, shards))) == 3:
    os.kill(os.getpid(), signal.SIGKILL)
encoding.Work._write = killed
sys.exit(door.main(sys.argv[1:]))
"""


def by_two(words):
  """Runs a command in two processes; returns how they ended, and all said."""
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
  count = r"--xla_force_host_platform_device_count=\d+"
  job = {
    **os.environ,
    "PYTHONPATH": str(ROOT),
    "XLA_FLAGS": re.sub(count, "", os.environ["XLA_FLAGS"]),
    "FLOWJAX_COORDINATOR": f"127.0.0.1:{port}",
    "FLOWJAX_PROCESSES": "2",
  }
  started = [
    subprocess.Popen(
      [sys.executable, "-m", "flowjax", *words],
      env={**job, "FLOWJAX_PROCESS": str(process)},
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )
    for process in range(2)
  ]
  texts = [process.communicate()[0] for process in started]
  return [process.returncode for process in started], texts


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_and_gone_on_with_by_two_processes(tmp_path, capsys):
  config = tmp_path / "config.py"
  config.write_text(
    "from flowjax.train import experiment\n"
    "def get_config():\n"
    "  c = experiment.defaults('dit')\n"
    "  c.data.source = 'digits'\n"
    "  return c\n"
  )

  def words(out):
    return ["encode", f"--config={config}", f"--out={tmp_path / out}",
            "--dtype=float32", "--shard_size=100KB"]  # fmt: skip

  done = subprocess.run(
    [sys.executable, "-c", KILLED, *words("out")],
    env={**os.environ, "PYTHONPATH": str(ROOT)},
    capture_output=True,
    text=True,
  )
  assert done.returncode == -signal.SIGKILL, done.stderr
  left = content(tmp_path / "out")
  assert archive.name("train", 1) in left and archive.INDEX not in left
  assert archive.name("train", 2) + ".partial" in left
  codes, said = by_two(words("out"))
  assert codes == [0, 0], said
  assert "2 of 5 shards are there" in said[0] and "2 of 5" in said[1]
  assert door.main(words("straight")) == 0
  assert content(tmp_path / "out") == content(tmp_path / "straight")
  assert door.main(["encode", "--verify", f"--out={tmp_path / 'out'}"]) == 0
  assert "held_out: 359 records" in capsys.readouterr().out
  digits = sources.open(config_lib.DataConfig(), "train")
  stored = reopened(tmp_path / "out", channels=1)
  every = np.arange(len(digits))
  found, wanted = stored.gather(every), digits.gather(every)
  np.testing.assert_array_equal(found["image"], wanted["image"])
  np.testing.assert_array_equal(found["label"], wanted["label"])
  assert stored.class_names == digits.class_names
  # Two cannot write into one folder.
  with lock.WorkdirLock(tmp_path / "out", flag="--out"):
    assert door.main(words("out")) == 2
  assert "is in use by process" in capsys.readouterr().err


def test_what_a_finished_folder_lost_is_written_again(photos, tmp_path):
  config, out = config_of(photos), tmp_path / "out"
  encode.encode(work_of(out, config, Encoder()))
  want = content(out)
  cut = out / archive.name("train", 1)
  cut.write_bytes(cut.read_bytes()[:-5])
  (out / archive.name("train", 2)).unlink()
  (out / archive.EMPTY).unlink()
  encode.encode(work_of(out, config, Encoder()))
  assert content(out) == want

  class Other(Encoder):
    """The same networks by name, on a device with other last digits."""

    def encode(self, image_BHWC):
      mean, log_variance = super().encode(image_BHWC)
      return mean * 1.01, log_variance

  class Blind(Encoder):
    def encode(self, image_BHWC):
      mean, log_variance = super().encode(image_BHWC)
      return np.nan * mean, log_variance

  cut.write_bytes(b"")
  for encoder, text in (
    (Other(), "where the index says .* a library has changed"),
    (Blind(), "It had . records, and now has 0 .Record . is not finite"),
  ):
    with pytest.raises(errors.DataError, match=text):
      encode.encode(work_of(out, config, encoder))
    # Nothing took its place.
    assert content(out) == {**want, cut.name: b""}
  (out / archive.INDEX).unlink()
  with pytest.raises(errors.UserError, match="Bring index.json back from a"):
    work_of(out, config, Encoder())


def test_another_command_into_the_folder_is_refused(photos, tmp_path):
  config, out = config_of(photos), tmp_path / "out"
  with pytest.raises(KeyboardInterrupt):
    encode.encode(work_of(out, config, Encoder(kill_after=2)))
  for changes in (
    {"encoder": Encoder(scale=0.7)},
    {"dtype": "bfloat16"},
    {"shard_size": 10**6},
    {"config": config_of(photos, max_pixels=1000)},
  ):
    given = {"config": config, "encoder": Encoder(), **changes}
    with pytest.raises(errors.UserError, match="something else than what") as e:
      work_of(out, **given)
    assert "plan." in str(e.value)
  (tmp_path / "full").mkdir()
  (tmp_path / "full" / "thesis.tex").touch()
  with pytest.raises(errors.UserError, match="'thesis.tex'"):
    work_of(tmp_path / "full", config)


def test_sizes_and_crops_of_the_originals(tmp_path):
  """A wide image, a high one, and one that a camera stored on its side."""
  photos = tmp_path / "in"
  for i, (size, turned) in enumerate(
    (((40, 20), False), ((10, 32), False), ((64, 16), True))
  ):
    exif = PIL.Image.Exif()
    exif[0x0112] = 6 if turned else 1
    image = PIL.Image.new("RGB", size)
    (photos / "class").mkdir(parents=True, exist_ok=True)
    image.save(photos / f"class/{i}.png", exif=exif)
  config = config_of(photos, originals=True)
  encode.encode(work_of(tmp_path / "out", config))
  stored = reopened(tmp_path / "out")
  sizes = [stored[i]["size"].tolist() for i in range(3)]
  crops = [stored[i]["crop"].tolist() for i in range(3)]
  # Scaled to 8x16, 26x8 (25.6) and, upright, 32x8: cut to 8x8 in the middle.
  assert sizes == [[20, 40], [32, 10], [64, 16]]
  assert crops == [[0, 4], [9, 0], [12, 0]]
  assert "size" not in sources.open(config_of(photos), "train")[0]


def test_latents_of_another_autoencoder_are_refused(
  photos, tmp_path, monkeypatch
):
  out = tmp_path / "out"
  encode.encode(work_of(out, config_of(photos), Encoder()))
  config = experiment.Experiment(
    pipeline="models/sd3",
    model=dit.DiTConfig(image_size=(4, 4), channels=3, patch_size=2),
    data=config_lib.DataConfig(
      source=f"arrayrecord:{out}", image_size=(4, 4), channels=3
    ),
  )
  opened = []

  def frozen(scale):
    return lambda folder: opened.append(folder) or Encoder(scale=scale)

  monkeypatch.setattr(encode, "frozen", frozen(0.5))
  with pytest.raises(errors.UserError, match="there is no folder"):
    encode.refuse_others(config, tmp_path)
  monkeypatch.chdir(tmp_path)
  (tmp_path / "models/sd3").mkdir(parents=True)
  encode.refuse_others(config, tmp_path / "runs")
  encode.refuse_others(config, tmp_path)
  assert opened == ["models/sd3", str(tmp_path / "models/sd3")]
  monkeypatch.setattr(encode, "frozen", frozen(0.7))
  with pytest.raises(errors.DataError, match="by other networks than") as error:
    encode.refuse_others(config, tmp_path)
  said = str(error.value)
  assert str(out) in said and "'models/sd3'" in said
  assert "frozen.vae.scaling_factor: 0.5 -> 0.7" in said
  encode.refuse_others(dataclasses.replace(config, pipeline=None), tmp_path)


def test_what_fails_is_counted_or_ends_it(photos, tmp_path):
  class Broken(Encoder):
    def encode(self, image_BHWC):
      mean, log_variance = super().encode(image_BHWC)
      mean[image_BHWC[:, 0, 0, 0] > 0.5] = np.nan
      return mean, log_variance

  config = config_of(photos)
  index = encode.encode(work_of(tmp_path / "a", config, Broken()))
  source = sources.open(config, "train")
  kept = [i for i in range(12) if i != 5]
  bad = [i for i in kept if source[i]["image"][0, 0, 0] > 0.5]
  failed = [i for s in index.shards["train"] for i, _ in s.failed]
  assert 0 < len(bad) < 11 and failed == sorted([5, *bad])
  stop = dataclasses.replace(config, on_corrupt="stop")
  with pytest.raises(errors.DataError, match="05.png is corrupt"):
    encode.encode(work_of(tmp_path / "b", stop))
  large = Encoder(scale=1e5)
  with pytest.raises(errors.UserError, match="Set --dtype=bfloat16"):
    encode.encode(work_of(tmp_path / "c", config, large))
  (tmp_path / "none").mkdir()
  for i in range(3):
    (tmp_path / "none" / f"{i}.png").write_bytes(b"")
    (tmp_path / "none" / f"{i}.txt").write_text("a")
  with pytest.raises(errors.DataError, match="All 3 records .* failed"):
    encode.encode(work_of(tmp_path / "d", config_of(tmp_path / "none")))


def test_a_disk_that_refuses_is_named(photos, tmp_path):
  """The second shard is to be written where there is a folder."""
  out = tmp_path / "out"
  work = work_of(out, config_of(photos))
  (out / f"{archive.name('train', 1)}.partial").mkdir()
  with pytest.raises(errors.UserError, match="cannot be written: .* goes on"):
    encode.encode(work)
  (out / f"{archive.name('train', 1)}.partial").rmdir()
  encode.encode(work)
  encode.encode(work_of(tmp_path / "straight", config_of(photos)))
  assert content(out) == content(tmp_path / "straight")


def test_what_has_no_images_is_refused(photos, tmp_path):
  config, out = config_of(photos), tmp_path / "out"
  encode.encode(work_of(out, config, Encoder()))
  values = {"image_size": (4, 4), "channels": 3, "held_out": 0.0}
  again = config_lib.DataConfig(source=f"arrayrecord:{out}", **values)
  with pytest.raises(errors.UserError, match="it holds latents already"):
    work_of(tmp_path / "again", again)
  pair = dataclasses.replace(again, pair_source=again.source)
  with pytest.raises(errors.UserError, match="with their variance, which are"):
    sources.open(pair, "train")
  pair = dataclasses.replace(config, pair_source=config.source)
  with pytest.raises(errors.UserError, match="encode each of the two"):
    work_of(tmp_path / "pair", pair)


def test_verify_names_what_is_wrong(photos, tmp_path, capsys):
  good = tmp_path / "good"
  encode.encode(work_of(good, config_of(photos), Encoder()))
  encode.verify(good)
  assert "Every byte is as it was written" in capsys.readouterr().out
  name = archive.name("train", 1)

  def flip(path):
    data = bytearray(path.read_bytes())
    data[200] ^= 1
    path.write_bytes(data)

  def twice(folder):
    """Writes a record twice, and what is known of the shard as it then is."""
    index = archive.read(folder)
    plan, shard = index.plan, index.shards["train"][1]
    reader = archive.library().ArrayRecordReader(str(folder / name))
    parts = reader.read_all()
    values = json.loads((folder / archive.INDEX).read_text())
    (folder / archive.INDEX).unlink()
    with archive_writing.writing(folder, "train", 1) as writer:
      writer.write([parts[0], *parts[:-1]])
    known = archive_writing.finished(folder, "train", 1)
    values["shards"]["train"][1] |= {
      "checksum": known.checksum, "bytes": known.bytes
    }  # fmt: skip
    (folder / archive.INDEX).write_text(json.dumps(values))
    assert plan.numbers("train", 1) and shard.records == len(parts)

  for damage, text in (
    (lambda f: (f / name).unlink(), f"{name} is missing"),
    (lambda f: (f / name).write_bytes(b""), f"{name} has 0 bytes"),
    (lambda f: flip(f / name), f"{name} has the checksum"),
    (lambda f: flip(f / archive.EMPTY), "empty.record is not what"),
    (lambda f: (f / "train-00099.array_record").touch(), "is no shard"),
    (twice, r"lacks 1 records of the source \(.*\), and has 1 twice"),
  ):
    bad = tmp_path / "bad"
    shutil.rmtree(bad, ignore_errors=True)
    shutil.copytree(good, bad)
    damage(bad)
    with pytest.raises(errors.DataError, match=text):
      encode.verify(bad)


def test_the_flags_are_looked_at(tmp_path, capsys):
  def said(*words):
    assert door.main(["encode", f"--out={tmp_path / 'out'}", *words]) in (2, 3)
    return capsys.readouterr().err

  config = str(ROOT / "configs/digits_dit.py")
  assert "--config is missing" in said()
  assert "--splits=test must be of" in said(
    f"--config={config}", "--splits=test"
  )
  assert "invalid choice: 'int8'" in said(f"--config={config}", "--dtype=int8")
  words = [f"--config={config}", "--config.data.held_out=0.0"]
  assert "Or leave it out: --splits=train" in said(*words)
  assert "correct --out" in said("--verify")
  assert not (tmp_path / "out").exists()
