"""Images and masks that `sample` is given, of a network that is not trained."""

import pathlib
import struct
import types
import zlib

import jax
import numpy as np
import PIL.Image
import pytest

from flowjax import __main__ as door
from flowjax.commands import configs, edits, restored
from flowjax.data import images
from flowjax.train import parts

pytestmark = pytest.mark.usefixtures(
  "on_one_device", "traced_once", "hashed_by_numpy"
)

DIT = f"{pathlib.Path(__file__).parents[2]}/configs/digits_dit.py"
NF = DIT.replace("_dit", "_nf")
SMALL = {
  DIT: [
    "--config.model.patch_size=4",
    "--config.model.width=16",
    "--config.model.depth=1",
    "--config.model.heads=2",
    "--config.data.batch_size=16",
    "--config.mesh.data=1",
    "--config.mesh.fsdp=-1",
    "--config.sample.steps=4",
  ],
  NF: ["--config.model.width=16", "--config.model.depth=2"],
}
PAIRS = [
  "--config.data.pair_source=digits",
  "--config.flow.coupling.name=pairs",
]


def untrained(config=DIT, *words):
  run = parts.build(configs.load(config, [*SMALL[config], *words]))
  rng = np.random.default_rng(0)
  params = jax.tree.map(
    lambda leaf: 0.3 * rng.standard_normal(leaf.shape).astype(np.float32),
    run.abstract.params,
  )
  return restored.Restored(pathlib.Path("run"), run, 0, params, {})


@pytest.fixture(name="sample")
def _sample(tmp_path, monkeypatch):
  """Returns sample(*words, config=): the array that comes out, or exit code."""

  def sample(*words, config=DIT, keys=()):
    found = untrained(config, *keys)
    monkeypatch.setattr(restored, "open", lambda *args, **options: found)
    out = tmp_path / "out.npy"
    return door.main(
      ["sample", "--workdir=run", f"--out={out}", "--labels=1", *words]
    ) or np.load(out)

  return sample


@pytest.fixture(name="write")
def _write(tmp_path):
  """Returns write(name, pixels): the path of an image with these in 0..255."""

  def write(name, pixels):
    PIL.Image.fromarray(np.asarray(pixels, np.uint8)).save(tmp_path / name)
    return tmp_path / name

  return write


def steps_of(size):
  return np.linspace(0, 255, size[0] * size[1]).reshape(size)


@pytest.mark.slow
def test_images_are_cut_to_the_network_and_started_from(sample, write):
  one = write("one.png", np.pad(steps_of((8, 8)), ((0, 0), (2, 2))))
  two = write("two.jpg", np.full((24, 16, 3), 255))
  flags = [f"--init-image={one}", f"--init-image={two}"]
  noise = sample("--num=2", "--guidance=1", "--strength=1", *flags)
  plain = sample("--num=2", "--guidance=1")
  np.testing.assert_array_equal(noise, plain)
  near = sample(*flags, "--steps=1000", "--strength=0.002", "--guidance=1")
  wanted = steps_of((8, 8)).round() / 127.5 - 1
  assert np.abs(near[0, ..., 0] - wanted).mean() < 0.03
  assert np.abs(near[1] - 1).mean() < 0.03
  assert np.abs(noise - near).mean() > 0.1


@pytest.mark.slow(1)
def test_what_is_black_in_a_mask_stays_to_the_bit(sample, write):
  image = write("image.png", steps_of((8, 8)))
  mask_HW = np.zeros((8, 8))
  mask_HW[2:6, 1:4] = 255
  mask = write("mask.png", mask_HW)
  found = sample(f"--init-image={image}", f"--mask={mask}", "--num=3")
  wanted = (steps_of((8, 8)).astype(np.uint8) / np.float32(127.5) - 1)[None]
  known = mask_HW == 0
  np.testing.assert_array_equal(
    found[:, known, 0], np.broadcast_to(wanted[:, known], (3, known.sum()))
  )
  assert np.abs(found[..., 0] - wanted)[:, ~known].mean() > 0.1
  assert np.abs(found[0] - found[1])[~known].max() > 0.1


def test_a_latent_is_drawn_anew_where_its_mask_is_nearer_to_white(write):
  # The areas of two latents, of means 0.6 and 0.4.
  mask = write("mask.png", np.kron([[255, 204], [51, 0]], np.ones((2, 4))))
  reader = images.Reader((4, 8, 3), 100, originals=True)
  args = types.SimpleNamespace(mask=[mask], init_image=["a", "b"])
  found = edits._masks(args, reader, [(4, 8)] * 2, 4)
  np.testing.assert_array_equal(found[..., 0], [[[1.0, 0.0]]] * 2)


def test_a_flow_between_images_starts_from_them(sample, write):
  image = write("image.png", steps_of((8, 8)))
  flag = f"--init-image={image}"
  found = sample(
    flag, "--guidance=1", "--steps=1", "--solver=euler", keys=PAIRS
  )
  again = sample(
    flag, "--guidance=1", "--steps=1", "--solver=euler", "--seed=7", keys=PAIRS
  )
  np.testing.assert_array_equal(found, again)  # No noise is in it.
  assert sample(flag, "--strength=0.5", keys=PAIRS) == 2


