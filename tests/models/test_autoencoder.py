"""The autoencoders: published sizes, arithmetic, slices, what is refused."""

# Shape suffixes: B batch, H height, W width, C channels, K codes, D width.

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowjax import models
from flowjax.models import autoencoder, convolutions, tiles, vq
from flowjax.parallel import flops

TINY = autoencoder.sized("tiny")
WITHOUT = dict(
  use_quant_conv=False, use_post_quant_conv=False, middle_attention=False
)
CODES = dict(depth=2, groups=8, codes=8, code_width=2)
BOTH = (
  dataclasses.replace(TINY, attention_levels=(0,)),
  dataclasses.replace(TINY, **WITHOUT),
  vq.VQConfig(image_size=(32, 32), widths=(16, 32), **CODES),
)


def abstract(config):
  network = models.build(config)
  return network, jax.eval_shape(network.init, jax.random.key(0))


@functools.cache
def traced(config):
  """Returns the number of parameters, and what an image of 512 becomes."""
  network, params = abstract(config)
  x = jax.ShapeDtypeStruct((1, 512, 512, 3), jnp.float32)
  moments = jax.eval_shape(network.encode, params, x)
  image = jax.eval_shape(network.decode, params, moments[0])
  count = sum(leaf.size for leaf in jax.tree.leaves(params))
  return count, *(each.shape for each in (*moments, image))


@pytest.mark.parametrize(
  ("size", "count"),
  [
    ("sd", 83_653_863),
    ("sdxl", 83_653_863),
    ("sd3", 83_819_683),
    ("flux", 83_819_683),
  ],
)
def test_published_sizes(size, count):
  config = autoencoder.sized(size)
  assert config.factor == 8
  # Two and two differ in what neither parameters nor shapes depend on.
  alike = dataclasses.replace(
    config, image_size=(512, 512), scaling_factor=1.0, shift_factor=None
  )
  latents = (1, 64, 64, config.latent_channels)
  assert traced(alike) == (count, latents, latents, (1, 512, 512, 3))


@pytest.mark.parametrize("config", BOTH)
def test_flops_are_those_of_the_program(config):
  network, params = abstract(config)
  x = jax.ShapeDtypeStruct((1, *config.image_size, 3), jnp.float32)

  def both(params, x):
    made = network.reconstruct(params, x, None)
    return network.last(params["decoder"]["out"], made.features_BHWC)

  assert flops.of(both, params, x).flops == network.flops


@pytest.fixture(name="params", scope="module")
def _params():
  rng = np.random.default_rng(0)
  return jax.tree.map(
    lambda leaf: 0.3 * rng.standard_normal(leaf.shape, np.float32),
    abstract(TINY)[1],
  )


def images(*shape):
  return jax.random.uniform(jax.random.key(1), shape, minval=-1.0)


def test_a_tile_that_holds_the_image_is_the_image(params):
  z_BHWC = images(3, 8, 8, TINY.latent_channels)
  decode = jax.jit(lambda z: autoencoder.decode(TINY, params, z))
  np.testing.assert_array_equal(
    tiles.decode(TINY, decode, z_BHWC), decode(z_BHWC)
  )


def test_tiles_of_what_needs_no_surroundings_are_the_whole():
  x_BHWC = images(1, 9, 15, 1)
  doubled = jax.jit(convolutions.doubled)

  @jax.jit
  def parted(x_BHWC):
    return tiles.tiled(doubled, x_BHWC, tile=8, tile_out=16)

  np.testing.assert_allclose(parted(x_BHWC), doubled(x_BHWC), atol=1e-6)
  with pytest.raises(ValueError, match="overlap=1.0"):
    tiles.tiled(doubled, x_BHWC, tile=8, tile_out=16, overlap=1.0)


def test_latents_are_scaled_and_back():
  config = autoencoder.sized("flux")
  z = np.asarray(images(1, 2, 2, 16))

  @jax.jit
  def there_and_back(z):
    scaled = autoencoder.scaled(config, z)
    return scaled, autoencoder.unscaled(config, scaled)

  scaled, again = there_and_back(z)
  np.testing.assert_allclose(scaled, (z - 0.1159) * 0.3611, rtol=1e-5)
  np.testing.assert_allclose(again, z, atol=1e-6)


