"""A table is its rules: shapes, order and the way back follow from them."""

import ml_dtypes
import numpy as np
import pytest

from flowjax import errors
from flowjax.interop import dit, lazy, safetensors, tables
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
  assert "3 of the parameters" in text
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
  assert "3 of the tensors" in text
  assert "unmapped    layers.3.qkv.bias [24]" in text
  assert "missing     layers.2.qkv.bias [24]" in text
  assert "mis-shaped  layers.0.qkv.bias [24, 1], should be [24]" in text


def round_trip(table, params):
  tensors = dict(table.to_theirs(params))
  assert list(tensors) == list(table.keys)
  assert {k: v.shape for k, v in tensors.items()} == table.keys
  back = tables.flatten(table.to_ours(tensors))
  for path, leaf in tables.flatten(params).items():
    np.testing.assert_array_equal(back[path], leaf)
  return tensors


def test_parts_have_names_and_layers_may_start_anywhere():
  rules = tables.linear(
    "mixer/qkv",
    "layers.{L}.to_{P}",
    "D -> P N H",
    names={"P": ("q", "k", "v"), "L": ("4", "5", "6")},
  )
  params = qkv_params()
  tensors = round_trip(tables.Table(rules, SIZES), params)
  qkv = params["mixer"]["qkv"]
  np.testing.assert_array_equal(
    tensors["layers.5.to_k.weight"], qkv["kernel"][1, :, 1].reshape(8, 8).T
  )
  np.testing.assert_array_equal(
    tensors["layers.6.to_v.bias"], qkv["bias"][2, 2].reshape(8)
  )


def test_what_they_hold_several_times_must_be_the_same():
  rule = tables.Rule("embed/kernel", "blocks.{L}.embed.weight", "D H -> L H D")
  table = tables.Table((rule,), SIZES)
  kernel = np.arange(32, dtype=np.float32).reshape(8, 4)
  tensors = round_trip(table, {"embed": {"kernel": kernel}})
  np.testing.assert_array_equal(tensors["blocks.2.embed.weight"], kernel.T)
  tensors["blocks.1.embed.weight"] = kernel.T + 1
  with pytest.raises(errors.CheckpointError, match="blocks.1.embed.weight is"):
    table.to_ours(tensors)


def test_an_axis_may_run_the_other_way():
  rules = tables.linear("out/mod", "norm_out.linear", "D -> P H", flip="P")
  kernel = np.arange(96, dtype=np.float32).reshape(8, 3, 4)
  params = {"out": {"mod": {"kernel": kernel, "bias": kernel[0]}}}
  tensors = round_trip(tables.Table(rules, SIZES), params)
  np.testing.assert_array_equal(
    tensors["norm_out.linear.weight"], kernel[:, ::-1].reshape(8, 12).T
  )


def test_rules_of_one_key_are_joined():
  table = tables.Table(
    (
      *tables.linear(
        "a/out", "layers.{L}.out", "N H -> D", bias=False, along=1
      ),
      *tables.linear("b/out", "layers.{L}.out", "P -> D", along=1),
    ),
    SIZES,
  )
  rng = np.random.default_rng(0)
  heads, parts, bias = (
    rng.standard_normal(shape) for shape in ((3, 2, 4, 8), (3, 3, 8), (3, 8))
  )
  params = {
    "a": {"out": {"kernel": heads}},
    "b": {"out": {"kernel": parts, "bias": bias}},
  }
  tensors = round_trip(table, params)
  expected = np.concatenate([heads[1].reshape(8, 8).T, parts[1].T], axis=1)
  np.testing.assert_array_equal(tensors["layers.1.out.weight"], expected)


def test_a_leaf_is_read_when_it_is_asked_for_in_any_dtype():
  table = qkv_table()
  wanted = qkv_params()
  tensors = {key: np.array(x) for key, x in table.to_theirs(wanted)}
  leaves = dict(table.leaves_of_ours(tensors))
  for tensor in tensors.values():
    tensor += 1
  for path, value in tables.flatten(wanted).items():
    leaf = leaves[path]
    assert (leaf.shape, leaf.dtype) == (value.shape, value.dtype)
    read = np.asarray(leaf, np.float16)
    np.testing.assert_array_equal(read, (value + 1).astype(np.float16))
    # Then JAX on a CPU need not copy it.
    assert read.flags.c_contiguous and read.ctypes.data % 64 == 0


