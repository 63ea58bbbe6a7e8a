"""Products with shared kernels: the same on a mesh, summed as is said."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from flowjax.ops import axes, products
from flowjax.parallel import collectives
from flowjax.parallel import mesh as meshes

MESH = dict(data=2, fsdp=2, context=2)
NAMES = ("batch", "tokens")
# Of a stack, as rules name it: a kernel is one of them.
DIVIDED = {"blocks/in/kernel": (None, "fsdp", None, None)}


def _inputs():
  rng = np.random.default_rng(0)
  kernel = rng.standard_normal((16, 4, 8), np.float32)
  return kernel, rng.standard_normal((8, 4, 16), np.float32)


def _loss(kernel, x, dtype="float32", called=""):
  y = products.product(x.astype(dtype), kernel, names=NAMES, called=called)
  return jnp.sum(jnp.square(products.total(y).astype(jnp.float32)))


def _lowered(dtype, sums, called=""):
  """Lowers the gradient for a kernel that is divided over `fsdp`."""
  mesh = meshes.build(meshes.MeshConfig(**MESH))
  divided = NamedSharding(mesh, P("fsdp"))
  kernel, x = _inputs()
  kernel = jax.device_put(kernel, divided)
  x = jax.device_put(x, NamedSharding(mesh, P(("data", "fsdp"), "context")))

  def gradient(kernel, x):
    with products.summing(sums, lambda name: DIVIDED.get(name, ())):
      return jax.grad(_loss)(kernel, x, dtype, called)

  with meshes.use(mesh):
    program = jax.jit(gradient, out_shardings=divided)
    return program.lower(kernel, x), (kernel, x)


@pytest.mark.parametrize("called", ["", *DIVIDED])
def test_gradients_are_those_of_one_device(called):
  lowered, inputs = _lowered("float32", "float32", called)
  found = lowered.compile()(*inputs)
  wanted = jax.grad(_loss)(*_inputs())
  np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-4)


def test_derivatives_are_those_of_one_device():
  inputs = _inputs()
  with meshes.use(meshes.build(meshes.MeshConfig(**MESH))):
    ahead = jax.jvp(_loss, inputs, inputs)[1]
  np.testing.assert_allclose(
    ahead, jax.jvp(_loss, _inputs(), _inputs())[1], rtol=1e-5
  )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("sums", ["float32", "bfloat16"])
def test_gradients_are_summed_in_the_dtype_that_is_said(dtype, sums):
  """Over `fsdp`, and then over all others, of the parts, in one."""
  text = _lowered(dtype, sums)[0].as_text()
  short = {"float32": "f32", "bfloat16": "bf16"}[sums]
  found = re.findall(r"stablehlo.reduce\(.*\) -> (tensor<\S*16x4x8x\S+)>", text)
  assert found[-2:] == [f"tensor<4x16x4x8x{short}", f"tensor<16x4x8x{short}"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("sums", ["float32", "bfloat16"])
def test_of_a_divided_kernel_each_device_gets_its_part(dtype, sums):
  """From `fsdp`, and only the parts are summed over the others."""
  text = _lowered(dtype, sums, *DIVIDED)[0].as_text()
  short = {"float32": "f32", "bfloat16": "bf16"}[sums]
  whole, part = f"tensor<16x4x8x{short}>", f"tensor<8x4x8x{short}>"
  summed = re.findall(
    r"stablehlo\.(reduce_scatter|all_reduce)\".*?: \((\S+)\) -> (\S+)",
    text,
    re.DOTALL,
  )
  assert summed == [("reduce_scatter", whole, part), ("all_reduce", part, part)]


def test_shares_of_a_gradient_stay_apart():
  """As of an accumulated batch: each place along `data` keeps its own."""
  mesh = meshes.build(meshes.MeshConfig(data=2, fsdp=4))
  kernel, x = _inputs()
  kernels = np.stack([kernel, -kernel])
  shares = x.reshape(2, 4, *x.shape[1:])

  def loss(kernels, shares):
    def one(kernel, x):
      return _loss(kernel, x, called="blocks/in/kernel")

    return jnp.sum(jax.vmap(one, spmd_axis_name="data")(kernels, shares))

  def gradient(kernels, shares):
    with products.summing("float32", DIVIDED.__getitem__):
      return jax.grad(loss)(kernels, shares)

  within = {**meshes.ACTIVATIONS, "batch": ("fsdp",)}
  divided = NamedSharding(mesh, P("data", "fsdp"))
  with meshes.use(mesh), axes.rules(within):
    program = jax.jit(gradient, in_shardings=divided, out_shardings=divided)
    program = program.lower(kernels, shares).compile()
  found = program(*jax.device_put((kernels, shares), divided))
  wanted = jax.vmap(jax.grad(_loss))(kernels, shares)
  np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-4)
  sent = collectives.read(program.as_text(), mesh)
  assert {(one.kind, one.axes) for one in sent} == {
    ("all-gather", ("fsdp",)),
    ("reduce-scatter", ("fsdp",)),
  }


def test_what_is_mapped_may_be_the_activations_alone():
  """As for an exact divergence: many tangents through the same kernels."""
  kernel, x = _inputs()
  many = np.stack([x, -2.0 * x])
  with meshes.use(meshes.build(meshes.MeshConfig(**MESH))):
    found = jax.jit(jax.vmap(_loss, in_axes=(None, 0)))(kernel, many)
  wanted = [_loss(kernel, one) for one in many]
  np.testing.assert_allclose(found, wanted, rtol=1e-5)


def test_a_kernel_is_cast_before_it_is_gathered():
  text = _lowered("bfloat16", "float32")[0].as_text()
  named = re.findall(r"sharding_constraint .*(tensor<\S*16x4x8x\S+)", text)
  assert set(named) == {"tensor<4x2x16x4x8xbf16>"}


def test_terms_are_summed_once_for_two_products():
  mesh = meshes.build(meshes.MeshConfig(data=4, tensor=2))
  kernel, x = _inputs()

  def apart(first, second, x):
    terms = products.product(x, first, names=("batch",), terms=2)
    terms += products.product(x, second, names=("batch",), terms=2)
    return products.total(terms)

  places = [NamedSharding(mesh, P("tensor"))] * 2
  places.append(NamedSharding(mesh, P("data", None, "tensor")))
  with meshes.use(mesh):
    program = jax.jit(apart, in_shardings=places).lower(kernel, -kernel / 2, x)
    program = program.compile()
    found = program(*jax.device_put((kernel, -kernel / 2, x), tuple(places)))
  kinds = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
  assert re.findall(rf" ({kinds})(?:-start)?\(", program.as_text()) == [
    "all-reduce"
  ]
  wanted = np.tensordot(x, kernel / 2, 1)
  np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


def test_tokens_that_devices_cannot_split_are_refused():
  kernel, x = _inputs()
  with meshes.use(meshes.build(meshes.MeshConfig(data=1, context=8))):
    with pytest.raises(ValueError, match="4 'tokens' cannot be split over 8"):
      products.product(x, kernel, names=NAMES)