@pytest.mark.parametrize(
  ("words", "code", "text"),
  [
    (["--strength=0.5"], 2, "name it by --init-image"),
    (["--mask=mask.png"], 2, "name it by --init-image"),
    (["--init-image=a.png", "--strength=0"], 2, "above 0 and at most 1"),
    (["--init-image=a.png", "--strength=1.2"], 2, "above 0 and at most 1"),
    (["--init-image=a.png", "--strength=x"], 2, "above 0 and at most 1"),
    (["--init-image=a.png", "--strength=1e-18"], 2, "of 4 steps leaves none"),
    (["--init-image=a.png", "--invert"], 2, "both say where to start"),
    (["--init-image=a.png", "--start=a.npy"], 2, "both say where to start"),
    (["--init-image=none.png"], 2, "none.png cannot be read"),
    (["--init-image=empty.png"], 3, "empty.png is corrupt: it is empty"),
    (["--init-image=cut.png"], 3, "cut.png is corrupt"),
    (["--init-image=cut.png"], 3, "Take a whole copy of it"),
    (["--init-image=bomb.png"], 3, "40x40 are 1,600 pixels, more than config"),
    (["--init-image=huge.png"], 3, "has 400,000,000 pixels, more than config"),
    (["--init-image=huge.png"], 3, "max_pixels=1,000. Make it smaller.\n"),
    (["--init-image=a.png", "--mask=wide.png"], 2, "wide.png is of 8x9, and"),
    (["--init-image=a.png", "--mask=cut.png"], 3, "--mask=cut.png is corrupt"),
    (["--init-image=a.png", *["--mask=a.png"] * 2], 2, "one for all, or one"),
  ],
)
def test_what_cannot_be_is_refused(
  sample, write, capsys, tmp_path, monkeypatch, words, code, text
):
  monkeypatch.chdir(tmp_path)
  write("a.png", steps_of((8, 8)))
  write("wide.png", steps_of((8, 9)))
  write("bomb.png", np.zeros((40, 40)))
  bomb = (tmp_path / "bomb.png").read_bytes()
  header = b"IHDR" + struct.pack(">II", 20_000, 20_000) + bomb[24:29]
  summed = header + struct.pack(">I", zlib.crc32(header))
  (tmp_path / "huge.png").write_bytes(bomb[:12] + summed + bomb[33:])
  (tmp_path / "empty.png").write_bytes(b"")
  (tmp_path / "cut.png").write_bytes((tmp_path / "a.png").read_bytes()[:60])
  keys = ["--config.data.max_pixels=1000"]
  assert sample(*words, keys=keys) == code
  assert text in capsys.readouterr().err


def test_a_normalizing_flow_has_no_way_to_start_on(sample, write, capsys):
  image = write("image.png", steps_of((8, 8)))
  assert sample(f"--init-image={image}", config=NF) == 2
  assert "no way on which to start" in capsys.readouterr().err


INPAINTING = [
  "--config.task.name=inpainting",
  "--config.model.context_channels=2",
]
SUPER = [
  "--config.task.name=super_resolution",
  "--config.task.factor=2",
  "--config.task.noise=0.1",
  "--config.model.context_channels=2",
]


@pytest.mark.slow(1)
def test_a_network_for_inpainting_is_told_mask_and_image(sample, write):
  image = write("image.png", steps_of((8, 8)))
  mask_HW = np.zeros((8, 8))
  mask_HW[:, 4:] = 255
  mask = write("mask.png", mask_HW)
  found = sample(f"--init-image={image}", f"--mask={mask}", keys=INPAINTING)
  pixels = steps_of((8, 8)).astype(np.uint8) / np.float32(127.5) - 1
  np.testing.assert_array_equal(found[0, :, :4, 0], pixels[:, :4])
  args = types.SimpleNamespace(init_image=[image], mask=[mask], strength=None)
  made = edits.read(args, untrained(DIT, *INPAINTING), None)
  assert made.strength == 1.0
  args.mask = None
  whole = edits.read(args, untrained(DIT, *INPAINTING), None)
  assert whole.strength == edits.STRENGTH
  assert np.all(whole.told(1)["context"][..., 0] == 1.0)
  told = made.told(2)["context"]
  np.testing.assert_array_equal(told[1, ..., 0], mask_HW / 255)
  wanted = np.where(mask_HW > 0, 0.0, pixels)
  np.testing.assert_array_equal(told[1, ..., 1], wanted)
  beside = made.beside(untrained(DIT, *INPAINTING).config.task, 2)
  np.testing.assert_array_equal(beside[0][1, ..., 0], np.float32(pixels))
  np.testing.assert_array_equal(beside[1][1, ..., 0], np.float32(wanted))


@pytest.mark.slow(1)
def test_a_network_for_super_resolution_is_told_the_small_image(
  sample, write, capsys
):
  image = write("image.png", np.full((4, 4), 255))
  args = types.SimpleNamespace(init_image=[image], mask=None, strength=None)
  made = edits.read(args, untrained(DIT, *SUPER), None)
  told = made.told(1)["context"]
  assert told.shape == (1, 8, 8, 2)
  np.testing.assert_allclose(told[..., 0], 1.0)
  np.testing.assert_array_equal(told[..., 1], 0.0)
  assert made.turns(1) == {}
  (beside,) = made.beside(untrained(DIT, *SUPER).config.task, 2)
  np.testing.assert_array_equal(beside, np.ones((2, 8, 8, 1)))
  assert sample(f"--init-image={image}", "--num=2", keys=SUPER).shape[0] == 2
  sheet = image.with_name("sheet.png")
  sample(f"--init-image={image}", "--num=2", f"--out={sheet}", keys=SUPER)
  pixels = np.asarray(PIL.Image.open(sheet))
  # On the left of each what it was told: white.
  assert (pixels[2:34, 2:34] == 255).all()
  assert pixels.shape == (36, 2 * (4 * (2 * 8 + 3) + 4), 3)
  assert sample(f"--init-image={image}", "--strength=1", keys=SUPER) == 2
  assert "this network makes --init-image larger" in capsys.readouterr().err
