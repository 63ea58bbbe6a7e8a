"""MM-DiT and FLUX, exported to PyTorch, are ours in every option."""

# Shape suffixes: B batch, H height, W width, C channels, L text tokens, E and P
# widths of the text and of the pooled text.

import ast
import dataclasses
import functools
import importlib
import inspect
import re
import sys

import jax
import numpy as np
import pytest

from flowjax import models
from flowjax.flow import guidance, paths, solvers, times
from flowjax.interop import tables, torch_export, weights
from flowjax.models import flux, mmdit

torch = pytest.importorskip("torch")
SOURCES = {
  name: importlib.import_module(f"flowjax.interop.torch.{name}")
  for name in ("mmdit", "flux")
}

TEXT = dict(channels=2, text_width=10, pooled_width=6, text_tokens=5)
MMDIT = mmdit.MMDiTConfig(
  image_size=(4, 8), depth=2, heads=2, head_size=12, position_table=8, **TEXT
)
FLUX = flux.FluxConfig(
  image_size=(4, 8),
  width=24,
  heads=2,
  double_depth=2,
  single_depth=2,
  rope_axes=(2, 4, 6),
  train_guidance=2.5,
  **TEXT,
)
LABELS = dict(num_classes=3, label_tokens=2)
# Together they have every option of which the network depends.
CASES = {
  "mmdit": (MMDIT, dict(position_scale=0.3, position_offset=1.5)),
  "mmdit rope": (
    MMDIT,
    dict(
      **LABELS,
      position="rope2d",
      rope_theta=50.0,
      mlp_ratio=2.7,
      dual_layers=1,
    ),
  ),
  "mmdit dual": (
    MMDIT,
    dict(
      depth=3,
      dual_layers=1,
      qk_norm=True,
      timestep_scale=20.0,
      out_channels=3,
      patch_size=1,
      image_size=(3, 2),
    ),
  ),
  "flux": (FLUX, {}),
  "flux untold": (
    FLUX,
    dict(guidance_embed=False, patch_size=1, image_size=(3, 2), double_depth=1),
  ),
  "flux labels": (
    FLUX,
    dict(**LABELS, mlp_ratio=2.7, rope_theta=50.0, timestep_scale=20.0),
  ),
}


def config_of(case):
  base, changes = CASES[case]
  return dataclasses.replace(base, **changes)


@pytest.fixture(scope="module")
def exported(draw, tmp_path_factory):
  """Returns a function of a case: its config, its weights, and its export."""

  @functools.cache
  def of(case):
    config, folder = config_of(case), tmp_path_factory.mktemp("exported")
    params = draw(config)
    torch_export.export(params, config, folder)
    return config, params, folder

  return of


@pytest.mark.slow(1)
@pytest.mark.parametrize("case", CASES)
def test_outputs_agree(exported, case):
  config, params, folder = exported(case)
  assert torch_export.verify(folder, models.build(config), params) <= 1e-5


@pytest.mark.parametrize("case", CASES)
def test_an_export_comes_back_and_is_found(exported, case):
  config, params, folder = exported(case)
  ours = tables.flatten(params)
  found = weights.open(folder)
  assert found.config() == config and found.format == "torch"
  names, leaves = found.leaves(config)
  assert set(names) == ours.keys()
  for path, leaf in leaves:
    np.testing.assert_array_equal(leaf, ours[path], err_msg=path)
  loaded = torch_export.load_module(folder).load(folder)
  assert sum(p.numel() for p in loaded.parameters()) == sum(
    leaf.size for leaf in ours.values()
  )


def test_every_key_of_the_config_is_read():
  # Of what a text is counted with, and how it is computed, no weight knows.
  apart = {"name", "text_tokens", "condition_dropout"}
  apart |= {"size_conditioning"}  # With it there is no export.
  apart |= {"scan", "remat", "attention", "dtype"}
  for config in (MMDIT, FLUX):
    fields = {f.name for f in dataclasses.fields(SOURCES[config.name].Config)}
    assert fields == {f.name for f in dataclasses.fields(config)} - apart


