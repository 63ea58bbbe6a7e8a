"""`--verify` compares what diffusers makes of an export with what we make."""

import dataclasses

import pytest

from flowjax import models
from flowjax.interop import diffusers_check, folder_export, tables
from flowjax.models import flux, mmdit

pytest.importorskip("torch")
pytest.importorskip("diffusers")

TEXT = dict(
  image_size=(4, 8), channels=2, text_width=10, pooled_width=6, text_tokens=5
)
CONFIGS = {
  "mmdit": mmdit.MMDiTConfig(
    **TEXT, depth=2, heads=2, head_size=8, dual_layers=1, position_table=8
  ),
  "flux": flux.FluxConfig(
    **TEXT,
    width=16,
    heads=2,
    double_depth=1,
    single_depth=1,
    rope_axes=(2, 2, 4),
    train_guidance=2.5,
  ),
}
LABELS = dict(num_classes=3, label_tokens=2)


@pytest.mark.slow
@pytest.mark.parametrize("labels", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_verify_compares_with_diffusers(draw, tmp_path, name, labels):
  config = dataclasses.replace(CONFIGS[name], **LABELS if labels else {})
  params = draw(config)
  folder_export.export(params, config, tmp_path, format="diffusers")
  network = models.build(config)
  assert diffusers_check.verify(tmp_path, network, params) <= 2e-5
  path = "label_embed/text" if labels else "pooled_embed/out/kernel"
  tables.flatten(params)[path][...] += 0.1
  assert diffusers_check.verify(tmp_path, network, params) > 1e-4
