import os
import warnings

import numpy as np
import PIL.Image
import pytest

from flowjax import errors
from flowjax.data import config as config_lib
from flowjax.data import sources

WHITE, BLACK = 1.0, -1.0


def config_of(root, **changes) -> config_lib.DataConfig:
  values = {"image_size": (8, 8), "channels": 3, "held_out": 0.0}
  return config_lib.DataConfig(source=f"folder:{root}", **(values | changes))


def save(root, name: str, pixels, mode=None, **options) -> None:
  path = root / name
  path.parent.mkdir(parents=True, exist_ok=True)
  image = PIL.Image.fromarray(np.asarray(pixels, np.uint8), None)
  (image.convert(mode) if mode else image).save(path, **options)


def fill(root, classes: dict[str, int]) -> None:
  rng = np.random.default_rng(0)
  for name, count in classes.items():
    for i in range(count):
      save(root, f"{name}/{i:03d}.png", rng.integers(0, 256, (8, 8, 3)))


def files_of(source) -> tuple[str, ...]:
  return tuple(source.file(i) for i in range(len(source)))


def read_one(root, **changes) -> np.ndarray:
  source = sources.open(config_of(root, **changes), "train")
  (example,) = [source[i] for i in range(len(source))]
  return example["image"]


def test_the_pixels_of_a_png_come_through_unchanged(tmp_path):
  pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3))
  save(tmp_path, "a/x.png", pixels)

  image_HWC = read_one(tmp_path)

  assert image_HWC.dtype == np.float32
  np.testing.assert_allclose(image_HWC, pixels / 127.5 - 1, atol=1e-6)


@pytest.mark.parametrize("ending", ["png", "jpg", "jpeg", "webp", "PNG"])
@pytest.mark.parametrize("size", [(8, 8), (7, 31), (64, 20), (1, 1)])
def test_every_format_and_size_gives_the_same_shape(tmp_path, ending, size):
  save(tmp_path, f"a/x.{ending}", np.full((*size, 3), 102))

  image_HWC = read_one(tmp_path, image_size=(8, 12))

  assert image_HWC.shape == (8, 12, 3)
  np.testing.assert_allclose(image_HWC, 102 / 127.5 - 1, atol=0.03)


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "LA", "1", "CMYK"])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_mode_becomes_grey_or_rgb(tmp_path, mode, channels):
  ending = "jpg" if mode == "CMYK" else "png"
  pixels = np.zeros((8, 8, 3))
  pixels[:4] = 255
  save(tmp_path, f"a/x.{ending}", pixels, mode)

  image_HWC = read_one(tmp_path, channels=channels)

  assert image_HWC.shape == (8, 8, channels)
  np.testing.assert_allclose(image_HWC[:3], WHITE, atol=0.02)
  np.testing.assert_allclose(image_HWC[5:], BLACK, atol=0.02)


def test_what_is_transparent_becomes_white(tmp_path):
  pixels = np.zeros((8, 8, 4))
  pixels[:4, :, 3] = 255  # The upper half is black, the lower one clear.
  save(tmp_path, "a/x.png", pixels)

  image_HWC = read_one(tmp_path)

  np.testing.assert_array_equal(image_HWC[:4], BLACK)
  np.testing.assert_array_equal(image_HWC[4:], WHITE)


def test_sixteen_bits_are_scaled_and_not_clipped(tmp_path):
  (tmp_path / "a").mkdir()
  ramp = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
  PIL.Image.fromarray(ramp).save(tmp_path / "a/x.png")

  image_HWC = read_one(tmp_path, channels=1)

  np.testing.assert_allclose(
    image_HWC.ravel(), np.linspace(-1, 1, 64), atol=0.01
  )


def test_the_crop_is_the_middle_of_the_long_side(tmp_path):
  pixels = np.zeros((8, 24, 3))
  pixels[:, 8:16] = 255
  save(tmp_path, "a/wide.png", pixels)
  np.testing.assert_array_equal(read_one(tmp_path), WHITE)

  save(tmp_path, "a/wide.png", np.swapaxes(pixels, 0, 1))  # Now it is tall.
  np.testing.assert_array_equal(read_one(tmp_path), WHITE)


