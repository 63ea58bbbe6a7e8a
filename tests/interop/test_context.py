"""Channels beside the image, in the files of others and in theirs as ours."""

# Shape suffixes: B batch, H height, W width, C channels, P one packed patch.

import dataclasses

import einops
import jax
import numpy as np
import pytest

from flowjax import errors, models
from flowjax.interop import (
  diffusers_check,
  diffusers_configs,
  formats,
  torch_export,
)
from flowjax.models import dit, flux, mmdit

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

TEXT = dict(channels=2, context_channels=3, text_width=10, pooled_width=6)
NETWORKS = {
  "dit": dit.DiTConfig(
    image_size=(8, 8),
    channels=2,
    context_channels=3,
    width=32,
    depth=1,
    heads=2,
    num_classes=4,
    position="sincos2d",
    frequency_shift=1.0,
  ),
  "mmdit": mmdit.MMDiTConfig(
    image_size=(4, 4),
    depth=2,
    heads=2,
    head_size=16,
    position_table=4,
    position_scale=0.5,  # As in a fresh one of theirs.
    text_tokens=5,
    **TEXT,
  ),
  "flux": flux.FluxConfig(
    image_size=(4, 8),
    width=32,
    heads=2,
    double_depth=1,
    single_depth=1,
    rope_axes=(4, 6, 6),
    text_tokens=5,
    **TEXT,
  ),
}


def theirs_of(config):
  """Returns their network, every parameter of which acts."""
  content = diffusers_configs.write(config)
  fields = {k: content[k] for k in content if not k.startswith("_")}
  theirs = getattr(diffusers, content["_class_name"])(**fields).eval()
  generator = torch.Generator().manual_seed(0)
  copies = {}
  with torch.no_grad():
    for name, value in theirs.named_parameters():
      drawn = 0.1 * torch.randn(value.shape, generator=generator)
      # A DiT of theirs holds its embedders once in every block.
      part = name.partition("norm1.emb.")[2] or name
      value.copy_(copies.setdefault(part, drawn))
  return theirs


@pytest.mark.parametrize("name", NETWORKS)
def test_their_channels_are_ours_in_their_order(name):
  config = NETWORKS[name]
  theirs = theirs_of(config)
  state = {key: value.numpy() for key, value in theirs.state_dict().items()}
  table = formats.layout(config, "diffusers")
  params = table.to_ours(state)
  for key, value in table.to_theirs(params):
    np.testing.assert_array_equal(value, state[key], err_msg=key)

  network, rng = models.build(config), np.random.default_rng(1)
  x_BHWC = rng.standard_normal((3, *config.image_size, 2), np.float32)
  cond = torch_export.conditions(network, rng, 3)[0]
  t_B = diffusers_check.TIMES
  ours_BHWC = jax.jit(network.apply)(params, x_BHWC, t_B, cond)
  with torch.no_grad():
    wanted_BHWC = diffusers_check.run(theirs, config, x_BHWC, t_B, cond).numpy()
  assert ours_BHWC.shape == x_BHWC.shape
  assert np.abs(wanted_BHWC).mean() > 0.02
  np.testing.assert_allclose(ours_BHWC, wanted_BHWC, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", NETWORKS)
def test_their_config_says_which_channels_are_a_context(name):
  config = NETWORKS[name]
  content = diffusers_configs.write(config)
  assert diffusers_configs.read(content, config) == config
  alone = diffusers_configs.read(content)
  assert (alone.channels, alone.context_channels) == (2, 3)
  plain = dataclasses.replace(config, context_channels=0)
  assert diffusers_configs.read(diffusers_configs.write(plain), config) == plain


def test_flux_fill_is_read_as_published():
  content = diffusers_configs.write(NETWORKS["flux"])
  content |= {"in_channels": 384, "out_channels": 64}
  config = diffusers_configs.read(content)
  assert (config.channels, config.context_channels) == (16, 80)
  with pytest.raises(errors.UserError, match="out_channels = 65"):
    diffusers_configs.read(content | {"out_channels": 65})
  with pytest.raises(errors.UserError, match="more than in_channels = 384"):
    diffusers_configs.read(content | {"out_channels": 768})


def test_a_context_is_packed_as_theirs_is_packed_apart():
  # FLUX's network for filling in packs the latents, the masked latents and
  # the mask each by itself, and then joins the channels.
  image, packed = "B (h p) (w q) C", "B (h w) (C p q)"
  rng = np.random.default_rng(0)
  parts = [rng.standard_normal((1, 4, 4, n)) for n in (2, 2, 5)]
  apart = [
    einops.rearrange(part, f"{image} -> {packed}", p=2, q=2) for part in parts
  ]
  both = np.concatenate(parts, axis=-1)
  np.testing.assert_array_equal(
    einops.rearrange(both, f"{image} -> {packed}", p=2, q=2),
    np.concatenate(apart, axis=-1),
  )


@pytest.mark.parametrize(
  "name",
  [
    "dit",
    *(pytest.param(n, marks=pytest.mark.slow) for n in ("mmdit", "flux")),
  ],
)
def test_exported_torch_reads_them(draw, tmp_path, name):
  config = NETWORKS[name]
  params = draw(config)
  torch_export.export(params, config, tmp_path)
  network = models.build(config)
  assert torch_export.verify(tmp_path, network, params) <= 1e-5
  params["patch_embed"]["kernel"] = params["patch_embed"]["kernel"][::-1]
  assert torch_export.verify(tmp_path, network, params) > 1e-3
  card = (tmp_path / "README.md").read_text()
  assert "channels in: 2 and 3 of an image beside it" in card
  assert f"context_BCHW = torch.zeros(1, 3, {config.image_size[0]}" in card


def test_formats_without_a_place_for_them_say_so():
  for name in ("dit", "mmdit"):
    with pytest.raises(errors.UserError, match="context_channels"):
      formats.layout(NETWORKS[name], "original")
  both = dataclasses.replace(NETWORKS["dit"], out_channels=4)
  with pytest.raises(errors.UserError, match="and out_channels = 4"):
    diffusers_configs.write(both)
