"""Against the SD3 of diffusers, on the same weights, both ways."""

# Shape suffixes: B batch, H height, W width, C channels, L text tokens, E and P
# widths of the text and of the pooled text.

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowjax import errors, models
from flowjax.interop import mmdit, tables
from flowjax.models import mmdit as networks

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
pytest.importorskip("diffusers.utils.import_utils")

Theirs = diffusers.SD3Transformer2DModel

SMALL = networks.MMDiTConfig(
  image_size=(8, 12),
  channels=3,
  depth=2,
  heads=2,
  head_size=16,
  text_width=20,
  pooled_width=12,
  position_table=16,
)
# The norms of queries are met in blocks with and without a second attention.
CASES = {
  "plain": (dict(), 5),
  "dual": (dict(dual_layers=1, depth=3, image_size=(12, 10)), 7),
  "qk_norm dual": (
    dict(qk_norm=True, dual_layers=2, depth=5, image_size=(8, 8)),
    1,
  ),
  "patch 1": (dict(patch_size=1, image_size=(4, 6), head_size=8), 5),
  "patch 4": (dict(patch_size=4, head_size=12, heads=3, out_channels=2), 5),
  "one block": (dict(depth=1, qk_norm=True, image_size=(2, 32)), 9),
}


def config_of(case):
  """Returns the config whose positions are those of a fresh model of theirs."""
  config = dataclasses.replace(SMALL, **CASES[case][0])
  base = max(config.image_size) // config.patch_size
  scale = base / config.position_table
  return dataclasses.replace(config, position_scale=scale)


def build_theirs(config, seed=0):
  """Returns their network, every parameter of which acts."""
  torch.manual_seed(seed)
  theirs = Theirs(**mmdit.diffusers_config(config))
  for parameter in theirs.parameters():
    torch.nn.init.normal_(parameter, std=0.15)
  return theirs


def state_of(theirs):
  return {key: value.numpy() for key, value in theirs.state_dict().items()}


def inputs_of(config, length):
  rng = np.random.default_rng(length)

  def normal(*shape):
    return rng.standard_normal(shape, np.float32)

  x_BHWC = normal(2, *config.image_size, config.channels)
  t_B = np.asarray([0.25, 0.9], np.float32)
  cond = {
    "text": normal(2, length, config.text_width),
    "pooled": normal(2, config.pooled_width),
  }
  return x_BHWC, t_B, cond


def ask_theirs(theirs, x_BHWC, t_B, cond, **options):
  x_BCHW = torch.as_tensor(x_BHWC).permute(0, 3, 1, 2)
  text_BLE, pooled_BP = (torch.as_tensor(cond[k]) for k in ("text", "pooled"))
  t_B = 1000.0 * torch.as_tensor(t_B)
  out_BCHW = theirs(x_BCHW, text_BLE, pooled_BP, t_B, **options).sample
  return out_BCHW.permute(0, 2, 3, 1)


@functools.lru_cache
def ours_of(config):
  return jax.jit(models.build(config).apply)


@pytest.mark.slow(1)
@pytest.mark.parametrize("case", CASES)
def test_their_weights_in_ours_and_ours_in_theirs(case, draw):
  config, length = config_of(case), CASES[case][1]
  table, inputs = mmdit.diffusers_layout(config), inputs_of(config, length)
  theirs = build_theirs(config)
  for params in (table.to_ours(state_of(theirs)), draw(config)):
    exported = dict(table.to_theirs(params))
    theirs.load_state_dict(
      {
        key: torch.as_tensor(np.array(value)) for key, value in exported.items()
      },
      strict=True,
    )
    with torch.no_grad():
      wanted_BHWC = ask_theirs(theirs, *inputs).numpy()
    v_BHWC = ours_of(config)(params, *inputs)
    assert np.abs(wanted_BHWC).mean() > 0.02
    np.testing.assert_allclose(v_BHWC, wanted_BHWC, rtol=0, atol=2e-5)


@pytest.mark.slow(1)
@pytest.mark.parametrize("layers", [(1,), (0, 1, 3)])
def test_layers_are_skipped_as_they_do(layers):
  config, length = config_of("qk_norm dual"), CASES["qk_norm dual"][1]
  theirs, inputs = build_theirs(config), inputs_of(config, length)
  params = mmdit.diffusers_layout(config).to_ours(state_of(theirs))
  with torch.no_grad():
    wanted_BHWC = ask_theirs(theirs, *inputs, skip_layers=layers).numpy()
  apply = jax.jit(models.without_layers(models.build(config), layers))
  np.testing.assert_allclose(
    apply(params, *inputs), wanted_BHWC, rtol=0, atol=2e-5
  )
  with pytest.raises(ValueError, match="the last of an MM-DiT, 4,"):
    models.without_layers(models.build(config), (4,))