def odd_table():
  """Axes apart and together, stacked and turned, none of them round."""
  sizes = {"L": 3, "N": 5, "H": 7, "D": 50, "P": 3, "F": 33, "A": 1, "B": 1}
  rules = (
    *tables.linear("a", "a.{L}.{P}", "D -> P N H"),
    *tables.linear("b", "b.{L}", "N H -> D"),
    *tables.linear("c", "c.{L}", "D -> F", flip="F"),
    tables.Rule("d", "d", "A B -> B A"),
    tables.Rule("e", "e", "D F -> D F"),
    tables.Rule("f", "f", "(N H) D -> D (H N)", flip="D"),
    tables.Rule("g", "g.{P}", "P D F -> P F D", flip="P"),
  )
  return tables.Table(rules, sizes)


def odd_params(table):
  rng = np.random.default_rng(0)
  return {
    path: rng.standard_normal(shape, np.float32)
    for path, shape in table.paths.items()
  }


@pytest.mark.parametrize("part", [1, 600, 2**20])
def test_odd_shapes_are_copied_whole_in_parts(monkeypatch, part):
  monkeypatch.setattr(lazy, "_PART", part)
  monkeypatch.setattr(lazy, "_TILE", 20)
  table = odd_table()
  round_trip(table, tables.unflatten(odd_params(table)))


@pytest.mark.parametrize("in_file", [False, True])
def test_a_part_is_that_of_the_whole(monkeypatch, tmp_path, in_file):
  monkeypatch.setattr(lazy, "_PART", 100)
  table = odd_table()
  params = odd_params(table)
  tensors = dict(table.to_theirs(tables.unflatten(params)))
  if in_file:
    path = tmp_path / "x.safetensors"
    shapes = {key: x.shape for key, x in tensors.items()}
    safetensors.write(path, shapes, tensors.items(), dtype="float32")
    tensors = safetensors.read(path)
  rng = np.random.default_rng(1)
  for path, leaf in table.leaves_of_ours(tensors):
    for _ in range(4):
      first = [rng.integers(size) for size in leaf.shape]
      last = [
        rng.integers(low, size) + 1
        for low, size in zip(first, leaf.shape, strict=True)
      ]
      index = tuple(map(slice, first, last))
      part, finite = leaf.begin(index).result()
      np.testing.assert_array_equal(part, params[path][index])
      assert finite


def test_many_read_what_lies_in_one_row(monkeypatch):
  monkeypatch.setattr(lazy, "_PART", 100)
  sizes = []
  monkeypatch.setattr(
    safetensors, "touch", lambda x: [x, sizes.append(x.size)][0]
  )
  table = tables.Table(
    (tables.Rule("a", "a", "D F -> D F"),), SIZES | {"F": 99}
  )
  tensors = {"a": np.zeros((8, 99), np.float32)}
  ((_, leaf),) = table.leaves_of_ours(tensors)
  np.asarray(leaf)
  assert sum(sizes) == 8 * 99 and max(sizes) <= 100


def test_of_a_part_no_more_is_read_than_its_rows(monkeypatch):
  tensors = dict(qkv_table().to_theirs(qkv_params()))
  leaf = dict(qkv_table().leaves_of_ours(tensors))["mixer/qkv/kernel"]
  seen = []
  touch = safetensors.touch
  monkeypatch.setattr(
    safetensors, "touch", lambda x: [touch(x), seen.append(x)][0]
  )
  # Of three layers the last; of the outputs one of three parts; half a row.
  every = slice(None)
  leaf.begin((slice(2, 3), slice(4), slice(1, 2), every, every)).result()
  (rows,) = seen
  assert rows.size == 8 * 4
  assert np.shares_memory(rows, tensors["layers.2.qkv.weight"][8:16])


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e38])
def test_what_is_not_finite_is_found(value):
  table = odd_table()
  params = odd_params(table)
  for path in ("a/kernel", "e"):
    # The sum of many that are finite need not be so.
    params[path].reshape(-1)[:20] = value
  tensors = dict(table.to_theirs(tables.unflatten(params)))
  found = {
    path: leaf.begin((slice(None),) * len(leaf.shape)).result()[1]
    for path, leaf in table.leaves_of_ours(tensors)
  }
  broken = {path for path, finite in found.items() if not finite}
  assert broken == (set() if value == 1e38 else {"a/kernel", "e"})


def test_constants_are_written_and_must_be_as_the_config_has_them():
  places = np.linspace(0, 1, 8, dtype=np.float32)
  table = tables.Table(qkv_table().rules, SIZES, {"places": places})
  tensors = dict(table.to_theirs(qkv_params()))
  assert table.keys["places"] == (8,)
  np.testing.assert_array_equal(tensors["places"], places)
  table.to_ours(tensors | {"places": places.astype(ml_dtypes.bfloat16)})
  for wrong in (places + 0.01, np.full_like(places, np.nan)):
    with pytest.raises(errors.CheckpointError, match="places differs"):
      table.to_ours(tensors | {"places": wrong})
