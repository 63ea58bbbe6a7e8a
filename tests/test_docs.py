"""What docs/flow.md and the README say is what the code does."""

import dataclasses
import importlib
import pathlib
import re
import shlex

import jax
import jax.numpy as jnp
import pytest

from flowjax import commands, errors, schema
from flowjax.commands import configs
from flowjax.commands import flags as command_flags
from flowjax.data import config as data_config
from flowjax.data import sources
from flowjax.flow import (
  couplings,
  distances,
  grids,
  guidance_rules,
  paths,
  prediction,
  solvers,
  times,
  weights,
)
from flowjax.flow.solvers import sde
from flowjax.interop import diffusers_configs, formats
from flowjax.models import blocks, dit
from flowjax.train import experiment, presets

ROOT = pathlib.Path(__file__).parents[1]
PAGES = (
  "README.md",
  "docs/autoencoders.md",
  "docs/editing.md",
  "docs/encode.md",
  "docs/flow.md",
  "docs/house.md",
  "docs/interop.md",
  "docs/launch.md",
  "docs/parallel.md",
  "docs/scaling.md",
  "docs/tasks.md",
)
DIGITS = str(ROOT / "configs/digits_dit.py")
TEXT = (ROOT / "docs/flow.md").read_text()
TABLES = {
  "path": paths.PATHS,
  "law": times.LAWS,
  "weight": weights.WEIGHTS,
  "distance": distances.DISTANCES,
  "coupling": couplings.COUPLINGS,
  "solver": solvers.SOLVERS,
  "grid": grids.GRIDS,
  "guidance": guidance_rules.GUIDANCES,
}


def tables(text):
  """Returns the tables by the title of their first column, rows as dicts."""
  found = {}
  for block in re.findall(r"(?:^\|.*\|\n){3,}", text, re.M):
    title, _, *rows = [
      [cell.strip() for cell in line[1:-1].split("|")]
      for line in block.splitlines()
    ]
    assert title[0] not in found, f"two tables of {title[0]!r}"
    assert {len(row) for row in rows} == {len(title)}, block
    found[title[0]] = [dict(zip(title, row, strict=True)) for row in rows]
  return found


MAP = tables(TEXT)


def names(cell):
  return re.findall(r"`([^`]+)`", cell)


def defaults(preset=None):
  values = experiment.defaults("dit")
  values.model.update(image_size=(8, 8), channels=1, num_classes=10)
  return presets.apply(values, preset) if preset else values


def spelled(group):
  """Returns a group of a config as the page has it: name(option=value)."""

  def word(value):
    return f"{value:g}" if isinstance(value, float) else str(value)

  options = [
    f"{field.name}={word(getattr(group, field.name))}"
    for field in dataclasses.fields(group)
    if field.name != "name" and getattr(group, field.name) != field.default
  ]
  return f"{group.name}({', '.join(options)})" if options else group.name


@pytest.mark.parametrize("kind", TABLES)
def test_each_table_has_what_the_code_has(kind):
  rows = [names(row[kind]) for row in MAP[kind]]
  assert sorted(rows) == [[name] for name in sorted(TABLES[kind])]


def test_the_table_of_predictions():
  rows = [names(row["prediction"]) for row in MAP["prediction"]]
  assert rows == [[name] for name in prediction.PREDICTIONS]


@pytest.mark.parametrize(
  "kind", [kind for kind in TABLES if "options" in MAP[kind][0]]
)
def test_options_are_taken_and_are_keys_of_the_config(kind):
  group = "sample" if kind in ("grid", "guidance") else "flow"
  for row in MAP[kind]:
    (name,) = names(row[kind])
    for option in names(row["options"]):
      values = defaults()
      assert option in values[group][kind], f"{name} {option}"
      code = TABLES[kind][name].__code__
      taken = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
      assert option in taken, f"{name} {option}"


