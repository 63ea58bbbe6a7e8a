"""CLIP's image encoder, and what it is shown, against transformers' own."""

import functools
import json

import jax
import numpy as np
import pytest

from flowjax.interop import frozen, tables, text_encoders
from flowjax.models import clip_vision

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TINY = clip_vision.ClipVisionConfig(
  image_size=12, patch_size=4, width=32, depth=2, heads=4, mlp_width=40,
  projection=24,
)  # fmt: skip


@pytest.fixture(name="ours", scope="module")
def _ours(tmp_path_factory):
  """Returns parameters, the folder that we export, and their model of it."""
  rng = np.random.default_rng(0)
  params = jax.tree.map(
    lambda leaf: 0.3 * rng.standard_normal(leaf.shape, np.float32),
    jax.eval_shape(lambda: clip_vision.init(TINY, jax.random.key(0))),
  )
  folder = tmp_path_factory.mktemp("clip_vision")
  text_encoders.export(params, TINY, folder)
  model, info = transformers.CLIPVisionModelWithProjection.from_pretrained(
    folder, output_loading_info=True
  )
  assert not any(info.values()), info
  return params, model.eval()


def test_it_says_what_theirs_says(ours):
  params, model = ours
  x_BHWC = np.random.default_rng(1).standard_normal((3, 12, 12, 3), np.float32)
  found = jax.jit(functools.partial(clip_vision.apply, TINY))(params, x_BHWC)
  with torch.no_grad():
    wanted = model(torch.tensor(x_BHWC.transpose(0, 3, 1, 2))).image_embeds
  np.testing.assert_allclose(found, wanted.numpy(), atol=1e-4)


def test_what_they_save_is_read(ours, tmp_path):
  params, model = ours
  model.save_pretrained(tmp_path)
  found = text_encoders.open(tmp_path)
  assert found.config == TINY
  leaves = {path: np.asarray(leaf) for path, leaf in found.leaves()}
  assert leaves.keys() == tables.flatten(params).keys()
  for path, leaf in tables.flatten(params).items():
    np.testing.assert_array_equal(leaves[path], leaf, err_msg=path)


@pytest.mark.parametrize(
  ("size", "count"),
  [("b_32", 87849216), ("l_14", 303966208), ("big_g_14", 1844907264)],
)
def test_the_published_sizes_are_theirs(size, count):
  config = clip_vision.ClipVisionConfig(**clip_vision.SIZES[size])
  table = text_encoders.layout(config)
  cls = transformers.CLIPVisionModelWithProjection
  content = text_encoders._BY_NAME["clip_vision"].write(config)
  with torch.device("meta"):
    model = cls(cls.config_class(**content))
  shapes = {k: tuple(v.shape) for k, v in model.state_dict().items()}
  assert shapes == table.keys
  assert sum(np.prod(shape) for shape in shapes.values()) == count


@pytest.mark.parametrize("size", [(20, 31), (8, 8), (12, 12)])
def test_images_are_shown_as_theirs_are(size):
  module = pytest.importorskip(
    "transformers.models.clip.image_processing_pil_clip"
  )
  # Smooth, as cubic steps of bytes round, and beyond the ends are cut off.
  rows, columns = np.indices(size)
  image_HWC = np.stack(
    [np.sin(rows / 3 + c) * np.cos(columns / 4 - c) for c in range(3)], -1
  )
  bytes_HWC = np.round((image_HWC + 1) * 127.5).astype(np.uint8)
  process = module.CLIPImageProcessorPil(
    size={"shortest_edge": 12}, crop_size={"height": 12, "width": 12}
  )
  wanted_CHW = np.asarray(process(bytes_HWC)["pixel_values"][0])
  x_BHWC = bytes_HWC[None].astype(np.float32) / 127.5 - 1.0
  found_BHWC = clip_vision.shown(TINY, x_BHWC)
  # Theirs rounds to bytes twice: a level is 0.0146 of a deviation.
  np.testing.assert_allclose(
    found_BHWC[0], wanted_CHW.transpose(1, 2, 0), atol=0.03
  )


def test_grey_is_every_colour_and_latents_are_refused():
  grey = np.zeros((1, 12, 12, 1), np.float32)
  np.testing.assert_array_equal(
    clip_vision.shown(TINY, grey),
    clip_vision.shown(TINY, np.repeat(grey, 3, axis=-1)),
  )
  with pytest.raises(ValueError, match="these have 4"):
    clip_vision.shown(TINY, np.zeros((1, 12, 12, 4), np.float32))


@pytest.mark.slow(2)
def test_a_pipeline_embeds_images(ours, tmp_path):
  params, _ = ours
  parts = {
    "text_encoder": "CLIPTextModel",
    "text_encoder_2": "T5EncoderModel",
    "vae": "AutoencoderKL",
    "image_encoder": "CLIPVisionModelWithProjection",
  }
  index = {"_class_name": "FluxPipeline"}
  for name, kind in parts.items():
    index[name] = ["transformers", kind]
    (tmp_path / name).mkdir()
  (tmp_path / "model_index.json").write_text(json.dumps(index))
  text_encoders.export(params, TINY, tmp_path / "image_encoder")
  found = frozen.open(tmp_path, dtype="float32")
  assert found.embeds == TINY.projection
  x_BHWC = np.random.default_rng(1).uniform(-1, 1, (2, 8, 20, 1))
  x_BHWC = x_BHWC.astype(np.float32)
  shown_BHWC = clip_vision.shown(TINY, x_BHWC)
  wanted_BP = clip_vision.apply(TINY, params, shown_BHWC)
  np.testing.assert_allclose(found.embed(x_BHWC), wanted_BP, atol=1e-4)
  # Without one, nothing is embedded.
  del index["image_encoder"]
  (tmp_path / "model_index.json").write_text(json.dumps(index))
  assert frozen.open(tmp_path).embeds == 0
