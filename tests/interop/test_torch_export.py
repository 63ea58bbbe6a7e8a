"""An export is complete, self-contained, and comes back bit for bit."""

import ast
import json
import subprocess
import sys

import jax
import ml_dtypes
import numpy as np
import pytest

from flowjax import errors
from flowjax.interop import safetensors, tables, torch_export


def assert_same(params, others):
  ours, theirs = tables.flatten(params), tables.flatten(others)
  assert ours.keys() == theirs.keys()
  for path, leaf in ours.items():
    assert theirs[path].dtype == leaf.dtype
    np.testing.assert_array_equal(theirs[path], leaf)


def test_comes_back_bit_for_bit(tiny, draw, tmp_path):
  config = tiny(position="learned", mlp="swiglu", qk_norm=True, depth=3)
  params = draw(config)
  torch_export.export(params, config, tmp_path / "out")
  assert torch_export.read_config(tmp_path / "out") == config
  assert_same(params, torch_export.load(tmp_path / "out"))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_rounded_once_it_is_rounded_no_more(tiny, draw, tmp_path, dtype):
  config = tiny()
  params = draw(config)
  numpy_dtype = getattr(ml_dtypes, dtype, None) or np.dtype(dtype)
  rounded = jax.tree.map(
    lambda leaf: leaf.astype(numpy_dtype).astype(np.float32), params
  )
  torch_export.export(params, config, tmp_path / "a", dtype=dtype)
  back = torch_export.load(tmp_path / "a")
  assert_same(rounded, back)
  torch_export.export(back, config, tmp_path / "b", dtype=dtype)
  weights = [tmp_path / name / "model.safetensors" for name in "ab"]
  assert weights[0].read_bytes() == weights[1].read_bytes()


def test_sharded_parameters_are_gathered(tiny, draw, tmp_path):
  config = tiny()
  params = draw(config)
  mesh = jax.make_mesh((2,), ("fsdp",))
  split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp"))
  sharded = params | {"blocks": jax.device_put(params["blocks"], split)}
  torch_export.export(sharded, config, tmp_path / "out")
  assert_same(params, torch_export.load(tmp_path / "out"))


def test_an_interrupted_export_leaves_nothing_half_written(
  tiny, draw, tmp_path, monkeypatch
):
  config = tiny()
  params, out = draw(config), tmp_path / "out"
  cast, written = safetensors._cast, []

  def interrupted(key, *rest):
    written.append(key)
    if len(written) == 9:
      raise KeyboardInterrupt
    return cast(key, *rest)

  monkeypatch.setattr(safetensors, "_cast", interrupted)
  with pytest.raises(KeyboardInterrupt):
    torch_export.export(params, config, out)
  assert not out.exists()
  torch_export.export(params, config, out)
  written.clear()
  with pytest.raises(KeyboardInterrupt):
    torch_export.export(draw(config, seed=1), config, out)
  assert_same(params, torch_export.load(out))


def test_a_tree_of_another_config_is_refused(tiny, draw, tmp_path):
  params = draw(tiny(qk_norm=True, depth=1))
  with pytest.raises(errors.CheckpointError) as caught:
    torch_export.export(params, tiny(depth=1, mlp="swiglu"), tmp_path / "out")
  assert "unmapped    blocks/attention/query_norm/scale" in str(caught.value)
  assert "mis-shaped  blocks/mlp/in/kernel" in str(caught.value)
  assert not (tmp_path / "out").exists()


def test_a_folder_without_an_export_is_refused(tmp_path):
  with pytest.raises(errors.UserError, match="not a finished export"):
    torch_export.load(tmp_path)


def test_an_unknown_dtype_is_refused(tiny, draw, tmp_path):
  with pytest.raises(errors.UserError, match="Did you mean 'bfloat16'"):
    torch_export.export(draw(tiny()), tiny(), tmp_path, dtype="bfloat")


def test_the_card_tells_what_is_known(tiny, draw, tmp_path):
  config = tiny(channels=1)
  card = {
    "step": 4000,
    "weights": "averaged (EMA)",
    "scores": {"sample_accuracy": 0.9912345, "parameters": 1_300_000},
    "config": {
      "data": {"source": "digits"},
      "sample": {
        "steps": 30,
        "solver": {"name": "euler"},
        "guidance": {"scale": 1.5, "interval": [0.1, 0.6]},
        "grid": {"shift": 2.0},
      },
    },
  }
  torch_export.export(draw(config), config, tmp_path, card=card)
  text = (tmp_path / "README.md").read_text()
  for part in (
    "# DiT trained on digits",
    "- Training step: 4,000",
    "- Weights: averaged (EMA)",
    "| `sample_accuracy` | 0.991235 |",
    "| `parameters` | 1300000 |",
    "| `patch_size` | 2 |",
    "| `rope_theta` | 10000 |",
    "- Images: 4 x 4; channels in: 1, out: 1",
    "steps=30,\n  solver='euler',\n  guidance=1.5,",
    "interval=(0.1, 0.6),\n  shift=2.0",
    "python model.py --labels",
    "Not chosen yet",
  ):
    assert part in text


