import jax
import jax.numpy as jnp
import pytest

from flowjax.ops import axes

RULES = {"batch": ("data", "fsdp"), "tokens": None, "heads": "tensor"}


def make_mesh(data=2, fsdp=2, tensor=2):
  return jax.make_mesh(
    (data, fsdp, tensor),
    ("data", "fsdp", "tensor"),
    axis_types=(jax.sharding.AxisType.Auto,) * 3,
  )


def test_name_is_the_identity_without_rules():
  x = jnp.ones((4, 3, 2))
  assert axes.name(x, "batch", "tokens", "heads") is x
  assert axes.name(x, "any", "name", "goes") is x
  assert axes.parts("tokens") == 1


def test_name_lays_out_as_the_rules_say():
  x = jnp.arange(8.0 * 3 * 2).reshape(8, 3, 2)
  mesh = make_mesh()
  with jax.set_mesh(mesh), axes.rules(RULES):
    y = jax.jit(lambda x: axes.name(x + 1, "batch", None, "heads"))(x)
  spec = jax.sharding.PartitionSpec(("data", "fsdp"), None, "tensor")
  wanted = jax.sharding.NamedSharding(mesh, spec)
  assert y.sharding.is_equivalent_to(wanted, y.ndim)
  assert {shard.data.shape for shard in y.addressable_shards} == {(2, 3, 1)}
  assert jnp.array_equal(y, x + 1)


def test_parts_count_devices_not_rules():
  with jax.set_mesh(make_mesh(data=4, fsdp=2, tensor=1)), axes.rules(RULES):
    assert axes.parts("batch") == 8
    assert axes.parts("tokens") == 1
    assert axes.parts("heads") == 1


def test_carriers_are_the_axes_that_split():
  assert axes.carriers("batch") == ()
  with jax.set_mesh(make_mesh(data=4, fsdp=2, tensor=1)), axes.rules(RULES):
    assert axes.carriers("batch") == ("data", "fsdp")
    assert axes.carriers("tokens") == axes.carriers("heads") == ()
  with jax.set_mesh(make_mesh(data=1, fsdp=8, tensor=1)), axes.rules(RULES):
    assert axes.carriers("batch") == ("fsdp",)


def test_the_device_is_that_of_the_mesh():
  assert axes.device() == jax.devices()[0]
  other = jax.devices()[3]
  with jax.set_mesh(make_mesh()), axes.rules(RULES, other):
    assert axes.device() == other


def test_rules_end_with_their_context_even_on_an_error():
  with pytest.raises(RuntimeError), axes.rules(RULES):
    raise RuntimeError
  x = jnp.ones(2)
  assert axes.name(x, "batch") is x


def test_inner_rules_hide_outer_ones():
  with jax.set_mesh(make_mesh()), axes.rules(RULES):
    with axes.rules({"batch": None}):
      assert axes.parts("batch") == 1
    assert axes.parts("batch") == 4


def test_a_name_without_a_rule_is_refused():
  with jax.set_mesh(make_mesh()), axes.rules(RULES):
    with pytest.raises(ValueError, match="No rule for .*'width'.*batch, heads"):
      axes.name(jnp.ones((4, 2)), "batch", "width")


def test_a_dim_that_does_not_divide_is_refused_with_what_would():
  with jax.set_mesh(make_mesh()), axes.rules(RULES):
    with pytest.raises(ValueError, match="6 'batch'.*4 devices.*multiple of 4"):
      axes.name(jnp.ones((6, 2)), "batch", "heads")


def test_the_number_of_names_must_match():
  with jax.set_mesh(make_mesh()), axes.rules(RULES):
    with pytest.raises(ValueError, match="shape"):
      axes.name(jnp.ones((4, 2)), "batch")


def test_rules_without_a_mesh_are_refused():
  with axes.rules(RULES), pytest.raises(ValueError, match="set_mesh"):
    axes.name(jnp.ones((4, 2)), "batch", "heads")
