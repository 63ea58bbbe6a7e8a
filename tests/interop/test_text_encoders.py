"""CLIP's and T5's text encoders, against transformers' own."""

# Shape suffixes: B batch, L tokens, E width, P pooled width.

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest

from flowjax import errors
from flowjax.interop import safetensors, t5, tables, text_encoders
from flowjax.models import clip as clip_model
from flowjax.models import t5 as t5_model

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

CLIP = clip_model.ClipConfig(
  vocabulary=48, positions=12, width=32, depth=2, heads=4, mlp_width=40, end=47
)
PROJECTED = dataclasses.replace(
  CLIP, activation="gelu", projection=24, end=clip_model.LEGACY_END
)
T5 = t5_model.T5Config(
  vocabulary=48, width=32, mlp_width=40, heads=4, head_size=6, depth=2
)
CASES = {
  "clip": (CLIP, "CLIPTextModel"),
  "projected": (PROJECTED, "CLIPTextModelWithProjection"),
  "t5": (T5, "T5EncoderModel"),
}
# Two padded; in the last the end comes twice, and a higher number before it.
TOKEN_BL = np.array(
  [
    [45, 5, 9, 13, 21, 33, 8, 17, 30, 47],
    [45, 7, 3, 47, 47, 47, 47, 47, 47, 47],
    [45, 46, 1, 2, 47, 0, 0, 47, 0, 0],
  ]
)
MASK_BL = np.arange(10) < np.array([10, 4, 5])[:, None]


def draw(config, seed=0):
  rng = np.random.default_rng(seed)
  init = text_encoders.MODULES[config.name].init
  abstract = jax.eval_shape(lambda: init(config, jax.random.key(0)))
  return jax.tree.map(
    lambda leaf: 0.3 * rng.standard_normal(leaf.shape, np.float32), abstract
  )


@functools.partial(jax.jit, static_argnums=0)
def apply(configs, params, *texts):
  """Returns what each of the configs says by the same parameters."""
  module = text_encoders.MODULES[configs[0].name]
  return [module.apply(config, params, *texts) for config in configs]


def theirs(model, mask_BL):
  mask = None if mask_BL is None else torch.tensor(mask_BL).long()
  with torch.no_grad():
    return model(
      input_ids=torch.tensor(TOKEN_BL),
      attention_mask=mask,
      output_hidden_states=True,
    )


@pytest.fixture(scope="module", params=CASES)
def exported(request, tmp_path_factory):
  """Returns a config, parameters, and their model of what we exported."""
  config, kind = CASES[request.param]
  params, folder = draw(config), tmp_path_factory.mktemp(request.param)
  text_encoders.export(params, config, folder)
  model, info = getattr(transformers, kind).from_pretrained(
    folder, output_loading_info=True
  )
  assert not any(info.values()), info
  return config, params, model.eval(), folder


@pytest.mark.slow(1)
@pytest.mark.parametrize("masked", [False, True])
def test_they_say_what_ours_says(exported, masked):
  config, params, model, _ = exported
  mask_BL = MASK_BL if masked else None
  configs = [config]
  if config.name == "clip":
    configs += [dataclasses.replace(config, skip=skip) for skip in (1, 2)]
  (text_BLE, pooled_BP), *skipped = apply(
    tuple(configs), params, TOKEN_BL, mask_BL
  )
  text_BLE = np.asarray(text_BLE)
  out = theirs(model, mask_BL)
  real = MASK_BL if masked else np.ones_like(MASK_BL)
  np.testing.assert_allclose(
    text_BLE[real], out.last_hidden_state.numpy()[real], atol=1e-4
  )
  if config.name == "t5":
    assert pooled_BP is None
    return
  pooled = out.text_embeds if config.projection else out.pooler_output
  np.testing.assert_allclose(pooled_BP, pooled.numpy(), atol=1e-4)
  for skip, (text_BLE, again_BP) in enumerate(skipped, 1):
    wanted_BLE = out.hidden_states[-1 - skip].numpy()
    np.testing.assert_allclose(
      np.asarray(text_BLE)[real], wanted_BLE[real], atol=1e-4
    )
    np.testing.assert_array_equal(again_BP, pooled_BP)


def test_what_they_save_is_read(exported, tmp_path):
  config, params, model, _ = exported
  model.save_pretrained(tmp_path, max_shard_size="8KB")
  assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
  found = text_encoders.open(tmp_path)
  assert found.config == config
  leaves = {path: np.asarray(leaf) for path, leaf in found.leaves()}
  assert leaves.keys() == tables.flatten(params).keys()
  for path, leaf in tables.flatten(params).items():
    np.testing.assert_array_equal(leaves[path], leaf, err_msg=path)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_text_ends_where_theirs_does(legacy):
  end = clip_model.LEGACY_END if legacy else 47
  config = dataclasses.replace(CLIP, end=end)
  token_BL = np.array([[45, 7, 47, 2, 47], [1, 46, 2, 0, 0]])
  # In the second no token ends the text: it is then the first, as there.
  wanted = [2, 1] if legacy else [2, 0]
  assert clip_model.end_of_text(config, token_BL).tolist() == wanted