def test_a_photograph_is_turned_upright(tmp_path):
  pixels = np.zeros((8, 8, 3))
  pixels[:, :4] = 255  # The left half is white.
  exif = PIL.Image.Exif()
  exif[0x0112] = 6  # To be seen, turn by 90 degrees clockwise.
  save(tmp_path, "a/x.png", pixels, exif=exif)

  image_HWC = read_one(tmp_path)

  np.testing.assert_array_equal(image_HWC[:4], WHITE)
  np.testing.assert_array_equal(image_HWC[4:], BLACK)


def test_labels_follow_the_sorted_class_names(tmp_path):
  for name, value in (("b", 200), ("a", 100), ("C", 0)):
    for file in ("2.png", "10.png"):
      save(tmp_path, f"{name}/{file}", np.full((8, 8, 3), value))
  (tmp_path / ".hidden").mkdir()
  (tmp_path / "a/notes.txt").write_text("not an image")

  source = sources.open(config_of(tmp_path), "train")

  assert source.class_names == ("C", "a", "b") and source.num_classes == 3
  order = ("C/10.png", "C/2.png", "a/10.png", "a/2.png", "b/10.png", "b/2.png")
  assert files_of(source) == order
  assert [int(source[i]["label"]) for i in range(6)] == [0, 0, 1, 1, 2, 2]
  seen = [
    round(float((source[i]["image"][0, 0, 0] + 1) * 127.5)) for i in (0, 2, 4)
  ]
  assert seen == [0, 100, 200]


def test_the_splits_are_disjoint_complete_and_stable(tmp_path):
  fill(tmp_path, {"a": 40, "b": 40})
  config = config_of(tmp_path, held_out=0.25)

  def files():
    return [
      set(files_of(sources.open(config, split))) for split in sources.SPLITS
    ]

  train, held = files()
  assert not train & held and len(train | held) == 80
  assert 10 <= len(held) <= 30

  fill(tmp_path, {"c": 20, "a": 41})
  more_train, more_held = files()
  assert train < more_train and held <= more_held


def test_the_fingerprint_changes_with_the_list_of_files(tmp_path):
  fill(tmp_path, {"a": 3, "b": 3})
  before = sources.open(config_of(tmp_path), "train").fingerprint()
  assert before == sources.open(config_of(tmp_path), "train").fingerprint()

  os.rename(tmp_path / "a/001.png", tmp_path / "a/009.png")
  after = sources.open(config_of(tmp_path), "train").fingerprint()

  assert after["records"] == before["records"] == 6
  assert after["hash"] != before["hash"]


def refused(root, **changes) -> str:
  with pytest.raises(errors.DataError) as caught:
    sources.open(config_of(root, **changes), "train")
  return str(caught.value)


def test_a_folder_that_is_not_there_is_named(tmp_path):
  assert str(tmp_path / "nowhere") in refused(tmp_path / "nowhere")


def test_an_empty_folder_is_refused(tmp_path):
  assert "is empty" in refused(tmp_path)


def test_images_where_latents_are_asked_for_are_explained(tmp_path):
  save(tmp_path, "x.png", np.zeros((8, 8, 3)))
  with pytest.raises(errors.DataError, match="has no .npy.*1 or 3 these are"):
    sources.open(config_of(tmp_path, channels=4), "train")


def test_images_without_a_class_are_refused(tmp_path):
  save(tmp_path, "x.png", np.zeros((8, 8, 3)))
  assert "no label" in refused(tmp_path) and "x.png" in refused(tmp_path)

  save(tmp_path, "a/y.png", np.zeros((8, 8, 3)))
  assert "no label" in refused(tmp_path)


def test_images_alone_need_neither_labels_nor_captions(tmp_path):
  save(tmp_path, "x.png", np.full((8, 8, 3), 255))
  save(tmp_path, "a/b/y.png", np.zeros((8, 8, 3)))
  (tmp_path / "x.txt").write_bytes(b"\xff\xfe no caption that is read")
  source = sources.open(config_of(tmp_path, images_alone=True), "train")
  values = [record["image"].mean() for record in (source[0], source[1])]
  assert sorted(values) == [BLACK, WHITE]
  assert all(set(source[i]) == {"image"} for i in range(2))
  assert set(sources.blank(source)) == {"image"}
  sources.check(
    source, batch_size=2, num_classes=None, channels=3, image_size=(8, 8)
  )
  for told in ({"captions": True}, {"tokenizer": "bytes"}):
    with pytest.raises(ValueError, match="images_alone leaves out what is"):
      config_of(tmp_path, images_alone=True, **told)


