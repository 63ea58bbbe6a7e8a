"""Parameters are drawn anywhere, whatever body of attention reads them."""

import dataclasses

import jax
import pytest

from flowjax.models import dit, flux, mmdit

IMAGES = dict(image_size=(4, 4), channels=2, heads=2)
TEXT = dict(**IMAGES, text_width=6, pooled_width=4, text_tokens=3)
NETWORKS = [
  (dit, dit.DiTConfig(**IMAGES, width=16, depth=1, num_classes=3)),
  (mmdit, mmdit.MMDiTConfig(**TEXT, head_size=8, depth=2, position_table=8)),
  (
    flux,
    flux.FluxConfig(
      **TEXT, width=16, double_depth=1, single_depth=1, rope_axes=(2, 2, 4)
    ),
  ),
]


@pytest.mark.parametrize(
  "module, config", NETWORKS, ids=lambda x: getattr(x, "name", "")
)
@pytest.mark.parametrize("body", ["cudnn", "splash", "ring"])
def test_a_kernel_that_is_elsewhere_is_not_needed_to_draw(module, config, body):
  """So a step for TPUs can be compiled where there is none."""
  config = dataclasses.replace(config, attention=body)
  params = jax.eval_shape(
    lambda rng: module.init(config, rng), jax.random.key(0)
  )
  assert params["patch_embed"]["kernel"].ndim == 2
