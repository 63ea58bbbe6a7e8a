"""Every parameter is placed by exactly one rule, the one that is meant."""

import collections
import functools
import pathlib
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from flowjax import models
from flowjax.commands import configs
from flowjax.models import coupling, dit, flux, mmdit
from flowjax.parallel import mesh as meshes
from flowjax.parallel import rules
from flowjax.train import reconstruction

OPTIONS = [
  {},
  {"mlp": "swiglu", "qk_norm": True, "position": "learned"},
  {"norm": "rmsnorm"},
]


def _params(**options):
  config = dit.DiTConfig(width=64, depth=2, heads=4, num_classes=7, **options)
  network = models.build(config)
  return config, jax.eval_shape(network.init, jax.random.key(0))


CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
FILES = [
  f"{path}{variant}"
  for path in sorted(CONFIGS.rglob("*.py"))
  for variant in {
    "digits_nf.py": ("", ":additive"),
    "digits_mmdit.py": ("", ":sd3.5"),
    "digits_flux.py": ("", ":dev"),
    "sd3.py": (":medium", ":3.5_medium", ":3.5_large"),
    "imagenet_dit.py": (":s_8", ":xl_2"),
    "imagenet_autoencoder.py": (":kl_f16", ":vq_f4"),
  }.get(path.name, ("",))
]
SMALL = dict(width=64, heads=4, num_classes=7)
KINDS = [
  *(dit.DiTConfig(depth=2, **SMALL, **options) for options in OPTIONS),
  mmdit.MMDiTConfig(depth=2, heads=2, num_classes=3),
  mmdit.MMDiTConfig(depth=3, heads=2, dual_layers=1, qk_norm=True),
  flux.FluxConfig(rope_axes=(4, 6, 6), double_depth=1, single_depth=1, **SMALL),
  coupling.CouplingConfig(),
]


# With all that an autoencoder can have beside it.
BESIDE = dict(
  perceptual=reconstruction.PerceptualConfig(weight=1.0),
  adversary=reconstruction.AdversaryConfig(weight=1.0, layers=1),
)
AUTOENCODERS = {
  "autoencoder": reconstruction.ReconstructionConfig(**BESIDE),
  "vq": reconstruction.ReconstructionConfig(**BESIDE, codebook_decay=0.9),
}


@functools.cache
def _of(config):
  """Returns the rules of a model, and its parameters in the abstract."""
  network = models.build(config)
  if config.name in AUTOENCODERS:
    network = AUTOENCODERS[config.name].network(network)
  elif network.forward is None:
    network = models.with_uncertainty(network)
  params = jax.eval_shape(network.init, jax.random.key(0))
  return rules.for_model(config), params


def _matching(table, params):
  """Returns the patterns that match each parameter, by name."""
  names = map(rules.name_of, dict(jax.tree.leaves_with_path(params)))
  return {
    name: [pattern for pattern, _ in table if re.fullmatch(pattern, name)]
    for name in names
  }


@functools.cache
def _model(file):
  return configs.load(file, []).model


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.rpartition("/")[2])
def test_every_parameter_of_a_config_is_matched_exactly_once(file, mesh):
  table, params = _of(_model(file))
  found = _matching(table, params)
  assert {name for name, rows in found.items() if len(rows) != 1} == set()
  rules.places(table, params, mesh)


@pytest.mark.slow(1)
def test_no_rule_is_without_a_parameter():
  """Over the configs, and the options of each kind of model."""
  used, tables = collections.defaultdict(set), {}
  for config in [*KINDS, *map(_model, FILES)]:
    table, params = _of(config)
    tables[id(table)] = table
    for rows in _matching(table, params).values():
      used[id(table)].update(rows)
      assert len(rows) == 1
  assert len(tables) == 6
  for key, table in tables.items():
    assert {pattern for pattern, _ in table} == used[key]


@pytest.fixture(name="mesh")
def _mesh():
  return meshes.build(meshes.MeshConfig(data=2, fsdp=2, tensor=2))


@pytest.mark.parametrize("options", OPTIONS)
def test_every_parameter_is_placed_and_every_kernel_divided(options, mesh):
  config, params = _params(**options)
  found = rules.places(rules.for_model(config), params, mesh)
  assert len(found) == len(jax.tree.leaves(params))
  for name, place in found.items():
    assert not place.undivided, name
    if name.endswith("kernel"):
      assert "fsdp" in place.spec, name


@pytest.mark.parametrize("options", OPTIONS)
def test_tensor_divides_heads_and_the_hidden_width(options, mesh):
  config, params = _params(**options)
  found = rules.places(rules.for_model(config), params, mesh)
  for name, dim in {
    "blocks/attention/qkv/kernel": config.heads,
    "blocks/attention/qkv/bias": config.heads,
    "blocks/attention/out/kernel": config.heads,
    "blocks/mlp/in/kernel": config.mlp_width,
    "blocks/mlp/in/bias": config.mlp_width,
    "blocks/mlp/out/kernel": config.mlp_width,
  }.items():
    place = found[name]
    assert place.shape[tuple(place.spec).index("tensor")] == dim, name


def test_an_unmatched_parameter_lists_itself(mesh):
  leaf = jax.ShapeDtypeStruct((2,), jnp.float32)
  with pytest.raises(ValueError, match="adapter/weight"):
    rules.places(rules.DIT, {"adapter": {"weight": leaf}}, mesh)
  with pytest.raises(ValueError, match="adapter/weight"):
    rules.match([("other", 1.0)], {"adapter": {"weight": leaf}})


def test_the_first_match_wins():
  tree = {"a": {"kernel": 0, "bias": 0}}
  found = rules.match([(".*/kernel", 1.0), (".*", 2.0)], tree)
  assert found == {"a": {"kernel": 1.0, "bias": 2.0}}


def test_a_dim_that_does_not_divide_stays_whole_and_says_so(mesh):
  leaf = jax.ShapeDtypeStruct((4, 7), jnp.float32)
  place = rules.places([(".*", ("tensor", "fsdp"))], {"w": leaf}, mesh)["w"]
  assert place.spec == P("tensor", None)
  assert place.undivided == (1,)
  assert place.bytes_per_device == 4 * 7 * 4 // 2


def test_a_rule_with_the_wrong_number_of_dims_is_refused(mesh):
  leaf = jax.ShapeDtypeStruct((4, 8), jnp.float32)
  with pytest.raises(ValueError, match="names 1 dims"):
    rules.places([(".*", ("fsdp",))], {"w": leaf}, mesh)