@pytest.mark.slow(1)
@pytest.mark.parametrize(
  "case, path",
  [
    ("mmdit", "pooled_embed/out/kernel"),
    ("mmdit rope", "label_embed/text"),
    ("flux", "guidance_embed/in/kernel"),
  ],
)
def test_verify_sees_what_conditions_do(exported, case, path):
  config, params, folder = exported(case)
  params = jax.tree.map(np.copy, params)
  tables.flatten(params)[path][...] += 0.1
  assert torch_export.verify(folder, models.build(config), params) > 1e-4


def test_nobody_sees_a_text_that_is_padding(exported):
  cond = {
    "text": torch.randn(2, 5, 10),
    "pooled": torch.randn(2, 6),
    "text_mask": torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 0]]).bool(),
  }
  x_BCHW, t_B = torch.randn(2, 2, 4, 8), torch.rand(2)
  other_BLE = torch.where(cond["text_mask"][..., None], cond["text"], 7.0)
  for case in ("mmdit", "flux"):
    _, _, folder = exported(case)
    net = SOURCES[case].load(folder)
    wanted = net(x_BCHW, t_B, cond)
    torch.testing.assert_close(
      net(x_BCHW, t_B, cond | {"text": other_BLE}), wanted
    )
    del cond["text_mask"]
    assert (net(x_BCHW, t_B, cond) - wanted).abs().max() > 1e-3
    cond["text_mask"] = other_BLE[..., 0] != 7.0


def conditions(config, batch=2):
  """Returns a condition of a text with all that may come with it."""
  rng = np.random.default_rng(3)

  def text():
    return {
      "text": rng.standard_normal((batch, 5, config.text_width), np.float32),
      "pooled": rng.standard_normal((batch, config.pooled_width), np.float32),
      "text_mask": rng.random((batch, 5)) < 0.7,
    }

  cond = {**text(), "negative": text()}
  if config.name == "flux":
    cond["guidance"] = np.array([1.5, 3.0], np.float32)
  return cond


@pytest.mark.slow
@pytest.mark.parametrize(
  "case, solver, interval",
  [("mmdit", "heun", (0.3, 0.8)), ("flux labels", "euler", (0.0, 1.0))],
)
def test_samples_agree(exported, case, solver, interval):
  config, params, folder = exported(case)
  network = models.build(config)
  cond = conditions(config)
  if config.num_classes:
    cond = {"label": np.array([0, 2], np.int32)}
  field = guidance.classifier_free(
    lambda x_BHWC, t_B, cond: network.apply(params, x_BHWC, t_B, cond),
    cond,
    network.unconditional(cond),
    scale=3.0,
    interval=interval,
  )
  rng = np.random.default_rng(3)
  noise_BHWC = rng.standard_normal((2, 4, 8, 2), np.float32)
  ours_BHWC = jax.jit(
    lambda x_BHWC: solvers.solve(
      solvers.build(solver, paths.straight()),
      field,
      x_BHWC,
      times.uniform_grid(4, 2.0),
    )
  )(noise_BHWC)
  module = SOURCES[config.name]
  sampled_BCHW = module.sample(
    module.load(folder),
    jax.tree.map(torch.as_tensor, cond),
    steps=4,
    solver=solver,
    guidance=3.0,
    interval=interval,
    shift=2.0,
    noise_BCHW=torch.from_numpy(noise_BHWC).permute(0, 3, 1, 2),
  )
  np.testing.assert_allclose(
    sampled_BCHW.permute(0, 2, 3, 1), ours_BHWC, atol=2e-5
  )


