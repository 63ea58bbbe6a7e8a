"""Against the FLUX of diffusers, on the same weights, both ways."""

# Shape suffixes: B batch, H height, W width, C channels, L text tokens,
# T image tokens, P one packed patch, S = L + T.

import dataclasses
import functools
import math

import einops
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowjax import errors, models
from flowjax.interop import flux as layouts
from flowjax.interop import tables
from flowjax.models import flux, layers

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
embeddings = pytest.importorskip("diffusers.models.embeddings")
single_file_utils = pytest.importorskip("diffusers.loaders.single_file_utils")
FluxTransformer2DModel = diffusers.FluxTransformer2DModel

CONFIG = flux.FluxConfig(
  image_size=(8, 8),
  channels=3,
  width=32,
  heads=2,
  double_depth=2,
  single_depth=2,
  text_width=12,
  pooled_width=10,
  rope_axes=(4, 6, 6),
)
# With the length of the text, always odd.
VARIANTS = {
  "dev": (CONFIG, 5),
  "wide_schnell": (
    dataclasses.replace(
      CONFIG, guidance_embed=False, image_size=(4, 12), channels=2
    ),
    7,
  ),
  "tall_of_single_pixels": (
    dataclasses.replace(
      CONFIG,
      image_size=(6, 2),
      patch_size=1,
      heads=4,
      rope_axes=(2, 4, 2),
      double_depth=1,
      single_depth=3,
    ),
    1,
  ),
  "published_heads": (
    dataclasses.replace(
      CONFIG,
      image_size=(4, 128),
      width=128,
      heads=1,
      rope_axes=(16, 56, 56),
      double_depth=1,
      single_depth=1,
    ),
    3,
  ),
}


@functools.lru_cache
def build_theirs(config):
  """Returns their network with weights that act: norms and gates as well.

  Queries and keys are scaled by about 1, or all tokens would be seen alike.
  """
  theirs = FluxTransformer2DModel(
    in_channels=config.channels * config.patch_size**2,
    num_layers=config.double_depth,
    num_single_layers=config.single_depth,
    attention_head_dim=config.head_size,
    num_attention_heads=config.heads,
    joint_attention_dim=config.text_width,
    pooled_projection_dim=config.pooled_width,
    guidance_embeds=config.guidance_embed,
    axes_dims_rope=config.rope_axes,
  )
  generator = torch.Generator().manual_seed(0)
  with torch.no_grad():
    for name, parameter in theirs.named_parameters():
      drawn = torch.randn(parameter.shape, generator=generator)
      parameter.copy_(scale(config) * drawn + ("attn.norm" in name))
  return theirs.eval()


def scale(config):
  """Returns the size of weights that keeps values near 1 at any width."""
  return 0.6 / config.width**0.5


def draw_inputs(config, length):
  rng = np.random.default_rng(1)

  def normal(*shape):
    return rng.standard_normal(shape).astype(np.float32)

  batch = 2
  cond = {
    "text": normal(batch, length, config.text_width),
    "pooled": normal(batch, config.pooled_width),
  }
  if config.guidance_embed:
    # 1000 guidance is embedded in float32, by which both networks are 3e-5 off
    # float64 at 3.5, and 4e-4 at 30. From each other they differ by a last bit
    # of PyTorch's exp in a few of 128 frequencies (ours are rounded correctly):
    # by 1e-5 at 5, 2.3e-5 at 7, 1.3e-4 at 30. A bound of 2e-5 holds up to 5.
    cond["guidance"] = np.array([1.0, 3.5], np.float32)
  t_B = rng.random(batch).astype(np.float32)
  return normal(batch, *config.image_size, config.channels), t_B, cond


def as_torch(tree):
  return jax.tree.map(lambda x: torch.from_numpy(np.array(x)), tree)


def state_of(theirs):
  return {name: x.numpy() for name, x in theirs.state_dict().items()}


def run_theirs(theirs, config, x_BHWC, t_B, cond):
  """Packs the image, calls their network and unpacks what it returns."""
  rows, columns = config.grid
  sides = dict(p=config.patch_size, q=config.patch_size, h=rows, w=columns)
  image, packed = "B (h p) (w q) C", "B (h w) (C p q)"
  image_ids = torch.zeros(rows, columns, 3)
  image_ids[..., 1] += torch.arange(rows)[:, None]
  image_ids[..., 2] += torch.arange(columns)[None, :]
  options = {}
  if "text_mask" in cond:
    seen_BT = torch.ones(len(t_B), rows * columns, dtype=torch.bool)
    mask_BS = torch.cat([cond["text_mask"], seen_BT], dim=1)
    options["joint_attention_kwargs"] = {
      "attention_mask": mask_BS[:, None, None]
    }
  v_BTP = theirs(
    hidden_states=einops.rearrange(x_BHWC, f"{image} -> {packed}", **sides),
    encoder_hidden_states=cond["text"],
    pooled_projections=cond["pooled"],
    timestep=t_B,
    img_ids=image_ids.reshape(-1, 3),
    txt_ids=torch.zeros(cond["text"].shape[1], 3),
    guidance=cond.get("guidance"),
    **options,
  ).sample
  return einops.rearrange(v_BTP, f"{packed} -> {image}", **sides)