def test_distances_fall_into_the_buckets_of_theirs():
  from transformers.models.t5 import modeling_t5

  place = torch.arange(600)
  for buckets, distance in ((32, 128), (16, 40)):
    config = dataclasses.replace(T5, buckets=buckets, max_distance=distance)
    wanted = modeling_t5.T5Attention._relative_position_bucket(
      place[None] - place[:, None], True, buckets, distance
    )
    found = t5_model.buckets(config, len(place))
    np.testing.assert_array_equal(found, wanted.numpy())


@pytest.mark.parametrize(
  "kind, config, count",
  [
    (
      "CLIPTextModel",
      clip_model.ClipConfig(**clip_model.SIZES["l"]),
      123060480,
    ),
    (
      "CLIPTextModelWithProjection",
      clip_model.ClipConfig(**clip_model.SIZES["big_g"]),
      694659840,
    ),
    *(
      ("T5EncoderModel", t5_model.T5Config(**size), count)
      for size, count in zip(
        t5_model.SIZES.values(),
        (35332800, 109628544, 341231104, 1223527424, 4762310656),
        strict=True,
      )
    ),
  ],
)
def test_the_published_sizes_have_so_many_parameters(kind, config, count):
  module = text_encoders.MODULES[config.name]
  abstract = jax.eval_shape(lambda: module.init(config, jax.random.key(0)))
  assert sum(leaf.size for leaf in jax.tree.leaves(abstract)) == count
  table = text_encoders.layout(config)
  assert {k: leaf.shape for k, leaf in tables.flatten(abstract).items()} == (
    table.paths
  )
  cls = getattr(transformers, kind)
  content = text_encoders._BY_NAME[config.name].write(config)
  with torch.device("meta"):
    model = cls(cls.config_class(**content))
  shapes = {k: tuple(v.shape) for k, v in model.state_dict().items()}
  shapes.pop(t5.TIED, None)
  if kind == "CLIPTextModel":
    shapes = {f"text_model.{key}": shape for key, shape in shapes.items()}
  assert shapes == table.keys


def test_a_table_of_tokens_may_come_under_either_name_or_both(tmp_path):
  params = draw(T5)
  text_encoders.export(params, T5, tmp_path)
  path = tmp_path / "model.safetensors"
  tensors = dict(safetensors.read(path))

  def written(changed):
    shapes = {key: tensor.shape for key, tensor in changed.items()}
    path.unlink()  # What is mapped stays as it is.
    safetensors.write(path, shapes, changed.items(), dtype="float32")
    return text_encoders.open(tmp_path)

  table = tensors.pop(t5.TOKENS)
  for names in ((t5.TIED,), (t5.TOKENS, t5.TIED)):
    found = written({**tensors, **dict.fromkeys(names, table)})
    ours = tables.unflatten(
      {path: np.asarray(leaf) for path, leaf in found.leaves()}
    )
    np.testing.assert_array_equal(ours["token_embed"]["embedding"], table)
  with pytest.raises(errors.CheckpointError, match="one table of tokens"):
    written({**tensors, t5.TOKENS: table, t5.TIED: table + 1})


def change(folder, **changes):
  path = folder / "config.json"
  path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
  "name, spoil, text",
  [
    ("t5", lambda f: change(f, feed_forward_proj="relu"), "only T5 v1.1"),
    ("clip", lambda f: change(f, model_type="clip"), "'clip' is no enc"),
    ("clip", lambda f: change(f, hidden_act="relu"), "activation='relu'"),
    ("clip", lambda f: change(f, hidden_size=40), "mis-shaped .*token_emb"),
    ("clip", lambda f: change(f, num_hidden_layers=1), "unmapped .*layers.1"),
    ("t5", lambda f: (f / "config.json").unlink(), "save_pretrained"),
    (
      "t5",
      lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
      "is a pickle",
    ),
  ],
)
def test_what_is_another_network_is_refused(tmp_path, name, spoil, text):
  config = CASES[name][0]
  text_encoders.export(draw(config), config, tmp_path)
  spoil(tmp_path)
  with pytest.raises(errors.UserError, match=f"(?s){text}"):
    text_encoders.open(tmp_path).leaves()


def test_a_text_that_is_too_long_is_refused():
  token_BL = np.zeros((1, 13), np.int32)
  with pytest.raises(ValueError, match="13 tokens: .* at most 12"):
    clip_model.apply(CLIP, {}, token_BL)