@pytest.mark.slow(2)
@pytest.mark.parametrize(
  "changes", [dict(qk_norm=True), dict(depth=2)], ids=str
)
def test_gradients_are_theirs(changes):
  config = dataclasses.replace(config_of("dual"), **changes)
  table, (x_BHWC, t_B, cond) = (
    mmdit.diffusers_layout(config),
    inputs_of(config, 7),
  )
  theirs = build_theirs(config)
  leaves = {
    name: torch.tensor(value, requires_grad=True)
    for name, value in {"image": x_BHWC, **cond}.items()
  }
  out_BHWC = ask_theirs(theirs, leaves["image"], t_B, leaves)
  weight_BHWC = np.cos(np.arange(out_BHWC.numel(), dtype="f4"))
  weight_BHWC = weight_BHWC.reshape(out_BHWC.shape)
  (out_BHWC * torch.as_tensor(weight_BHWC)).sum().backward()

  @jax.jit
  @functools.partial(jax.grad, argnums=(0, 1))
  def gradient(params, inputs):
    v_BHWC = models.build(config).apply(params, inputs["image"], t_B, inputs)
    return jnp.sum(weight_BHWC * v_BHWC)

  of_params, of_inputs = gradient(
    table.to_ours(state_of(theirs)), {"image": x_BHWC, **cond}
  )
  ours = dict(table.to_theirs(of_params))
  wanted = {name: p.grad.numpy() for name, p in theirs.named_parameters()}
  for name, gradient in wanted.items():
    if name.endswith("attn2.to_k.bias") and not config.qk_norm:
      # It adds as much to all scores of a query, which attention does not see:
      # its gradient is 0, and that of both is rounding.
      size = np.abs(wanted[name.replace("to_k", "to_q")]).max()
      for found in (ours[name], gradient):
        print("ZERO", name, np.abs(found).max(), size)
        assert np.abs(found).max() <= 1e-5 * size, name
      continue
    assert_close(name, ours[name], gradient)
  for name, leaf in leaves.items():
    assert_close(name, of_inputs[name], leaf.grad.numpy())


def assert_close(name, ours, wanted):
  largest = np.abs(wanted).max()
  difference = np.abs(ours - wanted).max()
  assert difference <= 1e-4 * largest, (name, difference, largest)


@pytest.mark.parametrize("size", networks.SIZES)
def test_published_sizes_have_as_many_parameters_as_theirs(size):
  config = networks.MMDiTConfig(**networks.SIZES[size])
  with torch.device("meta"):
    theirs = Theirs(**mmdit.diffusers_config(config))
  shapes = jax.eval_shape(models.build(config).init, jax.random.key(0))
  ours = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
  assert ours == sum(parameter.numel() for parameter in theirs.parameters())


def test_their_fresh_grid_is_scaled_and_other_grids_are_refused():
  config = config_of("plain")
  state = state_of(build_theirs(config))
  assert config.position_scale == 6 / 16
  mmdit.diffusers_layout(config).to_ours(state)
  for change in (dict(position_scale=1.0), dict(position_offset=1.0)):
    other = mmdit.diffusers_layout(dataclasses.replace(config, **change))
    with pytest.raises(errors.CheckpointError, match="pos_embed.pos_embed"):
      other.to_ours(state)