@pytest.mark.parametrize("row", MAP["solver"], ids=lambda row: row["solver"])
def test_what_a_solver_costs_and_follows(row):
  (name,) = names(row["solver"])
  solver = solvers.build(name, paths.straight())
  assert solver.prediction == row["follows"]
  if row["evaluations"] == "by `rtol`, `atol`":
    assert hasattr(solver, "run")
  else:
    count = re.sub(r"(\d)n", r"\1 * n", row["evaluations"])
    assert solver.evaluations(9) == eval(count, {"n": 9})
  always = getattr(solver, "stochastic", False)
  if row["noise"].startswith("with"):
    (option,) = names(row["noise"])
    noisy = solvers.build(name, paths.straight(), **{option: 1.0})
    assert noisy.stochastic and not always
  else:
    assert always == (row["noise"] == "yes")


def test_the_forms_of_diffusion():
  for form in sde.DIFFUSIONS:
    assert re.search(rf"\b{form}\b", TEXT), form


@pytest.mark.slow
def test_each_preset_has_its_row_and_each_row_its_preset():
  rows = {names(row["preset"])[0]: row for row in MAP["paper"]}
  assert set(rows) == set(presets.PRESETS) and len(rows) == len(MAP["paper"])
  for name, row in rows.items():
    built = experiment.build(defaults(name))
    flow, sample = built.flow, built.sample
    weight = [spelled(flow.weight)]
    assert names(row["path"]) == [spelled(flow.path)], name
    assert names(row["predicts"]) == [flow.prediction], name
    assert names(row["law of t"]) == [spelled(flow.law)], name
    assert names(row["weight"]) == weight + (
      ["learned_variance"] if flow.learned_variance else []
    ), name
    assert names(row["coupling"]) == [spelled(flow.coupling)], name
    assert names(row["solver"]) == [spelled(sample.solver)], name
    assert names(row["grid"]) == [spelled(sample.grid)], name
    assert int(row["steps"]) == sample.steps, name


def test_keys_of_the_config_exist():
  values = defaults()
  for key, equals, value in re.findall(
    r"(?:config\.)?\b((?:flow|sample)\.[a-z_.]+)(=?)([\w.+(-]*)",
    re.sub(r"```python.*?```", "", TEXT, flags=re.S),
  ):
    found = values
    for part in key.split("."):
      assert part in found, key
      found = found[part]
    assert not equals or value


@pytest.mark.parametrize("row", MAP["config"], ids=lambda row: row["config"])
def test_what_is_refused_is_refused(row):
  (words,) = names(row["config"])
  flags = [f"--config.{word}" for word in words.split()]
  with pytest.raises(ValueError) as found:
    configs.load(DIGITS, flags)
  assert "config" in str(found.value) and len(str(found.value)) > 40


def test_words_that_are_flags_build():
  for words in names(TEXT):
    if re.fullmatch(r"(?:(?:flow|sample)\.\S+=\S+ ?)+", words):
      if any(words in row["config"] for row in MAP["config"]):
        continue
      extra = ["--config.sample.solver.name=dpmpp_3m"] * ("solver" in words)
      flags = [f"--config.{word}" for word in words.split()]
      configs.load(DIGITS, extra + flags)


@pytest.mark.parametrize("page", PAGES)
def test_commands_that_are_shown_can_be_given(page):
  text = (ROOT / page).read_text()
  for block in re.findall(r"```sh\n(.*?)```", text, re.S):
    for line in block.replace("\\\n", " ").splitlines():
      words = shlex.split(line, comments=True)
      if words[:2] == ["flowjax", "train"]:
        config = next(w for w in words if w.startswith("--config="))
        flags = [w for w in words if w.startswith("--config.")]
        # What is on a reader's disk and mesh is not here.
        flags = [w for w in flags if "mesh" not in w]
        # That of a workdir is not here either.
        if not config.endswith(".json"):
          configs.load(str(ROOT / config.removeprefix("--config=")), flags)
      if words[:1] == ["flowjax"] and words[1] in commands.COMMANDS:
        command = importlib.import_module(f"flowjax.commands.{words[1]}")
        parser = command_flags.Parser(words[1])
        command.add_flags(parser)
        parser.read(words[2:])
  for config in re.findall(r"`(configs/\w+\.py[:\w]*)`", text):
    configs.load(str(ROOT / config), [])


