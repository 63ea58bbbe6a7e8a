"""What lies in a folder or a file is found, for every kind of network."""

import dataclasses
import weakref

import jax
import numpy as np
import pytest

from flowjax import errors
from flowjax.interop import (
  diffusers_configs,
  folder_export,
  formats,
  tables,
  torch_export,
  weights,
)
from flowjax.models import autoencoder, dit, flux, mmdit

TEXT = dict(
  image_size=(8, 8),
  channels=2,
  heads=2,
  text_width=8,
  pooled_width=6,
  text_tokens=3,
)
DIT = dit.DiTConfig(
  image_size=(4, 4),
  channels=2,
  width=16,
  depth=2,
  heads=2,
  num_classes=3,
  position="sincos2d",
)
MMDIT = mmdit.MMDiTConfig(
  **TEXT, depth=2, head_size=64, dual_layers=1, qk_norm=True, position_table=6
)
FLUX = flux.FluxConfig(
  **TEXT, width=16, double_depth=1, single_depth=2, rope_axes=(2, 2, 4)
)
AUTOENCODER = autoencoder.AutoencoderConfig(image_size=(16, 16))
LABELS = dict(num_classes=2, label_tokens=4)
CASES = [
  (dataclasses.replace(DIT, frequency_shift=1.0), "diffusers"),
  (DIT, "original"),
  *(
    (dataclasses.replace(config, **labels), format)
    for config in (MMDIT, FLUX)
    for labels in ({}, LABELS)
    for format in ("diffusers", "original")
  ),
]
IDS = [
  f"{config.name}-{format}-{config.num_classes}" for config, format in CASES
]


def assert_same(params, leaves):
  ours, found = tables.flatten(params), dict(leaves)
  assert ours.keys() == found.keys()
  for path, leaf in ours.items():
    np.testing.assert_array_equal(found[path], leaf, err_msg=path)


@pytest.mark.parametrize("config, format", CASES, ids=IDS)
def test_an_export_is_found_with_its_network(draw, tmp_path, config, format):
  params = draw(config)
  folder_export.export(params, config, tmp_path, format=format, max_bytes=5000)
  found = weights.open(tmp_path)
  assert (found.format, found.network) == (format, config.name)
  assert found.config() == config
  paths, leaves = found.leaves(config)
  assert set(paths) == tables.flatten(params).keys()
  assert_same(params, leaves)
  has_labels = (tmp_path / formats.LABELS_FILE).exists()
  assert has_labels == (config.name != "dit" and config.num_classes > 0)


@pytest.mark.parametrize(
  "config, format", [(DIT, "original"), (MMDIT, "diffusers")]
)
def test_of_a_file_alone_the_keys_tell_the_format(
  draw, tmp_path, config, format
):
  params = draw(config)
  folder_export.export(params, config, tmp_path, format=format)
  file = tmp_path / "renamed.safetensors"
  (tmp_path / f"{folder_export.STEMS[format]}.safetensors").rename(file)
  found = weights.open(file)
  assert found.format is None and found.config(config) == config
  assert_same(params, found.leaves(config)[1])


@pytest.mark.parametrize("format", ["diffusers", "original"])
def test_the_grid_of_positions_is_read_off_a_file(draw, tmp_path, format):
  like = dataclasses.replace(MMDIT, position_table=16)
  config = dataclasses.replace(like, position_scale=0.5, position_offset=3.0)
  folder_export.export(draw(config), config, tmp_path, format=format)
  file = tmp_path / "renamed.safetensors"
  (tmp_path / f"{folder_export.STEMS[format]}.safetensors").rename(file)
  assert weights.open(file).config(like) == config
  turned = dataclasses.replace(like, position="rope2d")
  assert weights.open(file).config(turned) == turned


def test_a_file_in_a_folder_of_diffusers_is_of_that_folder(draw, tmp_path):
  config, stem = MMDIT, folder_export.STEMS["diffusers"]
  folder_export.export(draw(config), config, tmp_path, format="diffusers")
  (tmp_path / f"{stem}.safetensors").rename(
    tmp_path / f"{stem}.fp16.safetensors"
  )
  for path in (tmp_path, tmp_path / f"{stem}.fp16.safetensors"):
    assert weights.open(path).config() == config


def test_one_of_several_files_is_not_taken_for_all(draw, tmp_path):
  params = draw(MMDIT)
  folder_export.export(
    params, MMDIT, tmp_path, format="diffusers", max_bytes=90_000
  )
  for path in tmp_path.glob("*-of-*.safetensors"):
    with pytest.raises(errors.UserError, match="of .* files: name their index"):
      weights.open(path)
  index = tmp_path / "diffusion_pytorch_model.safetensors.index.json"
  assert_same(params, weights.open(index).leaves(MMDIT)[1])


