"""Networks that are told how large images were, and what was cut off."""

# Shape suffixes: B batch, S numbers of a size, F frequencies of one.

import dataclasses

import jax
import numpy as np
import pytest

from flowjax import models
from flowjax.models import conditions, dit, flux, layers, mmdit

SHARED = dict(image_size=(4, 4), channels=1, num_classes=3)
TEXT = dict(text_width=8, pooled_width=4, label_tokens=2)
CONFIGS = {
  "dit": dit.DiTConfig(**SHARED, width=16, depth=1, heads=2),
  "mmdit": mmdit.MMDiTConfig(
    **SHARED, **TEXT, depth=1, heads=1, head_size=8, position="rope2d"
  ),
  "flux": flux.FluxConfig(
    **SHARED,
    **TEXT,
    width=16,
    heads=1,
    double_depth=1,
    single_depth=1,
    rope_axes=(4, 6, 6),
    guidance_embed=False,
  ),
}
SIZE_BS = np.array(
  [[768, 512, 64, 0, 512, 512], [100, 4096, 0, 1300, 256, 1024]], np.float32
)


def test_sizes_have_the_sinusoids_of_sdxl():
  torch = pytest.importorskip("torch")
  embeddings = pytest.importorskip("diffusers.models.embeddings")
  # As UNet2DConditionModel has it of SDXL's addition_embed_type.
  project = embeddings.Timesteps(256, True, 0)
  theirs = project(torch.from_numpy(SIZE_BS).flatten()).reshape(2, -1).numpy()
  ours = jax.jit(conditions.size_waves)(SIZE_BS)
  assert ours.shape == (2, 6 * 256)
  # An angle of 4096 has a last bit of 5e-4 in float32.
  np.testing.assert_allclose(ours, theirs, atol=3e-4)
  near = [SIZE_BS.ravel().tolist().index(number) for number in (64, 100)]
  ours, theirs = (
    np.asarray(waves).reshape(12, 256)[near] for waves in (ours, theirs)
  )
  np.testing.assert_allclose(ours, theirs, atol=1e-5)


@pytest.mark.slow(1)
@pytest.mark.parametrize("name", CONFIGS)
def test_a_network_hears_of_sizes_and_of_nothing_else_less(name):
  config = dataclasses.replace(CONFIGS[name], size_conditioning=True)
  net, rng = models.build(config), np.random.default_rng(0)
  shapes = jax.eval_shape(net.init, jax.random.key(0))
  params = jax.tree.map(
    lambda leaf: 0.2 * rng.standard_normal(leaf.shape, np.float32), shapes
  )
  # The same image twice, told as of two originals.
  x_BHWC = np.repeat(rng.standard_normal((1, 4, 4, 1), np.float32), 2, axis=0)
  t_B, label_B = np.full(2, 0.5, np.float32), np.array([1, 1], np.int32)
  apply = jax.jit(net.apply)
  told = {"label": label_B, "size_crop": SIZE_BS}
  one, other = apply(params, x_BHWC, t_B, told)
  assert np.abs(one - other).max() > 1e-3
  same = np.repeat(SIZE_BS[:1], 2, axis=0)
  alike, again = apply(params, x_BHWC, t_B, told | {"size_crop": same})
  np.testing.assert_array_equal(alike, again)
  np.testing.assert_allclose(alike, one, atol=1e-6)
  # What is dropped is the label alone.
  without = net.unconditional(told)
  np.testing.assert_array_equal(without["size_crop"], SIZE_BS)
  assert net.example(2)["size_crop"].shape == (2, 6)
  del told["size_crop"]
  with pytest.raises(ValueError, match="'size_crop': .*keys \\['label'\\]"):
    net.apply(params, x_BHWC, t_B, told)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_arithmetic_of_sizes_is_counted(name):
  config = CONFIGS[name]
  more = dataclasses.replace(config, size_conditioning=True)
  networks = [models.build(each) for each in (config, more)]
  kernels = [
    sum(
      leaf.size
      for path, leaf in jax.tree.leaves_with_path(
        jax.eval_shape(net.init, jax.random.key(0))
      )
      if path[-1].key == "kernel"
    )
    for net in networks
  ]
  assert networks[1].flops - networks[0].flops == 2 * (kernels[1] - kernels[0])
  assert kernels[1] - kernels[0] >= 6 * layers.TIME_FREQUENCIES * config.width