def stand_ins():
  """What the blocks take for granted: a network, a field, some noise."""
  return {
    "network": lambda params, x_t, t_B, cond, rng: params * x_t,
    "field": lambda x, t: -x,
    "noise": jax.random.normal(jax.random.key(0), (2, 4, 4, 1)),
  }


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_python_that_is_shown_runs(page):
  text = (ROOT / page).read_text()
  for block in re.findall(r"```python\n(.*?)```", text, re.S):
    if "import torch" in block:
      continue
    scope = stand_ins()
    exec(block, scope)
    if "config" in scope:
      experiment.build(scope["config"])
      continue
    value, _ = scope["loss"](
      jnp.ones(()), {"image": scope["noise"]}, jax.random.key(1)
    )
    assert jnp.isfinite(value)
    assert scope["images"].shape == scope["noise"].shape


def test_functions_that_are_named_exist():
  modules = {
    module.__name__.rpartition(".")[2]: module
    for module in (grids, paths, prediction, presets, times, weights)
  }
  for module, name in re.findall(r"`(\w+)\.(\w+)[`(]", TEXT):
    if module in modules:
      assert hasattr(modules[module], name), f"{module}.{name}"


def test_what_is_shown_of_data_is_a_config_and_every_source_is_there():
  text = (ROOT / "docs/data.md").read_text()
  blocks = re.findall(r"```python\n(.*?)```", text, re.S)
  assert len(blocks) >= 6
  for block in blocks:
    config = defaults()
    exec(block, {"config": config})
    schema.build(data_config.DataConfig, config.data.to_dict(), "config.data")
  rows = tables(text)["`config.data.source`"]
  listed = [names(row["`config.data.source`"])[0] for row in rows]
  assert {name.split(":")[0] for name in listed} == set(sources.KINDS)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
  file = ROOT / page
  for link in re.findall(r"\]\((?!https?:)([^)#]+)", file.read_text()):
    assert (file.parent / link).exists(), link


def test_what_remat_can_be():
  text = (ROOT / "docs/parallel.md").read_text()
  rows = [names(row["`remat`"])[0] for row in tables(text)["`remat`"]]
  assert rows == list(blocks.REMAT)


INTEROP = tables((ROOT / "docs/interop.md").read_text())


def test_the_formats_of_weights():
  rows = [names(row["format"])[0] for row in INTEROP["format"]]
  assert rows == list(formats.FORMATS)
  networks = {names(row["network"])[0]: row for row in INTEROP["network"]}
  assert networks.keys() == formats.NETWORKS.keys()
  for name, row in networks.items():
    held = [f for f in rows if hasattr(formats.NETWORKS[name], f"{f}_layout")]
    assert held == [f for f in rows if row[f"`{f}`"] != "no"]
    (kind,) = names(row["`diffusers`"])
    assert diffusers_configs.CLASSES[kind] == name


@pytest.mark.parametrize(
  "row", INTEROP["config"], ids=lambda row: row["config"]
)
def test_what_a_format_can_be(row):
  for word in names(row["config"]):
    if "=" not in word:
      continue
    key, _, value = word.removeprefix("model.").partition("=")
    kind = type(getattr(dit.DiTConfig(), key))
    value = value == "True" if kind is bool else kind(value)
    for format in formats.FORMATS:
      # Else as the format has it.
      shift = 1.0 if format == "diffusers" else 0.0
      base = dict(position="sincos2d", frequency_shift=shift)
      config = dit.DiTConfig(**{**base, key: value})
      try:
        formats.layout(config, format)
        can = "yes"
      except errors.UserError:
        can = "no"
      assert can == row[f"`{format}`"], (word, format)