def test_the_card_admits_what_is_not_known(tiny, draw, tmp_path):
  config = tiny(channels=4)
  params = draw(config)
  torch_export.export(params, config, tmp_path)
  text = (tmp_path / "README.md").read_text()
  assert text.count("Not recorded.") == 3
  assert "None were recorded" in text
  assert "The images are latents" in text
  count = sum(leaf.size for leaf in jax.tree.leaves(params))
  assert f"- Parameters: {count:,}, stored as float32" in text


def test_the_card_may_be_written_by_hand(tiny, draw, tmp_path):
  torch_export.export(draw(tiny()), tiny(), tmp_path, card="# Mine\n")
  assert (tmp_path / "README.md").read_text() == "# Mine\n"


def test_a_mistyped_entry_of_the_card_is_refused(tiny, draw, tmp_path):
  with pytest.raises(errors.UserError, match="card.score. Did you mean"):
    torch_export.export(draw(tiny()), tiny(), tmp_path, card={"score": {}})


def test_without_torch_the_error_says_what_to_install(monkeypatch):
  monkeypatch.setitem(sys.modules, "torch", None)
  with pytest.raises(errors.UserError, match=r"pip install -e '.\[torch\]'"):
    torch_export.require_torch()


@pytest.mark.slow(1)
def test_exporting_does_not_import_torch():
  command = (
    "import sys; from flowjax.interop import torch_export; "
    "assert not {'torch', 'tensorflow'} & set(sys.modules)"
  )
  subprocess.run([sys.executable, "-c", command], check=True)


def test_the_source_needs_torch_and_safetensors_alone(tiny, draw, tmp_path):
  torch_export.export(draw(tiny()), tiny(), tmp_path)
  tree = ast.parse((tmp_path / "model.py").read_text())
  imported = set()
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      imported |= {alias.name.split(".")[0] for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      imported.add((node.module or "").split(".")[0])
  foreign = imported - sys.stdlib_module_names
  assert foreign == {"torch", "safetensors"}


# Run where neither FlowJAX nor jax can be imported.
STRANGER = """
import builtins, runpy, sys
folder, out = sys.argv[1:]
original = builtins.__import__
def guarded(name, *rest, **named):
  assert name.split(".")[0] not in ("flowjax", "jax", "flax"), name
  return original(name, *rest, **named)
builtins.__import__ = guarded
sys.argv = ["model.py", "--labels=0,2,1", "--steps=2", f"--out={out}"]
runpy.run_path(f"{folder}/model.py", run_name="__main__")
assert not [name for name in sys.modules if name.startswith("flowjax")]
"""


@pytest.mark.slow
def test_a_stranger_draws_a_picture(tiny, draw, tmp_path):
  pytest.importorskip("torch")
  from PIL import Image

  config = tiny(channels=1, image_size=(4, 6))
  torch_export.export(draw(config), config, tmp_path / "export")
  subprocess.run(
    [
      *(sys.executable, "-I", "-c", STRANGER),
      *(str(tmp_path / "export"), str(tmp_path / "grid.png")),
    ],
    check=True,
    cwd=tmp_path,
  )
  picture = np.asarray(Image.open(tmp_path / "grid.png"))
  assert picture.shape == (32 * 4, 32 * 18)  # Large enough to be seen.
  assert picture.std() > 0


@pytest.mark.parametrize(
  "labels, text", [("0,7", "0 to 6"), ("-1", "0 to 6"), ("a", "value: 'a'")]
)
def test_a_stranger_mistypes_a_label(
  tiny, draw, tmp_path, monkeypatch, capsys, labels, text
):
  pytest.importorskip("torch")
  config = tiny(channels=1, num_classes=7)
  torch_export.export(draw(config), config, tmp_path)
  monkeypatch.setattr(sys, "argv", ["model.py", f"--labels={labels}"])
  with pytest.raises(SystemExit) as done:
    torch_export.load_module(tmp_path).main()
  assert done.value.code == 2 and text in capsys.readouterr().err


def test_config_json_holds_the_whole_model(tiny, draw, tmp_path):
  config = tiny(rope_theta=100.0)
  torch_export.export(draw(config), config, tmp_path, dtype="bfloat16")
  content = json.loads((tmp_path / "config.json").read_text())
  assert content["dtype"] == "bfloat16"
  assert content["model"]["rope_theta"] == 100.0
  assert content["model"]["image_size"] == [4, 4]


def test_a_network_of_another_flow_is_not_sampled_as_a_velocity(
  tiny, draw, tmp_path
):
  torch = pytest.importorskip("torch")
  config = tiny()
  torch_export.export(
    draw(config), config, tmp_path, path="vp", prediction="noise"
  )
  module = torch_export.load_module(tmp_path)
  net = module.load(tmp_path)
  with pytest.raises(ValueError, match="predicts 'noise' on the path 'vp'"):
    module.sample(net, torch.tensor([0]))
