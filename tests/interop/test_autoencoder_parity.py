"""The autoencoders are those of diffusers, there and back, in tiles as well."""

# Shape suffixes: B batch, H height, W width, C channels.

import dataclasses
import json

import diffusers
import jax
import numpy as np
import pytest
import torch

from flowjax.interop import diffusers_configs, formats, vae
from flowjax.models import autoencoder, tiles, vq

TOLERANCE = 1e-4
SIDE = 32
SMALL = dict(
  image_size=(SIDE, SIDE), widths=(16, 32), depth=1, groups=8, channels=3
)
CONFIGS = {
  "kl": autoencoder.AutoencoderConfig(**SMALL, attention_levels=(1,)),
  "kl_sixteen": autoencoder.AutoencoderConfig(
    **SMALL,
    latent_channels=16,
    use_quant_conv=False,
    use_post_quant_conv=False,
    middle_attention=False,
    shift_factor=0.1,
  ),
  "vq": vq.VQConfig(**SMALL, codes=16, code_width=2),
}


def module_of(config):
  return vq if config.name == "vq" else autoencoder


def random_params(config, seed=0):
  """Draws all parameters, also those that begin as zeros or ones."""
  shapes = jax.eval_shape(
    lambda: module_of(config).init(config, jax.random.key(0))
  )
  rng = np.random.default_rng(seed)

  def draw(path, leaf):
    fan_in = np.prod(leaf.shape[:-1])
    spread = 1.0 / np.sqrt(fan_in) if len(leaf.shape) > 1 else 0.3
    center = float(path[-1].key == "scale")
    # Vectors of a codebook that are as far apart as latents are.
    spread = 1.0 if path[-1].key == "embedding" else spread
    return (center + spread * rng.standard_normal(leaf.shape)).astype("f4")

  return jax.tree_util.tree_map_with_path(draw, shapes)


def torch_of(x_BHWC):
  return torch.as_tensor(np.array(x_BHWC)).permute(0, 3, 1, 2)


def numpy_of(x_BCHW):
  return x_BCHW.permute(0, 2, 3, 1).numpy()


def images(*shape, seed=1):
  return np.random.default_rng(seed).uniform(-1, 1, shape).astype("f4")


def close(ours, theirs):
  np.testing.assert_allclose(ours, theirs, atol=TOLERANCE, rtol=0)


def class_of(config):
  return diffusers.VQModel if config.name == "vq" else diffusers.AutoencoderKL


@pytest.fixture(scope="module", params=CONFIGS)
def pair(request, tmp_path_factory):
  """Ours, written, and what diffusers makes of the folder."""
  config = CONFIGS[request.param]
  params, folder = random_params(config), tmp_path_factory.mktemp("vae")
  vae.write(folder, config, params)
  theirs, info = class_of(config).from_pretrained(
    folder, output_loading_info=True, low_cpu_mem_usage=False
  )
  assert not any(info.values()), info
  return config, params, theirs.eval(), folder


def test_what_is_encoded_and_decoded(pair):
  config, params, theirs, _ = pair
  x_BHWC = images(2, SIDE, SIDE, 3)
  with torch.no_grad():
    found = theirs.encode(torch_of(x_BHWC))
  if config.name == "vq":
    h_BHWC = vq.latents(config, params, x_BHWC)
    close(h_BHWC, numpy_of(found.latents))
    chosen_BHWC, index_BHW = vq.encode(config, params, x_BHWC)
    with torch.no_grad():
      theirs_BCHW, _, (_, _, index_N) = theirs.quantize(found.latents)
    close(chosen_BHWC, numpy_of(theirs_BCHW))
    assert (np.ravel(index_BHW) == index_N.numpy()).all()
    assert len(np.unique(index_BHW)) > 3
    z_BHWC = h_BHWC
  else:
    mean, log_variance = autoencoder.encode(config, params, x_BHWC)
    close(mean, numpy_of(found.latent_dist.mean))
    close(log_variance, numpy_of(found.latent_dist.logvar))
    with torch.no_grad():
      close(autoencoder.divergence(mean, log_variance) / mean[0].size,
            found.latent_dist.kl().numpy() / mean[0].size)  # fmt: skip
    z_BHWC = autoencoder.sample(mean, log_variance, jax.random.key(0))
  with torch.no_grad():
    image = theirs.decode(torch_of(z_BHWC)).sample
  ours = module_of(config).decode(config, params, z_BHWC)
  close(ours, numpy_of(image))
  assert np.std(ours) > 0.05


def test_the_way_back(pair, tmp_path):
  config, params, theirs, folder = pair
  theirs.save_pretrained(tmp_path)
  ours, read = vae.open(tmp_path)
  assert (
    ours == dataclasses.replace(config, code_width=2)
    if (config.name == "vq")
    else ours == config
  )
  jax.tree.map(np.testing.assert_array_equal, read, params)
  content = json.loads((folder / "config.json").read_text())
  assert diffusers_configs.write(ours) == content


def test_tiles_fade_as_theirs():
  config = CONFIGS["kl_sixteen"]
  params = random_params(config)
  theirs = class_of(config).from_config(diffusers_configs.write(config))
  table = formats.layout(config, "diffusers")
  state = {k: torch.as_tensor(v) for k, v in table.to_theirs(params)}
  theirs.load_state_dict(state)
  theirs.enable_tiling()
  x_BHWC = images(1, 56, 40, 3)
  with torch.no_grad():
    found = theirs.encode(torch_of(x_BHWC)).latent_dist
    encode = jax.jit(lambda x: autoencoder.encode(config, params, x))
    mean, log_variance = tiles.encode(config, encode, x_BHWC)
    close(mean, numpy_of(found.mean))
    close(log_variance, numpy_of(found.logvar))
    z_BHWC = np.array(mean)
    decode = jax.jit(lambda z: autoencoder.decode(config, params, z))
    tiled = tiles.decode(config, decode, z_BHWC)
    close(tiled, numpy_of(theirs.decode(torch_of(z_BHWC)).sample))
  whole = decode(z_BHWC)
  assert whole.shape == tiled.shape
  assert np.abs(whole - tiled).max() > 1e-2  # Or there were no tiles.