@functools.lru_cache
def run_ours(config):
  return jax.jit(models.build(config).apply)


def assert_same_forward(config, params, theirs, inputs):
  with torch.no_grad():
    wanted = run_theirs(theirs, config, *as_torch(inputs)).numpy()
  assert np.std(wanted) > 0.1
  v_BHWC = run_ours(config)(params, *inputs)
  np.testing.assert_allclose(v_BHWC, wanted, atol=2e-5, rtol=0)


@pytest.mark.slow(1)
@pytest.mark.parametrize("name", VARIANTS)
def test_their_weights_in_our_network(name):
  config, length = VARIANTS[name]
  theirs = build_theirs(config)
  params = layouts.diffusers_layout(config).to_ours(state_of(theirs))
  assert_same_forward(config, params, theirs, draw_inputs(config, length))


@pytest.mark.slow(1)
@pytest.mark.parametrize("name", VARIANTS)
def test_our_weights_in_their_network(name, draw):
  config, length = VARIANTS[name]
  params = jax.tree_util.tree_map_with_path(
    lambda path, x: scale(config) / 0.1 * x + (path[-1].key == "scale"),
    draw(config),
  )
  state = as_torch(dict(layouts.diffusers_layout(config).to_theirs(params)))
  theirs = FluxTransformer2DModel.from_config(build_theirs(config).config)
  theirs.load_state_dict(state, strict=True)
  assert_same_forward(config, params, theirs, draw_inputs(config, length))


def test_a_large_guidance_differs_by_their_frequencies_alone(monkeypatch):
  def waves(t_B, size, **_):
    return torch.from_numpy(np.array(layers.sinusoid(t_B.numpy(), size)))

  config, length = VARIANTS["dev"]
  theirs, inputs = build_theirs(config), draw_inputs(config, length)
  inputs[2]["guidance"] = np.array([10.0, 30.0], np.float32)
  params = layouts.diffusers_layout(config).to_ours(state_of(theirs))
  monkeypatch.setattr(embeddings, "get_timestep_embedding", waves)
  assert_same_forward(config, params, theirs, inputs)


def test_without_some_blocks_it_is_theirs_without_them():
  config, length = VARIANTS["dev"]
  theirs, inputs = build_theirs(config), draw_inputs(config, length)
  params = layouts.diffusers_layout(config).to_ours(state_of(theirs))
  shallow = FluxTransformer2DModel.from_config(
    theirs.config, num_layers=1, num_single_layers=1
  )
  shallow.load_state_dict(theirs.state_dict(), strict=False)
  double, single = theirs.transformer_blocks, theirs.single_transformer_blocks
  shallow.transformer_blocks[0].load_state_dict(double[1].state_dict())
  shallow.single_transformer_blocks[0].load_state_dict(single[0].state_dict())
  with torch.no_grad():
    wanted = run_theirs(shallow, config, *as_torch(inputs)).numpy()
  net = models.build(config)
  v_BHWC = jax.jit(models.without_layers(net, (0, 3)))(params, *inputs)
  np.testing.assert_allclose(v_BHWC, wanted, atol=2e-5, rtol=0)
  with pytest.raises(ValueError, match="all single_blocks, 2 to 3: one"):
    models.without_layers(net, (2, 3))


def test_hidden_text_is_hidden_as_in_theirs():
  config, _ = VARIANTS["dev"]
  theirs = build_theirs(config)
  params = layouts.diffusers_layout(config).to_ours(state_of(theirs))
  x_BHWC, t_B, cond = draw_inputs(config, 5)
  mask_BL = np.array([[1, 1, 1, 0, 0], [0, 1, 0, 0, 1]], bool)
  inputs = x_BHWC, t_B, {**cond, "text_mask": mask_BL}
  assert_same_forward(config, params, theirs, inputs)
  shown = run_ours(config)(params, x_BHWC, t_B, cond)
  assert np.abs(run_ours(config)(params, *inputs) - shown).max() > 1e-2