def test_without_a_negative_text_there_is_none():
  cond = jax.tree.map(torch.as_tensor, conditions(MMDIT))
  network = torch.nn.Module()
  network.config = MMDIT
  for module in (SOURCES["mmdit"], SOURCES["flux"]):
    without = module.unconditional(network, cond)
    assert without["text"] is cond["negative"]["text"]
    rest = {key: cond[key] for key in cond if key != "negative"}
    without = module.unconditional(network, rest)
    assert not without["text"].any() and not without["pooled"].any()
    assert without["text_mask"].all()


@pytest.mark.parametrize("case", ["mmdit", "flux", "flux labels"])
@pytest.mark.parametrize("prediction", ["velocity", "noise"])
def test_what_the_card_shows_runs(
  exported, tmp_path, monkeypatch, case, prediction
):
  config, params, _ = exported(case)
  sample = {
    "steps": 2,
    "solver": {"name": "euler"},
    "guidance": {"scale": 1.5, "interval": [0.0, 1.0]},
    "grid": {"shift": 2.0},
  }
  torch_export.export(
    params,
    config,
    tmp_path,
    card={"config": {"sample": sample}},
    prediction=prediction,
  )
  text = (tmp_path / "README.md").read_text()
  assert ("FLUX.1" if config.name == "flux" else "2403.03206") in text
  assert ("velocity eps - x" in text) == (prediction == "velocity")
  assert ("3 labels" in text) == ("labels" in case)
  (block,) = re.findall(r"```python\n(.*?)```", text, re.S)
  monkeypatch.chdir(tmp_path)
  monkeypatch.syspath_prepend(tmp_path)
  monkeypatch.delitem(sys.modules, "model", raising=False)
  scope = {}
  exec(block, scope)
  monkeypatch.delitem(sys.modules, "model")
  drawn = scope["images_BCHW" if prediction == "velocity" else "out_BCHW"]
  assert drawn.shape == (1, 2, 4, 8)


def test_the_sources_need_torch_and_safetensors_alone():
  for module in SOURCES.values():
    imported = set()
    for node in ast.walk(ast.parse(inspect.getsource(module))):
      if isinstance(node, ast.Import):
        imported |= {alias.name.split(".")[0] for alias in node.names}
      elif isinstance(node, ast.ImportFrom):
        imported.add((node.module or "").split(".")[0])
    assert imported - sys.stdlib_module_names == {"torch", "safetensors"}


def test_what_two_sources_call_the_same_is_the_same():
  # The files stand alone, and so repeat each other: word for word.
  own = {"Config", "load", "main", "Stream", "Attention"}
  first, second = (
    {
      node.name: ast.get_source_segment(inspect.getsource(module), node)
      for node in ast.parse(inspect.getsource(module)).body
      if isinstance(node, (ast.FunctionDef, ast.ClassDef))
    }
    for module in (SOURCES["mmdit"], SOURCES["flux"])
  )
  common = (first.keys() & second.keys()) - own
  assert len(common) >= 20
  for name in common:
    assert first[name] == second[name], name


def _defined(source) -> dict[str, str]:
  """Returns what a file that is exported defines, by name."""
  tree = ast.parse(inspect.getsource(source))
  kinds = (ast.FunctionDef, ast.ClassDef)
  return {x.name: ast.dump(x) for x in tree.body if isinstance(x, kinds)}


def test_files_that_stand_alone_agree_in_what_they_share():
  """Each is whole in itself, so that what they share is there several times."""
  sources = {"dit": importlib.import_module("flowjax.interop.torch.dit")}
  found = {n: _defined(x) for n, x in (sources | SOURCES).items()}
  sd3, other = found["mmdit"], found["flux"]
  own = {"Attention", "Config", "Stream", "load"}
  shared = sd3.keys() & other.keys() - own
  assert len(shared) == 22
  assert not [name for name in shared if sd3[name] != other[name]]
  for name in ("RMSNorm", "patchify", "unpatchify", "write_png"):
    assert found["dit"][name] == sd3[name], name