def test_drawn_latents_have_their_mean_and_variance():
  mean = np.full((1, 64, 64, 4), 2.0, np.float32)
  log_variance = np.full_like(mean, np.log(9.0))
  z, found = jax.jit(
    lambda *moments: (
      autoencoder.sample(*moments, jax.random.key(0)),
      autoencoder.divergence(*moments),
    )
  )(mean, log_variance)
  z = np.asarray(z)
  np.testing.assert_allclose((z.mean(), z.std()), (2.0, 3.0), atol=0.1)
  # KL(N(2, 9) | N(0, 1)) = (4 + 9 - 1 - log 9) / 2.
  one = (4.0 + 9.0 - 1.0 - np.log(9.0)) / 2.0
  np.testing.assert_allclose(found, [one * mean.size], rtol=1e-5)


def test_statistics_are_in_float32():
  """In bfloat16 a mean of 1000 would swallow what deviates from it."""
  norm = convolutions.GroupNorm(2, silu=False)
  x_BHWC = (1000.0 + 8.0 * images(1, 32, 32, 4)).astype(jnp.bfloat16)
  y_BHWC, _ = jax.jit(norm.init_with_output)(jax.random.key(0), x_BHWC)
  assert y_BHWC.dtype == jnp.bfloat16
  assert abs(np.asarray(y_BHWC, np.float32).std() - 1.0) < 0.02


@pytest.mark.slow(1)
def test_blocks_are_computed_again():
  """With remat="full" the gradient has their first convolutions once more.

  What the second ones make it needs in no other place.
  """
  x = jax.ShapeDtypeStruct((1, 16, 16, 3), jnp.float32)

  def convolutions_of(remat):
    config = dataclasses.replace(TINY, remat=remat)

    def loss(params, x):
      return jnp.mean(autoencoder.reconstruct(config, params, x, None)[0])

    return flops.of(jax.grad(loss), abstract(config)[1], x).flops

  # Encoder and decoder, 16x16 with 16 channels and 8x8 with 32; a block takes
  # the channels of the level before.
  pairs = 16 * (16 + 16 + 32) * 16**2 + 32 * (16 + 32 + 32) * 8**2
  assert convolutions_of("full") == convolutions_of("none") + 2 * 9 * pairs


def test_a_latent_becomes_the_nearest_vector():
  code_KD = np.array([[0, 0], [1, 0], [0, 3]], np.float32)
  params = {"codebook": {"embedding": code_KD}}
  z = np.array([[0.6, 0.1], [0.4, -9.0], [0.0, 1.6]], np.float32)
  z = z.reshape(1, 1, 3, 2)

  def through(z):
    chosen, index = vq.quantise(params, z)
    return jnp.sum(3.0 * vq.straight_through(z, chosen)), (chosen, index)

  pull = jax.jit(jax.value_and_grad(through, has_aux=True))
  (value, (chosen, index)), slope = pull(z)
  assert index.tolist() == [[[1, 0, 2]]]
  np.testing.assert_array_equal(chosen[0, 0], code_KD[[1, 0, 2]])
  np.testing.assert_allclose(value, 3.0 * np.sum(chosen), rtol=1e-6)
  np.testing.assert_allclose(slope, 3.0)
  perplexity = jax.jit(vq.perplexity, static_argnums=0)
  in_use = perplexity(3, index, np.ones(1, np.float32))
  np.testing.assert_allclose(in_use, 3.0, rtol=1e-5)
  masked = np.array([1, 0], np.float32)
  assert perplexity(3, np.zeros((2, 1, 1), np.int32), masked) == 1


@pytest.mark.parametrize(
  ("changes", "text"),
  [
    ({"groups": 7}, "groups=7 does not divide"),
    ({"image_size": (30, 33)}, "not divisible by 2"),
    ({"attention_levels": (2,)}, "levels 0 to 1"),
    ({"widths": ()}, "no level"),
    ({"scaling_factor": 0.0}, "scaling_factor=0.0"),
    ({"remat": "dots"}, "remat='dots'"),
  ],
)
def test_configs_that_are_refused(changes, text):
  with pytest.raises(ValueError, match=text):
    dataclasses.replace(TINY, **changes)


def test_inputs_that_are_refused(params):
  with pytest.raises(ValueError, match="divisible by 2"):
    autoencoder.encode(TINY, params, images(1, 15, 16, 3))
  with pytest.raises(ValueError, match=r"latents \[B, H, W, 4\]"):
    autoencoder.decode(TINY, params, images(1, 8, 8, 3))
  with pytest.raises(ValueError, match="no velocity"):
    models.build(TINY).apply(params, None, None, {})
  with pytest.raises(ValueError, match="Did you mean 'sdxl'"):
    autoencoder.sized("sdxll")