@pytest.mark.parametrize("scale, offset", [(1.0, 0.0), (0.25, 5.0)])
def test_any_grid_is_written_and_used_by_theirs(scale, offset, draw):
  config = dataclasses.replace(
    SMALL, position_scale=scale, position_offset=offset
  )
  params, inputs = draw(config), inputs_of(config, 5)
  theirs = build_theirs(config)
  exported = dict(mmdit.diffusers_layout(config).to_theirs(params))
  theirs.load_state_dict(
    {key: torch.as_tensor(np.array(value)) for key, value in exported.items()}
  )
  # The lowest waves of both directions: sin of the place itself.
  grid = theirs.pos_embed.pos_embed.reshape(16, 16, 32)
  places = np.sin(scale * (np.arange(16) - offset))
  np.testing.assert_allclose(grid[3, :, 0], places, atol=1e-6)
  np.testing.assert_allclose(grid[:, 3, 16], places, atol=1e-6)
  with torch.no_grad():
    wanted_BHWC = ask_theirs(theirs, *inputs).numpy()
  v_BHWC = ours_of(config)(params, *inputs)
  np.testing.assert_allclose(v_BHWC, wanted_BHWC, rtol=0, atol=2e-5)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize(
  "scale, offset", [(1.0, 0.0), (1.0 / 3.0, 0.0), (0.25, 64.0), (2.0, -7.5)]
)
def test_the_grid_of_a_table_is_found(scale, offset, dtype):
  config = dataclasses.replace(
    SMALL, position_table=192, position_scale=scale, position_offset=offset
  )
  table = mmdit.diffusers_layout(config)
  (table_1TD,) = map(np.asarray, table.constants.values())
  found = mmdit.grid_of(table_1TD.astype(dtype))
  # Round ones are found to the last digit.
  assert found == {"position_scale": scale, "position_offset": offset}
  uneven = dataclasses.replace(config, position_scale=0.3, position_offset=0.7)
  (table_1TD,) = mmdit.diffusers_layout(uneven).constants.values()
  found = mmdit.grid_of(np.asarray(table_1TD, dtype))
  again = mmdit.diffusers_layout(dataclasses.replace(config, **found))
  (again_1TD,) = again.constants.values()
  atol = 1e-5 if dtype == np.float32 else 1e-3
  np.testing.assert_allclose(again_1TD, table_1TD, atol=atol)


def test_a_table_is_made_when_it_is_asked_for(monkeypatch):
  monkeypatch.setattr(mmdit.positions, "sincos2d_centre", None)
  table = mmdit.diffusers_layout(networks.MMDiTConfig(position_table=384))
  key = mmdit.POSITIONS_IN_DIFFUSERS
  assert table.keys[key] == (1, 384 * 384, 1536)
  with pytest.raises(TypeError):
    np.asarray(table.constants[key])


def as_the_reference(config):
  """Returns a config of the shape that the reference reads off the width."""
  return dataclasses.replace(config, heads=config.depth, head_size=64)


def test_a_shape_that_the_width_does_not_tell_has_no_original():
  for change in (dict(heads=3), dict(head_size=32), dict(depth=3)):
    config = dataclasses.replace(as_the_reference(SMALL), **change)
    with pytest.raises(
      errors.UserError, match="(?s)width / 64 = .*: diffusers, torch"
    ):
      mmdit.original_layout(config)


@pytest.mark.slow(1)
@pytest.mark.parametrize("case", ["plain", "qk_norm dual", "patch 4"])
def test_both_layouts_give_back_what_they_take(case, draw):
  config = as_the_reference(config_of(case))
  params = draw(config)
  wanted = tables.flatten(params)
  for layout in (mmdit.diffusers_layout, mmdit.original_layout):
    table = layout(config)
    again = tables.flatten(table.to_ours(dict(table.to_theirs(params))))
    assert again.keys() == wanted.keys() == table.paths.keys()
    for path, leaf in wanted.items():
      np.testing.assert_array_equal(again[path], leaf, err_msg=path)


@pytest.mark.parametrize("case", CASES)
def test_the_original_layout_is_what_diffusers_converts(case):
  files = pytest.importorskip("diffusers.loaders.single_file_utils")
  config = as_the_reference(config_of(case))
  original = mmdit.original_layout(config)
  rng = np.random.default_rng(0)
  state = {
    key: rng.standard_normal(shape, np.float32)
    for key, shape in original.keys.items()
  }
  state |= {key: np.asarray(x) for key, x in original.constants.items()}
  checkpoint = {key: torch.as_tensor(value) for key, value in state.items()}
  converted = files.convert_sd3_transformer_checkpoint_to_diffusers(checkpoint)
  assert not checkpoint, "keys that their converter does not know"

  ours = dict(mmdit.diffusers_layout(config).to_theirs(original.to_ours(state)))
  assert ours.keys() == converted.keys()
  for key, value in converted.items():
    np.testing.assert_array_equal(ours[key], value.numpy(), err_msg=key)


@pytest.mark.parametrize(
  "change",
  [
    dict(position="rope2d"),
    dict(num_classes=10),
    dict(mlp_ratio=2.0),
    dict(timestep_scale=1.0),
  ],
  ids=str,
)
def test_what_they_cannot_represent_is_refused(change):
  config = as_the_reference(dataclasses.replace(SMALL, **change))
  (field,) = change
  for layout in (mmdit.diffusers_layout, mmdit.original_layout):
    with pytest.raises(errors.UserError, match=f"(?s){field} = .*: torch"):
      layout(config)
