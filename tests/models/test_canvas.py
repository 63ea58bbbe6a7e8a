"""Networks on canvases: patches one under the other, and their grid.

What is on a canvas beyond the patches of its image is seen by nobody.
"""

# Shape suffixes: B batch, H height, W width, C channels.

import dataclasses

import jax
import numpy as np
import pytest

from flowjax import models
from flowjax.data import canvas
from flowjax.models import dit, flux, mmdit, patches, positions
from flowjax.parallel import mesh as meshes

SIZES = ((8, 8), (12, 4))  # All of the canvas, and a part of it.
TOKENS = 16

SHARED = dict(image_size=(8, 8), channels=1, num_classes=3)
TEXT = dict(text_width=8, pooled_width=4, label_tokens=3)
MMDIT = mmdit.MMDiTConfig(
  **SHARED, **TEXT, depth=2, dual_layers=1, heads=1, head_size=8,
  position_table=7, position_scale=0.5, position_offset=1.5,
)  # fmt: skip
DIT = dit.DiTConfig(**SHARED, width=16, depth=1, heads=2)
CONFIGS = {
  "dit, rope2d": DIT,
  "dit, sincos2d": dataclasses.replace(DIT, position="sincos2d"),
  "mmdit, sincos2d": MMDIT,
  "mmdit, rope2d": dataclasses.replace(
    MMDIT, position="rope2d", depth=1, dual_layers=0
  ),
  "flux": flux.FluxConfig(
    **SHARED, **TEXT, width=16, heads=1, double_depth=1, single_depth=1,
    rope_axes=(4, 4, 8), guidance_embed=False,
  ),
}  # fmt: skip


@pytest.mark.slow(1)
@pytest.mark.parametrize("name", CONFIGS)
def test_an_image_on_a_canvas_is_that_image(name):
  """One program for all aspects, with other noise in the rest of the canvas."""
  config, rng = CONFIGS[name], np.random.default_rng(0)
  net = models.build(config)
  shapes = jax.eval_shape(net.init, jax.random.key(0))
  params = jax.tree.map(
    lambda leaf: 0.3 * rng.standard_normal(leaf.shape, np.float32), shapes
  )
  t_B, label_B = np.array([0.3], np.float32), np.array([2], np.int32)
  images = [rng.standard_normal((1, *size, 1), np.float32) for size in SIZES]
  laid = np.concatenate([canvas.to_canvas(x, 2, TOKENS) for x in images])
  grid_B2 = np.array([(h // 2, w // 2) for h, w in SIZES], np.int32)
  for row, (rows, columns) in enumerate(grid_B2):
    laid[row, rows * columns * 2 :] = 100.0
  count = len(SIZES)
  program = jax.jit(net.apply)

  def apply(*inputs):
    return np.asarray(program(*inputs))

  v = apply(
    params, laid, np.repeat(t_B, count),
    {"label": np.repeat(label_B, count), "grid": grid_B2},
  )  # fmt: skip
  assert v.shape == laid.shape
  for row, image in enumerate(images):
    image_v = apply(params, image, t_B, {"label": label_B})
    wanted = patches.patchify(image_v, 2)
    found = patches.patchify(v[row : row + 1], 2)[:, : wanted.shape[1]]
    assert np.abs(wanted).max() > 0.1
    np.testing.assert_allclose(found, wanted, atol=2e-5)


def test_places_within_a_grid_are_those_of_an_image_of_its_size():
  for rows, columns in ((4, 4), (2, 6), (6, 2)):
    grid_B2, count = np.array([[rows, columns]]), rows * columns
    pairs = [
      (
        positions.sincos2d(rows, columns, 16),
        positions.sincos2d_within(grid_B2, TOKENS, 16),
      ),
      (
        positions.sincos2d_centre(rows, columns, 16, 9, 0.5, 1.5),
        positions.sincos2d_centre_within(grid_B2, TOKENS, 16, 9, 0.5, 1.5),
      ),
      *zip(
        positions.rope2d(rows, columns, 8, 100.0),
        positions.rope2d(1, TOKENS, 8, 100.0, grid_B2),
        strict=True,
      ),
    ]
    for wanted, found in pairs:
      assert found.shape == (1, TOKENS, wanted.shape[-1])
      np.testing.assert_array_equal(found[0, :count], wanted)


def test_a_grid_without_its_canvas_is_refused():
  net, label = models.build(DIT), np.zeros(1, np.int32)
  x_BHWC, t_B = np.zeros((1, 8, 8, 1), np.float32), np.zeros(1, np.float32)
  with pytest.raises(ValueError, match=r"grid has shape \(1, 2\) .* 2 wide"):
    net.apply({}, x_BHWC, t_B, {"label": label, "grid": np.ones((1, 2))})


@pytest.mark.slow
def test_canvases_on_a_mesh_that_shares_their_tokens():
  """Of 15 tokens each device has 8, one of them of no image at all."""
  config, rng = CONFIGS["flux"], np.random.default_rng(1)
  net = models.build(config)
  shapes = jax.eval_shape(net.init, jax.random.key(0))
  params = jax.tree.map(
    lambda leaf: 0.3 * rng.standard_normal(leaf.shape, np.float32), shapes
  )
  grid_B2 = np.array([(3, 5), (4, 3), (2, 6), (5, 3)], np.int32)
  x = rng.standard_normal((4, 30, 2, 1), np.float32)
  cond = {"label": np.arange(4, dtype=np.int32) % 3, "grid": grid_B2}
  batch = x, rng.random(4, np.float32), cond
  wanted = jax.jit(net.apply)(params, *batch)
  mesh = meshes.build(meshes.MeshConfig(data=2, fsdp=2, context=2))
  placed = jax.device_put(batch, meshes.batch_sharding(mesh))
  # jit would answer with the program that it traced without a mesh.
  other = jax.jit(lambda params, *batch: net.apply(params, *batch))
  with meshes.use(mesh):
    found = other(jax.device_put(params, meshes.replicated(mesh)), *placed)
  for row, (rows, columns) in enumerate(grid_B2):
    real = rows * columns * 2
    np.testing.assert_allclose(found[row, :real], wanted[row, :real], atol=2e-5)