def test_a_class_without_images_is_refused(tmp_path):
  fill(tmp_path, {"a": 2})
  (tmp_path / "b").mkdir()
  assert "'b'" in refused(tmp_path)


def test_splits_taken_for_classes_are_refused_with_the_remedy(tmp_path):
  fill(tmp_path / "train", {"a": 2, "b": 2})
  fill(tmp_path / "val", {"a": 2, "b": 2})
  assert f"folder:{tmp_path / 'train'}" in refused(tmp_path)


def test_a_split_that_gets_nothing_is_refused(tmp_path):
  fill(tmp_path, {"a": 2})
  with pytest.raises(errors.DataError, match="held_out=0.0"):
    sources.open(config_of(tmp_path), "held_out")


def test_other_channels_are_latents_in_arrays(tmp_path):
  latents = np.arange(8 * 8 * 4, dtype=np.float16).reshape(8, 8, 4)
  for name in ("cat", "dog"):
    (tmp_path / name).mkdir()
    np.save(tmp_path / name / "a.npy", latents)
  source = sources.open(config_of(tmp_path, channels=4), "train")
  record = source[1]
  assert record["label"] == 1 and record["image"].dtype == np.float32
  np.testing.assert_array_equal(record["image"], latents)


@pytest.mark.parametrize(
  "what", ["shape", "bytes", "pickle", "words", "archive", "bomb"]
)
def test_an_array_that_is_no_latent_names_its_file(tmp_path, what):
  path = tmp_path / "cat" / "a.npy"
  path.parent.mkdir()
  np.save(path, np.zeros((4, 8, 4), np.float32))
  if what == "bytes":
    path.write_bytes(path.read_bytes()[:90])
  if what == "pickle":
    np.save(path, np.array([{}], object), allow_pickle=True)
  if what == "words":
    np.save(path, np.full((8, 8, 4), "word"))
  if what == "archive":
    with path.open("wb") as file:
      np.savez(file, image=np.zeros((8, 8, 4)))
  if what == "bomb":
    claim = {"descr": "<f4", "fortran_order": False, "shape": (10**6, 10**9)}
    with path.open("wb") as file:
      np.lib.format.write_array_header_1_0(file, claim)
  source = sources.open(config_of(tmp_path, channels=4), "train")
  with pytest.raises(sources.Corrupt, match="a.npy"):
    _ = source[0]


@pytest.mark.parametrize(
  "spoil",
  [
    lambda content: b"",
    lambda content: b"no image at all",
    lambda content: content[: len(content) // 2],
    lambda content: content[:60] + bytes(20) + content[80:],
  ],
)
def test_a_corrupt_file_is_named(tmp_path, spoil):
  fill(tmp_path, {"a": 1})
  path = tmp_path / "a/000.png"
  path.write_bytes(spoil(path.read_bytes()))
  source = sources.open(config_of(tmp_path), "train")
  with pytest.raises(sources.Corrupt) as caught:
    source[0]
  assert str(path) in str(caught.value)
  assert "0x" not in str(caught.value)  # No address of an object.


def test_a_file_that_cannot_be_read_is_no_corrupt_one(tmp_path):
  fill(tmp_path, {"a": 1})
  source = sources.open(config_of(tmp_path), "train")
  os.remove(tmp_path / "a/000.png")
  with pytest.raises(errors.DataError, match="000.png") as caught:
    source[0]
  assert not isinstance(caught.value, sources.Corrupt)


def test_an_image_is_never_larger_than_a_decoder_should_trust(tmp_path):
  fill(tmp_path, {"a": 1})
  assert read_one(tmp_path, max_pixels=64).shape == (8, 8, 3)
  with pytest.raises(sources.Corrupt, match="8x8 are 64 pixels.*max_pixels=63"):
    read_one(tmp_path, max_pixels=63)


def test_a_bomb_is_told_of_in_our_words_alone(tmp_path):
  (tmp_path / "a").mkdir()
  PIL.Image.new("1", (9500, 9500)).save(tmp_path / "a" / "0.png")
  with warnings.catch_warnings(record=True) as seen:
    warnings.resetwarnings()
    with pytest.raises(sources.Corrupt, match="9500x9500 are 90,250,000"):
      read_one(tmp_path)
  assert not seen
