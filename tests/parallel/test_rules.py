"""Every parameter is placed by exactly one rule, the one that is meant."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from flowjax import models
from flowjax.models import dit
from flowjax.parallel import mesh as meshes
from flowjax.parallel import rules

OPTIONS = [
  {},
  {"mlp": "swiglu", "qk_norm": True, "position": "learned"},
  {"norm": "rmsnorm"},
]


def _params(**options):
  config = dit.DiTConfig(width=64, depth=2, heads=4, num_classes=7, **options)
  network = models.build(config)
  return config, jax.eval_shape(network.init, jax.random.key(0))


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