@pytest.mark.slow(2)
@pytest.mark.parametrize("name", ["dev", "wide_schnell"])
def test_gradients_are_theirs(name):
  config, length = VARIANTS[name]
  theirs, table = build_theirs(config), layouts.diffusers_layout(config)
  params = table.to_ours(state_of(theirs))
  inputs = draw_inputs(config, length)
  weight_BHWC = np.cos(np.arange(inputs[0].size)).reshape(inputs[0].shape)

  def scalar(params, inputs):
    v_BHWC = models.build(config).apply(params, *inputs)
    return jnp.sum(v_BHWC * weight_BHWC.astype(np.float32))

  ours, (x_grad, _, cond_grad) = jax.jit(jax.grad(scalar, argnums=(0, 1)))(
    params, inputs
  )
  x_BHWC, t_B, cond = as_torch(inputs)
  leaves = {"x": x_BHWC, "text": cond["text"], "pooled": cond["pooled"]}
  for leaf in leaves.values():
    leaf.requires_grad_()
  theirs.zero_grad()
  v_BHWC = run_theirs(theirs, config, x_BHWC, t_B, cond)
  (v_BHWC * torch.from_numpy(weight_BHWC)).sum().backward()

  found = {
    "x": x_grad,
    "text": cond_grad["text"],
    "pooled": cond_grad["pooled"],
  }
  found |= dict(table.to_theirs(ours))
  wanted = leaves | dict(theirs.named_parameters())
  assert found.keys() == wanted.keys()
  for name, leaf in wanted.items():
    gradient = leaf.grad.numpy()
    assert np.abs(gradient).max() > 0, name
    error = np.abs(found[name] - gradient).max() / np.abs(gradient).max()
    assert error < 1e-4, (name, error)
  theirs.zero_grad(set_to_none=True)


def converted(config, state):
  """Turns an original state dict into diffusers' by diffusers' own converter.

  It has the published width written into it, for which another is put.
  """
  convert = single_file_utils.convert_flux_transformer_checkpoint_to_diffusers
  code = convert.__code__
  assert 3072 in code.co_consts
  constants = tuple(config.width if c == 3072 else c for c in code.co_consts)
  function = type(convert)(
    code.replace(co_consts=constants), convert.__globals__
  )
  found = function(state)
  assert not state, "The converter left tensors behind."
  return {key: tensor.numpy() for key, tensor in found.items()}


@pytest.mark.parametrize("name", ["dev", "wide_schnell"])
def test_original_weights_are_converted_as_diffusers_does(name):
  config, _ = VARIANTS[name]
  original = layouts.original_layout(config)
  rng = np.random.default_rng(0)
  state = {
    key: rng.standard_normal(shape, np.float32)
    for key, shape in original.keys.items()
  }
  params = original.to_ours(state)
  ours = dict(layouts.diffusers_layout(config).to_theirs(params))
  wanted = converted(config, as_torch(state))
  assert ours.keys() == wanted.keys()
  for key, tensor in wanted.items():
    np.testing.assert_array_equal(ours[key], tensor, err_msg=key)
  back = dict(original.to_theirs(params))
  assert back.keys() == state.keys()
  for key, tensor in state.items():
    np.testing.assert_array_equal(back[key], tensor, err_msg=key)


@pytest.mark.parametrize("layout", ["diffusers_layout", "original_layout"])
@pytest.mark.parametrize("size", flux.SIZES)
def test_tables_know_every_parameter_of_the_published_sizes(layout, size):
  config = flux.FluxConfig(**flux.SIZES[size])
  abstract = jax.eval_shape(models.build(config).init, jax.random.key(0))
  leaves = tables.flatten(abstract)
  table = getattr(layouts, layout)(config)
  assert table.paths == {path: leaf.shape for path, leaf in leaves.items()}
  if layout == "diffusers_layout":
    with torch.device("meta"):
      theirs = FluxTransformer2DModel(guidance_embeds=config.guidance_embed)
    state = theirs.state_dict()
    assert table.keys == {key: tuple(x.shape) for key, x in state.items()}
    count = sum(parameter.numel() for parameter in theirs.parameters())
    assert count == sum(math.prod(leaf.shape) for leaf in leaves.values())
    assert count == {"dev": 11_901_408_320, "schnell": 11_891_178_560}[size]


@pytest.mark.parametrize(
  "layout, change, message",
  [
    ("diffusers_layout", dict(num_classes=3), "num_classes = 3.*: torch"),
    ("original_layout", dict(num_classes=3), "original.*num_classes = 3"),
    (
      "diffusers_layout",
      dict(mlp_ratio=3.0, rope_theta=100.0),
      "mlp_ratio = 3.0.*rope_theta = 100.0, there 10000.0.*: original, torch",
    ),
    ("original_layout", dict(timestep_scale=1.0), "timestep_scale = 1.0.*1000"),
  ],
)
def test_what_a_layout_cannot_say_is_refused(layout, change, message):
  config = dataclasses.replace(CONFIG, **change)
  with pytest.raises(errors.UserError, match=f"(?s){message}"):
    getattr(layouts, layout)(config)


def test_the_original_layout_takes_another_ratio_and_theta():
  config = dataclasses.replace(CONFIG, mlp_ratio=3.0, rope_theta=100.0)
  keys = layouts.original_layout(config).keys
  assert keys["single_blocks.1.linear1.weight"] == ((3 + 3) * 32, 32)
  assert keys["single_blocks.1.linear2.weight"] == (32, (1 + 3) * 32)
