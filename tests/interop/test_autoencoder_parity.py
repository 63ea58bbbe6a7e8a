"""The autoencoders are those of diffusers, there and back, in tiles as well."""

# Shape suffixes: B batch, H height, W width, C channels.

import functools
import json

import jax
import numpy as np
import pytest
from safetensors import numpy as safetensors

from flowjax import errors
from flowjax.interop import diffusers_configs, formats, vae
from flowjax.models import autoencoder, tiles, vq

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

TOLERANCE = 1e-4
WEIGHTS = "diffusion_pytorch_model.safetensors"
SIDE = 16
SMALL = dict(
  image_size=(SIDE, SIDE), widths=(8, 16), depth=1, groups=4, channels=3
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


@functools.cache
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


@pytest.mark.slow(1)
def test_what_is_encoded_and_decoded(pair):
  config, params, theirs, _ = pair
  x_BHWC = images(2, SIDE, SIDE, 3)
  with torch.no_grad():
    found = theirs.encode(torch_of(x_BHWC))
  own = module_of(config)
  if config.name == "vq":

    @jax.jit
    def encode(x_BHWC):
      z_BHWC = vq.latents(config, params, x_BHWC)
      return z_BHWC, *vq.encode(config, params, x_BHWC)

    z_BHWC, chosen_BHWC, index_BHW = encode(x_BHWC)
    close(z_BHWC, numpy_of(found.latents))
    with torch.no_grad():
      theirs_BCHW, _, (_, _, index_N) = theirs.quantize(found.latents)
    close(chosen_BHWC, numpy_of(theirs_BCHW))
    assert (np.ravel(index_BHW) == index_N.numpy()).all()
    assert len(np.unique(index_BHW)) > 3
  else:

    @jax.jit
    def encode(x_BHWC):
      moments = autoencoder.encode(config, params, x_BHWC)
      z_BHWC = autoencoder.sample(*moments, jax.random.key(0))
      return z_BHWC, *moments, autoencoder.divergence(*moments)

    z_BHWC, mean, log_variance, divergence = encode(x_BHWC)
    close(mean, numpy_of(found.latent_dist.mean))
    close(log_variance, numpy_of(found.latent_dist.logvar))
    with torch.no_grad():
      close(divergence / mean[0].size,
            found.latent_dist.kl().numpy() / mean[0].size)  # fmt: skip
  with torch.no_grad():
    image = theirs.decode(torch_of(z_BHWC)).sample
  ours = jax.jit(lambda z: own.decode(config, params, z))(z_BHWC)
  close(ours, numpy_of(image))
  assert np.std(ours) > 0.05


def test_the_way_back(pair, tmp_path):
  config, params, theirs, folder = pair
  theirs.save_pretrained(tmp_path)
  ours, read = vae.open(tmp_path)
  assert ours == config
  jax.tree.map(np.testing.assert_array_equal, read, params)
  content = json.loads((folder / "config.json").read_text())
  assert diffusers_configs.write(ours) == content


def changed(folder, **fields):
  """Writes other fields into a folder's config.json."""
  path = folder / "config.json"
  path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_older_names_of_attention_are_read(tmp_path):
  config = CONFIGS["kl"]
  params, path = random_params(config), tmp_path / WEIGHTS
  vae.write(tmp_path, config, params)
  older = {"to_q": "query", "to_k": "key", "to_v": "value"}
  older |= {"to_out.0": "proj_attn"}
  tensors = {}
  for key, tensor in safetensors.load_file(path).items():
    for new, old in older.items():
      key = key.replace(f".{new}.", f".{old}.")
    tensors[key] = tensor
  assert "decoder.mid_block.attentions.0.proj_attn.bias" in tensors
  safetensors.save_file(tensors, path)
  _, read = vae.open(tmp_path, dtype="bfloat16")
  assert read["decoder"]["in"]["bias"].dtype == "bfloat16"
  _, read = vae.open(tmp_path)
  jax.tree.map(np.testing.assert_array_equal, read, params)
  safetensors.save_file({**tensors, "encoder.more": np.zeros(3, "f4")}, path)
  with pytest.raises(errors.CheckpointError, match="unmapped    encoder.more"):
    vae.open(tmp_path)


@pytest.mark.parametrize(
  ("fields", "text"),
  [
    (dict(latents_mean=[0.1]), "latents_mean"),
    (dict(act_fn="gelu"), "act_fn = 'gelu'"),
    (dict(out_channels=1), "out_channels = 1"),
    (dict(up_block_types=["UpDecoderBlock2D"] * 2), "up_block_types"),
    (dict(down_block_types=[1, 2]), "list of names"),
    (dict(norm_num_groups=7), "groups=7 does not divide"),
    (dict(_class_name="AutoencoderTiny"), "no network of FlowJAX"),
    (dict(_class_name="DiTTransformer2DModel"), "autoencoder is"),
  ],
)
def test_folders_that_are_refused(tmp_path, fields, text):
  vae.write(tmp_path, CONFIGS["kl"], random_params(CONFIGS["kl"]))
  changed(tmp_path, **fields)
  with pytest.raises(errors.UserError, match=text):
    vae.open(tmp_path)


@pytest.mark.slow(2)
def test_tiles_fade_as_theirs():
  config = CONFIGS["kl_sixteen"]
  params = random_params(config)
  theirs = class_of(config).from_config(diffusers_configs.write(config))
  table = formats.layout(config, "diffusers")
  state = {k: torch.as_tensor(v) for k, v in table.to_theirs(params)}
  theirs.load_state_dict(state)
  theirs.enable_tiling()
  height, width = (side // config.factor for side in (28, 20))
  z_BHWC = images(1, height, width, config.latent_channels)
  decode = jax.jit(lambda z: autoencoder.decode(config, params, z))
  tiled = tiles.decode(config, decode, z_BHWC)
  with torch.no_grad():
    close(tiled, numpy_of(theirs.decode(torch_of(z_BHWC)).sample))
  whole = decode(z_BHWC)
  assert whole.shape == tiled.shape
  assert np.abs(whole - tiled).max() > 1e-2  # Or there were no tiles.
