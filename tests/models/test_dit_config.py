import dataclasses

import pytest

from flowjax import errors, models, schema
from flowjax.models import dit


@pytest.mark.parametrize(
  "change, message",
  [
    (dict(patch_size=3), "patch_size=3 does not divide .*32x32.*1, 2, 4, 8"),
    (dict(image_size=(32, 48), patch_size=5), "32x48.*1, 2, 4, 8, 16"),
    (dict(heads=7), "heads=7 does not divide width=384.*6, 8"),
    (dict(heads=64), "divisible by 4, not 6 .*32.*multiples of 256.*sincos2d"),
    (dict(position="sincos2d", width=390), "width=390 is not divisible by 4"),
    (dict(mlp="swigloo"), "mlp='swigloo'.*'swiglu'"),
    (dict(position="rope"), "position='rope'.*'rope2d'"),
    (dict(remat="save_atention"), "'save_atention'.*'save_attention'"),
    (dict(dtype="bf16"), "dtype='bf16'.*'bfloat16'"),
    (dict(attention="cudn"), "attention='cudn'.*'cudnn'"),
    (dict(name="dot"), "name='dot'.*'dit'"),
    (dict(label_dropout=1.0), "label_dropout=1.0.*below 1"),
    (dict(label_dropout=-0.1), "label_dropout=-0.1.*at least 0"),
    (dict(depth=0), "depth=0 must be positive"),
    (dict(out_channels=0), "out_channels=0 must be positive"),
    (dict(image_size=(0, 32)), r"image_size=\(0, 32\)"),
  ],
)
def test_an_impossible_value_is_refused_with_a_remedy(change, message):
  with pytest.raises(ValueError, match=message):
    dit.DiTConfig(**change)


def test_what_a_remedy_names_is_accepted():
  for heads in (4, 6, 8):
    assert dit.DiTConfig(heads=heads).head_size * heads == 384
  assert dit.DiTConfig(heads=32).head_size == 12
  assert dit.DiTConfig(heads=64, width=256).head_size == 4
  assert dit.DiTConfig(heads=64, position="sincos2d").head_size == 6


def test_a_mapping_becomes_a_config():
  config = schema.build(
    models.CONFIGS["dit"], {"image_size": [8, 16], "heads": 4}, "config.model"
  )
  assert config.image_size == (8, 16) and config.grid == (4, 8)
  with pytest.raises(errors.UserError, match="config.model: heads=7"):
    schema.build(dit.DiTConfig, {"heads": 7}, "config.model")


@pytest.mark.parametrize(
  "width, ratio, hidden", [(384, 4.0, 1024), (64, 4.0, 176), (1152, 4.0, 3072)]
)
def test_swiglu_costs_what_gelu_does(width, ratio, hidden):
  config = dit.DiTConfig(width=width, heads=4, mlp_ratio=ratio, mlp="swiglu")
  assert config.mlp_width == hidden and hidden % 8 == 0
  gelu = dataclasses.replace(config, mlp="gelu")
  assert abs(3 * config.mlp_width / (2 * gelu.mlp_width) - 1) < 0.05


def test_sizes_are_those_of_the_paper():
  for size, fields in dit.SIZES.items():
    config = dit.DiTConfig(**fields)
    assert config.head_size == (72 if size == "xl" else 64)
