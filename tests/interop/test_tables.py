"""A table is its rules: shapes, order and the way back follow from them."""

import numpy as np
import pytest

from flowjax import errors
from flowjax.interop import dit, tables
from flowjax.models import blocks
from flowjax.models import dit as models_dit

SIZES = {"L": 3, "D": 8, "P": 3, "N": 2, "H": 4}


def qkv_table():
  rules = tables.linear("mixer/qkv", "layers.{L}.qkv", "D -> P N H")
  return tables.Table(rules, SIZES)


def qkv_params():
  kernel = np.arange(3 * 8 * 3 * 2 * 4, dtype=np.float32)
  bias = np.arange(3 * 3 * 2 * 4, dtype=np.float32)
  return {
    "mixer": {
      "qkv": {
        "kernel": kernel.reshape(3, 8, 3, 2, 4),
        "bias": bias.reshape(3, 3, 2, 4),
      }
    }
  }


def test_linear_is_transposed_flattened_and_unstacked():
  params = qkv_params()
  tensors = dict(qkv_table().to_theirs(params))
  kernel = params["mixer"]["qkv"]["kernel"]
  for layer in range(3):
    weight = tensors[f"layers.{layer}.qkv.weight"]
    np.testing.assert_array_equal(weight, kernel[layer].reshape(8, 24).T)


def test_shapes_and_order_of_export_are_known_beforehand():
  table = qkv_table()
  tensors = dict(table.to_theirs(qkv_params()))
  assert list(tensors) == list(table.keys)
  assert {k: v.shape for k, v in tensors.items()} == table.keys
  assert table.keys["layers.2.qkv.weight"] == (24, 8)
  assert table.paths["mixer/qkv/kernel"] == (3, 8, 3, 2, 4)


def test_several_axes_may_be_unstacked():
  rule = tables.Rule(
    "qkv/kernel", "blocks.{L}.part{P}.weight", "L D P N H -> L P (N H) D"
  )
  table = tables.Table((rule,), SIZES)
  kernel = qkv_params()["mixer"]["qkv"]["kernel"]
  tensors = dict(table.to_theirs({"qkv": {"kernel": kernel}}))
  np.testing.assert_array_equal(
    tensors["blocks.1.part2.weight"], kernel[1, :, 2].reshape(8, 8).T
  )
  back = table.to_ours(tensors)
  np.testing.assert_array_equal(back["qkv"]["kernel"], kernel)


OPTIONS = [
  dict(position=position, mlp=mlp, qk_norm=qk_norm)
  | dict(image_size=image_size, out_channels=out_channels)
  for position in models_dit.POSITIONS
  for mlp in blocks.MLPS
  for qk_norm in (False, True)
  for image_size in ((4, 4), (4, 6))
  for out_channels in (None, 3)
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_dit_there_and_back(tiny, draw, options):
  config = tiny(**options)
  params, table = draw(config), dit.torch_layout(config)
  back = table.to_ours(dict(table.to_theirs(params)))
  ours, again = tables.flatten(params), tables.flatten(back)
  assert ours.keys() == again.keys() == table.paths.keys()
  for path, leaf in ours.items():
    np.testing.assert_array_equal(again[path], leaf)


def test_unfit_parameters_are_all_listed():
  params = qkv_params()
  qkv = params["mixer"]["qkv"]
  qkv["bias"] = qkv["bias"][..., :3]
  qkv["colour"] = np.zeros((2, 5))
  del qkv["kernel"]
  with pytest.raises(errors.CheckpointError) as caught:
    dict(qkv_table().to_theirs(params))
  text = str(caught.value)
  assert "3 parameters" in text
  assert "unmapped    mixer/qkv/colour [2, 5]" in text
  assert "missing     mixer/qkv/kernel [3, 8, 3, 2, 4]" in text
  assert "mis-shaped  mixer/qkv/bias [3, 3, 2, 3], should be" in text


def test_unfit_tensors_are_all_listed():
  table = qkv_table()
  tensors = dict(table.to_theirs(qkv_params()))
  tensors["layers.0.qkv.bias"] = np.zeros((24, 1))
  tensors["layers.3.qkv.bias"] = tensors.pop("layers.2.qkv.bias")
  with pytest.raises(errors.CheckpointError) as caught:
    table.to_ours(tensors)
  text = str(caught.value)
  assert "3 tensors" in text
  assert "unmapped    layers.3.qkv.bias [24]" in text
  assert "missing     layers.2.qkv.bias [24]" in text
  assert "mis-shaped  layers.0.qkv.bias [24, 1], should be [24]" in text