@pytest.mark.parametrize("size", [[8, 8], [8], [8, 8, 8], []])
def test_only_an_autoencoder_has_images_of_two_sizes(size):
  for config in (dataclasses.replace(DIT, frequency_shift=1.0), MMDIT):
    content = diffusers_configs.write(config) | {"sample_size": size}
    with pytest.raises(errors.UserError, match="must be a whole number, such"):
      diffusers_configs.read(content)
  content = diffusers_configs.write(AUTOENCODER) | {"sample_size": size}
  if size == [8, 8]:
    assert diffusers_configs.read(content).image_size == (8, 8)
    return
  with pytest.raises(errors.UserError, match="a whole number, or two"):
    diffusers_configs.read(content)


@pytest.mark.parametrize("config", [MMDIT, FLUX], ids=["mmdit", "flux"])
def test_what_diffusers_does_not_say_is_as_in_another_config(config):
  content = diffusers_configs.write(config)
  like = dataclasses.replace(config, text_tokens=9, dtype="bfloat16")
  assert diffusers_configs.read(content, like) == like
  other = type(config)(image_size=(4, 8))
  read = diffusers_configs.read(content, other)
  assert read.image_size == (4, 8) and read.heads == config.heads


def test_patches_that_cannot_be_packed_so_are_refused():
  content = diffusers_configs.write(FLUX) | {"in_channels": 9}
  with pytest.raises(errors.UserError, match="in_channels = 9 .* 2x2"):
    diffusers_configs.read(content)
  assert (
    diffusers_configs.read(
      content, dataclasses.replace(FLUX, patch_size=1)
    ).channels
    == 9
  )


def test_labels_are_drawn_anew_where_there_are_none(draw, tmp_path):
  folder_export.export(draw(FLUX), FLUX, tmp_path, format="diffusers")
  config = dataclasses.replace(FLUX, **LABELS)
  paths, _ = weights.open(tmp_path).leaves(config)
  named = tables.flatten(draw(config)).keys()
  assert named - set(paths) == {"label_embed/text", "label_embed/pooled"}


def test_one_key_of_our_marker_does_not_hide_another_network(draw, tmp_path):
  config = dataclasses.replace(DIT, frequency_shift=1.0)
  folder_export.export(draw(config), config, tmp_path, format="diffusers")
  file = tmp_path / "config.json"
  text = file.read_text()
  file.write_text(text.replace('"num_layers": 2', '"num_layers": 1'))
  assert weights.open(tmp_path).config().depth == 1


def test_no_format_holds_it(draw, tmp_path):
  config = dataclasses.replace(DIT, position="rope2d")
  folder_export.export(draw(DIT), DIT, tmp_path, format="original")
  file = (tmp_path / "model.safetensors").rename(tmp_path / "x.safetensors")
  with pytest.raises(errors.UserError, match="position = 'rope2d', there"):
    weights.open(file).leaves(config)


@pytest.mark.parametrize("format", ["torch", "diffusers", "original"])
def test_an_export_holds_one_parameter_at_a_time(
  draw, tmp_path, monkeypatch, format
):
  mesh = jax.make_mesh((2,), ("fsdp",))
  whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  config = dataclasses.replace(
    DIT, frequency_shift=float(format == "diffusers")
  )
  params = jax.device_put(draw(config), whole)
  real, held = tables._fetched, []

  def fetched(leaf):
    assert not [array for array in held if array() is not None]
    array = np.array(real(leaf))
    held.append(weakref.ref(array))
    return array

  monkeypatch.setattr(tables, "_fetched", fetched)
  out = tmp_path / "out"
  if format == "torch":
    torch_export.export(params, config, out)
  else:
    folder_export.export(params, config, out, format=format, max_bytes=9000)
  leaves = jax.tree.leaves(params)
  assert len(held) == len(leaves)
  assert all(leaf._npy_value is None for leaf in leaves)


def test_whoever_imports_says_what_the_tensors_do_not(draw, tmp_path):
  config = dataclasses.replace(DIT, frequency_shift=1.0)
  params = draw(config)
  folder_export.export(params, config, tmp_path, format="diffusers")
  # Released weights, trained by the paper's code.
  _, leaves = weights.open(tmp_path).leaves(DIT)
  assert_same(params, leaves)
