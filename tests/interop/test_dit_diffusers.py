"""Our DiT is that of diffusers, both ways: outputs, gradients and files."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowjax import errors, models
from flowjax.interop import (
  diffusers_check,
  diffusers_configs,
  dit,
  folder_export,
  tables,
  weights,
)

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

Theirs = diffusers.DiTTransformer2DModel

HELD = dict(position="sincos2d", frequency_shift=1.0)
OPTIONS = [
  dict(),
  dict(patch_size=1, width=24, heads=2, mlp_norm_epsilon=1e-5),
  dict(patch_size=4, image_size=(8, 8), width=32, heads=4, out_channels=4),
]


def theirs_of(config):
  content = diffusers_configs.write(config)
  fields = {k: content[k] for k in content if not k.startswith("_")}
  return Theirs(**fields).eval()


def randomise(theirs, seed=0):
  """Fills a model of theirs, as trained: the embedders of all blocks alike."""
  generator = torch.Generator().manual_seed(seed)
  first = theirs.transformer_blocks[0].norm1.emb
  with torch.no_grad():
    for value in theirs.parameters():
      value.copy_(0.1 * torch.randn(value.shape, generator=generator))
    for block in theirs.transformer_blocks[1:]:
      block.norm1.emb.load_state_dict(first.state_dict())
  return theirs


@pytest.mark.slow(1)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_theirs_comes_to_us_and_goes_back(tiny, options):
  config = tiny(**HELD, **options)
  theirs = randomise(theirs_of(config))
  state = {k: v.numpy() for k, v in theirs.state_dict().items()}
  table = dit.diffusers_layout(config)
  params = table.to_ours(state)

  rng = np.random.default_rng(1)
  x_BHWC = rng.standard_normal((3, *config.image_size, 2), np.float32)
  towards = rng.standard_normal(
    (*x_BHWC.shape[:3], config.channels_out), np.float32
  )
  t_B = np.array([0.0, 0.4, 1.0], np.float32)
  label_B = np.array([2, 3, 0])

  def score(params, x_BHWC):
    v = models.build(config).apply(
      params, x_BHWC, t_B, {"label": jnp.asarray(label_B)}
    )
    return jnp.sum(v * towards), v

  grads, v = jax.jit(jax.grad(score, argnums=(0, 1), has_aux=True))(
    params, x_BHWC
  )
  x = torch.from_numpy(x_BHWC).requires_grad_()
  cond = {"label": label_B}
  out = diffusers_check.run(theirs, config, x, torch.from_numpy(t_B), cond)
  (out * torch.from_numpy(towards)).sum().backward()
  np.testing.assert_allclose(v, out.detach().numpy(), atol=2e-5)
  assert np.abs(v).max() > 0.1

  def close(ours, expected, name):
    # Attention does not see a bias of the keys: their gradient is rounding.
    size = 1.0 if name.endswith("to_k.bias") else np.abs(expected).max()
    assert np.abs(ours - expected).max() <= 1e-4 * size, name

  close(grads[1], x.grad.numpy(), "x")
  gradient = {k: p.grad.numpy() for k, p in theirs.named_parameters()}
  ours = dict(table.to_theirs(jax.tree.map(np.asarray, grads[0])))
  for key, expected in gradient.items():
    if ".norm1.emb." in key:  # Theirs has a part of it in every block.
      end = key.split(".norm1.")[1]
      expected = sum(gradient[k] for k in gradient if k.endswith(end))
    close(ours[key], expected, key)

  back = {k: torch.from_numpy(np.array(v)) for k, v in table.to_theirs(params)}
  theirs.load_state_dict(back, strict=True)
  for key, value in state.items():
    np.testing.assert_array_equal(back[key], value)


def assert_same(params, others):
  ours, theirs = tables.flatten(params), tables.flatten(others)
  assert ours.keys() == theirs.keys()
  for path, leaf in ours.items():
    np.testing.assert_array_equal(np.asarray(theirs[path], leaf.dtype), leaf)


@pytest.mark.parametrize("max_bytes", [None, 4000])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_their_save_of_our_export_comes_back_the_same(
  tiny, draw, tmp_path, dtype, max_bytes
):
  config = tiny(**HELD, out_channels=4, mlp_norm_epsilon=1e-5)
  params = jax.tree.map(
    lambda leaf: np.asarray(jnp.asarray(leaf, dtype), np.float32), draw(config)
  )
  out, again = tmp_path / "out", tmp_path / "again"
  folder_export.export(
    params, config, out, format="diffusers", dtype=dtype, max_bytes=max_bytes
  )
  assert (len(list(out.glob("*.safetensors"))) > 2) == bool(max_bytes)
  theirs = diffusers_check.load(out)
  theirs.save_pretrained(again, max_shard_size=max_bytes or "5GB")
  for folder in (out, again):
    found = weights.open(folder)
    assert found.network == "dit" and found.config() == config
    _, leaves = found.leaves(config)
    assert_same(params, tables.unflatten(dict(leaves)))


@pytest.mark.parametrize("num_classes", [4, 0])
def test_an_export_is_what_diffusers_runs(tiny, draw, tmp_path, num_classes):
  config = tiny(**HELD, depth=1, num_classes=num_classes)
  params = draw(config)
  folder_export.export(params, config, tmp_path, format="diffusers")
  network = models.build(config)
  assert diffusers_check.verify(tmp_path, network, params) <= 2e-5
  params["final"]["out"]["bias"] += 0.01
  assert diffusers_check.verify(tmp_path, network, params) > 5e-3


def test_config_json_has_every_field_of_the_class(tiny):
  content = diffusers_configs.write(tiny(**HELD))
  fields = {key for key in content if not key.startswith("_")}
  theirs = dict(theirs_of(tiny(**HELD)).config)
  assert fields == {key for key in theirs if not key.startswith("_")}
  assert content["norm_eps"] == 1e-6
  json.dumps(content)


@pytest.mark.parametrize(
  "options, reason",
  [
    (dict(position="rope2d"), "position = 'rope2d'"),
    (dict(position="learned"), "position = 'learned'"),
    (dict(mlp="swiglu"), "mlp = 'swiglu'"),
    (dict(norm="rmsnorm"), "norm = 'rmsnorm'"),
    (dict(qk_norm=True), "qk_norm = True"),
    (dict(image_size=(4, 6)), "4x6"),
    (dict(mlp_ratio=2.0), "mlp_ratio = 2.0"),
    (dict(timestep_scale=1.0), "timestep_scale = 1.0"),
  ],
)
def test_what_their_class_is_not_is_refused(tiny, options, reason):
  with pytest.raises(errors.UserError, match="numbers would differ") as caught:
    dit.diffusers_layout(tiny(**{**HELD, **options}))
  assert reason in str(caught.value)
  assert "torch." in str(caught.value).split("hold this one: ")[1]


def test_the_original_frequencies_go_to_the_original_format(tiny):
  config = tiny(**HELD | dict(frequency_shift=0.0))
  with pytest.raises(errors.UserError, match="this one: original, torch"):
    dit.diffusers_layout(config)
  dit.original_layout(config)
  with pytest.raises(errors.UserError, match="frequency_shift = 1.0, there 0"):
    dit.original_layout(tiny(**HELD))


def test_embedders_that_were_trained_apart_are_refused(tiny):
  config = tiny(**HELD)
  state = {
    k: v.numpy() for k, v in randomise(theirs_of(config)).state_dict().items()
  }
  key = "transformer_blocks.1.norm1.emb.timestep_embedder.linear_2.bias"
  state[key] = state[key] + 1.0
  with pytest.raises(errors.CheckpointError, match=key):
    dit.diffusers_layout(config).to_ours(state)


@pytest.mark.parametrize(
  "field, value",
  [("norm_elementwise_affine", True), ("activation_fn", "geglu")],
)
def test_another_network_of_the_class_is_refused(tiny, field, value):
  content = diffusers_configs.write(tiny(**HELD)) | {field: value}
  with pytest.raises(errors.UserError, match=f"{field} = {value!r}"):
    diffusers_configs.read(content)


def test_the_original_names_the_same_weights(tiny, draw):
  config = tiny(position="sincos2d")
  params = draw(config)
  theirs = dict(dit.original_layout(config).to_theirs(params))
  other = dict(dit.diffusers_layout(tiny(**HELD)).to_theirs(params))
  block = "transformer_blocks.1."
  embed = block + "norm1.emb."
  qkv = [other[f"{block}attn1.to_{part}.weight"] for part in "qkv"]
  for key, expected in {
    "x_embedder.proj.weight": other["pos_embed.proj.weight"],
    "t_embedder.mlp.0.weight": other[
      f"{embed}timestep_embedder.linear_1.weight"
    ],
    "t_embedder.mlp.2.bias": other[f"{embed}timestep_embedder.linear_2.bias"],
    "y_embedder.embedding_table.weight": other[
      f"{embed}class_embedder.embedding_table.weight"
    ],
    "blocks.1.adaLN_modulation.1.weight": other[f"{block}norm1.linear.weight"],
    "blocks.1.attn.qkv.weight": np.concatenate(qkv),
    "blocks.1.attn.proj.bias": other[f"{block}attn1.to_out.0.bias"],
    "blocks.1.mlp.fc1.weight": other[f"{block}ff.net.0.proj.weight"],
    "blocks.1.mlp.fc2.weight": other[f"{block}ff.net.2.weight"],
    "final_layer.adaLN_modulation.1.weight": other["proj_out_1.weight"],
    "final_layer.linear.weight": other["proj_out_2.weight"],
  }.items():
    np.testing.assert_array_equal(theirs[key], expected, err_msg=key)
  buffer = theirs_of(tiny(**HELD)).pos_embed.pos_embed
  np.testing.assert_allclose(theirs["pos_embed"], buffer, atol=1e-6)
  theirs["pos_embed"] = theirs["pos_embed"] + 0.1
  with pytest.raises(errors.CheckpointError, match="pos_embed differs"):
    dit.original_layout(config).to_ours(theirs)


def test_fewer_shards_leave_none_of_more(tiny, draw, tmp_path):
  config = tiny(**HELD, depth=1)
  params = draw(config)
  for max_bytes in (4000, None):
    folder_export.export(
      params, config, tmp_path, format="diffusers", max_bytes=max_bytes
    )
    (tmp_path / "notes.txt").write_text("kept")
  assert sorted(path.name for path in tmp_path.iterdir()) == [
    "config.json",
    "diffusion_pytorch_model.safetensors",
    "flowjax.json",
    "notes.txt",
  ]
