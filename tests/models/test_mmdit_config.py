import pytest

from flowjax import models, schema
from flowjax.models import mmdit


@pytest.mark.parametrize(
  "change, message",
  [
    (dict(patch_size=3), "patch_size=3 does not divide .*128x128"),
    (dict(image_size=(512, 128)), "256x64 patches.*192x192.*rope2d"),
    (dict(image_size=(0, 32)), r"image_size=\(0, 32\)"),
    (
      dict(position="rope2d", head_size=6),
      "head_size=6 must be divisible by 4",
    ),
    (dict(heads=3, head_size=6), "18.*heads=3 of head_size=6.*divisible by 4"),
    (dict(dual_layers=24), "dual_layers=24.*below depth=24"),
    (dict(dual_layers=-1), "dual_layers=-1"),
    (dict(position="sincos"), "position='sincos'.*'sincos2d'"),
    (dict(remat="save_atention"), "'save_atention'.*'save_attention'"),
    (dict(dtype="bf16"), "dtype='bf16'.*'bfloat16'"),
    (dict(attention="cudn"), "attention='cudn'.*'cudnn'"),
    (dict(name="mmdot"), "name='mmdot'.*'mmdit'"),
    (dict(condition_dropout=1.0), "condition_dropout=1.0.*below 1"),
    (dict(out_channels=0), "out_channels=0 must be positive"),
    (dict(text_width=0), "text_width=0 must be positive"),
  ],
  ids=str,
)
def test_an_impossible_value_is_refused_with_a_remedy(change, message):
  with pytest.raises(ValueError, match=message):
    mmdit.MMDiTConfig(**change)


@pytest.mark.parametrize("size", mmdit.SIZES)
def test_a_mapping_becomes_a_config(size):
  values = {"image_size": [64, 192], **mmdit.SIZES[size]}
  config = schema.build(models.CONFIGS["mmdit"], values, "config.model")
  assert config.image_size == (64, 192) and config.grid == (32, 96)
  assert (
    config.width == 64 * config.depth and config.mlp_width == 4 * config.width
  )
