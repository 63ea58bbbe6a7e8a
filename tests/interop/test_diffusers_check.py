"""`--verify` compares what diffusers makes of an export with what we make."""

import dataclasses
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowjax import errors, models
from flowjax.interop import diffusers_check, folder_export, tables, weights
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


@pytest.mark.parametrize("name", CONFIGS)
def test_their_save_of_our_export_comes_back_the_same(draw, tmp_path, name):
  qk_norm = dict(qk_norm=True) if name == "mmdit" else {}
  config = dataclasses.replace(CONFIGS[name], **qk_norm)
  params = draw(config)
  folder_export.export(params, config, tmp_path / "out", format="diffusers")
  diffusers_check.load(tmp_path / "out").save_pretrained(tmp_path / "again")
  found = weights.open(tmp_path / "again")
  # Their config.json does not say for which images and texts it is.
  unsaid = ("image_size", "text_tokens", "train_guidance")
  said = {key: getattr(config, key) for key in unsaid if hasattr(config, key)}
  assert found.format == "diffusers" and found.network == name
  assert found.config(type(config)(**said)) == config
  leaves, wanted = dict(found.leaves(config)[1]), tables.flatten(params)
  assert leaves.keys() == wanted.keys()
  for path, leaf in wanted.items():
    np.testing.assert_array_equal(leaves[path], leaf, err_msg=path)


@pytest.mark.slow
def test_what_rounding_does_to_positions_is_no_difference(draw, tmp_path):
  config = dataclasses.replace(CONFIGS["mmdit"], depth=1, dual_layers=0)
  params = draw(config)
  folder_export.export(
    params, config, tmp_path, format="diffusers", dtype="bfloat16"
  )
  rounded = jax.tree.map(
    lambda leaf: np.float32(leaf.astype(jnp.bfloat16)), params
  )
  args = (tmp_path, models.build(config), rounded)
  assert diffusers_check.verify(*args, dtype="bfloat16") <= 2e-5
  assert diffusers_check.verify(*args) > 1e-4


def test_the_first_reason_is_told(monkeypatch):
  """Their imports are lazy, and say of what failed only that it did."""

  def fail(name):
    if name != "diffusers":
      raise ImportError(name)
    try:
      raise RuntimeError("operator does not exist")
    except RuntimeError as error:
      raise ImportError("look up to see its traceback") from error

  monkeypatch.setattr(diffusers_check.importlib, "import_module", fail)
  with pytest.raises(errors.UserError, match="here: operator does not exist"):
    diffusers_check.require("FluxTransformer2DModel")


def test_a_torchvision_of_another_torch_is_passed_over(monkeypatch, caplog):
  def fail(name):
    assert name == "torchvision"
    raise RuntimeError("operator torchvision::nms does not exist")

  monkeypatch.setitem(sys.modules, "torchvision", sys)
  monkeypatch.setattr(diffusers_check.importlib, "import_module", fail)
  diffusers_check._hide_unfit_torchvision()
  assert sys.modules["torchvision"] is None
  assert "is passed over: operator torchvision::nms" in caplog.text
