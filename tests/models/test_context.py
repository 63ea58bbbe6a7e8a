"""Networks that are shown an image beside the one that they draw."""

# Shape suffixes: B batch, H height, W width, C channels, K of the context.

import dataclasses

import jax
import numpy as np
import pytest

from flowjax import models
from flowjax.models import dit, flux, mmdit, patches, text

TEXT = dict(
  channels=2, context_channels=3, text_width=8, pooled_width=8, text_tokens=4
)
NETWORKS = {
  "dit": dit.DiTConfig(
    image_size=(4, 8),
    channels=2,
    context_channels=3,
    width=16,
    depth=1,
    heads=2,
    num_classes=3,
    label_dropout=0.5,
  ),
  "mmdit": mmdit.MMDiTConfig(
    image_size=(4, 8), depth=1, heads=2, head_size=8, position_table=4, **TEXT
  ),
  "flux": flux.FluxConfig(
    image_size=(4, 8),
    width=16,
    heads=2,
    double_depth=1,
    single_depth=1,
    rope_axes=(2, 2, 4),
    **TEXT,
  ),
}
X_BHWC = np.random.default_rng(0).standard_normal((2, 4, 8, 2), np.float32)
T_B = np.array([0.2, 0.9], np.float32)


def told(network, seed=1):
  rng = np.random.default_rng(seed)
  cond = network.example(2)
  context = rng.standard_normal((2, 4, 8, 3), np.float32)
  return {**cond, "context": context}


def drawn(network):
  rng = np.random.default_rng(2)
  abstract = jax.eval_shape(network.init, jax.random.key(0))
  return jax.tree.map(
    lambda leaf: 0.3 * rng.standard_normal(leaf.shape, np.float32), abstract
  )


@pytest.mark.parametrize(
  "name",
  [
    "dit",
    *(pytest.param(n, marks=pytest.mark.slow) for n in ("mmdit", "flux")),
  ],
)
def test_a_network_sees_its_context_beside_the_image(name):
  network = models.build(NETWORKS[name])
  plain = models.build(dataclasses.replace(NETWORKS[name], context_channels=0))
  params, cond = drawn(network), told(network)
  program = jax.jit(network.apply)

  def apply(*inputs):
    return np.asarray(program(*inputs))

  v_BHWC = apply(params, X_BHWC, T_B, cond)
  assert v_BHWC.shape == X_BHWC.shape
  other = apply(params, X_BHWC, T_B, told(network, seed=3))
  assert np.abs(v_BHWC - other).max() > 1e-3
  # In a patch of 2x2 the rows of the kernel are (row, column, channel).
  kernel_PD = np.asarray(params["patch_embed"]["kernel"])
  image_PD = kernel_PD.reshape(4, 5, -1)[:, :2].reshape(8, -1)
  wide_PD = patches.with_context(image_PD, 2, 3)
  assert wide_PD.shape == kernel_PD.shape
  blind = {**params, "patch_embed": {**params["patch_embed"]}}
  blind["patch_embed"]["kernel"] = wide_PD
  alone = {**params, "patch_embed": {**params["patch_embed"]}}
  alone["patch_embed"]["kernel"] = image_PD
  without = {key: cond[key] for key in cond if key != "context"}
  np.testing.assert_allclose(
    apply(blind, X_BHWC, T_B, cond),
    jax.jit(plain.apply)(alone, X_BHWC, T_B, without),
    rtol=0,
    atol=1e-5,
  )
  # A multiply-add more for each token, channel of a patch, and width.
  assert network.flops - plain.flops == 2 * 8 * 12 * kernel_PD.shape[-1]


@pytest.mark.parametrize("name", NETWORKS)
def test_a_context_is_never_dropped(name):
  network = models.build(NETWORKS[name])
  cond = told(network)
  assert network.unconditional(cond)["context"] is cond["context"]
  dropped = network.dropped(cond, jax.random.key(0))
  np.testing.assert_array_equal(dropped["context"], cond["context"])


@pytest.mark.parametrize("name", NETWORKS)
def test_a_context_that_does_not_fit_is_refused(name):
  network = models.build(NETWORKS[name])
  params = jax.eval_shape(network.init, jax.random.key(0))
  cond = told(network)

  def ask(config, cond):
    jax.eval_shape(models.build(config).apply, params, X_BHWC, T_B, cond)

  without = {key: cond[key] for key in cond if key != "context"}
  with pytest.raises(ValueError, match="context_channels=3, and cond"):
    ask(NETWORKS[name], without)
  with pytest.raises(ValueError, match="context has shape"):
    ask(NETWORKS[name], {**cond, "context": cond["context"][..., :2]})
  plain = dataclasses.replace(NETWORKS[name], context_channels=0)
  with pytest.raises(ValueError, match="context_channels=0, and cond"):
    ask(plain, cond)
  with pytest.raises(ValueError, match="must not be negative"):
    dataclasses.replace(NETWORKS[name], context_channels=-1)


@pytest.mark.slow(1)
def test_a_network_with_an_encoder_of_its_own_is_shown_it_too():
  network = models.build(NETWORKS["mmdit"])
  encoder = text.TextConfig(vocabulary=5, tokens=4, width=8, depth=1, heads=1)
  both = models.with_text_encoder(
    network, encoder, (np.zeros(4, np.int32), np.ones(4, bool))
  )
  example = both.example(2)
  assert set(example) == {"token", "token_mask", "context"}
  cond = {**example, "context": told(network)["context"]}
  assert both.unconditional(cond)["context"] is cond["context"]
  params = drawn(both)
  apply = jax.jit(both.apply)
  one, other = (
    np.asarray(apply(params, X_BHWC, T_B, each)) for each in (cond, example)
  )
  assert np.abs(one - other).max() > 1e-3
