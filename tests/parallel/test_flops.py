"""The formulas of arithmetic against a count over the programs' dots."""

import jax
import jax.numpy as jnp
import pytest

from flowjax import models
from flowjax.models import coupling, dit, flux, mmdit
from flowjax.parallel import flops

SIZES = {
  **{f"dit {size}": dit.DiTConfig(**dit.SIZES[size]) for size in dit.SIZES},
  **{name: mmdit.MMDiTConfig(**mmdit.SIZES[name]) for name in mmdit.SIZES},
  **{
    f"flux {name}": flux.FluxConfig(**flux.SIZES[name]) for name in flux.SIZES
  },
  "coupling": coupling.CouplingConfig(),
}


def counted(config, batch=1):
  """Returns the counts of the network, and of its gradient."""
  network = models.build(config)
  params = jax.eval_shape(network.init, jax.random.key(0))
  image = (batch, *config.image_size, config.channels)
  x = jax.ShapeDtypeStruct(image, jnp.float32)
  t = jax.ShapeDtypeStruct((batch,), jnp.float32)
  cond = jax.eval_shape(lambda: network.example(batch))

  def scalar(params, x, t, cond):
    if network.forward is not None:
      z, log_determinant = network.forward(params, x, cond)
      return jnp.sum(z) + jnp.sum(log_determinant)
    return jnp.sum(network.apply(params, x, t, cond))

  inputs = (params, x, t, cond)
  forward = flops.of(scalar, *inputs)
  return network.flops, forward, flops.of(jax.grad(scalar), *inputs)


@pytest.mark.slow(1)
@pytest.mark.parametrize("name", SIZES)
def test_formulas_are_what_the_programs_do(name):
  """Forward; and three times that, but for attention that is made again.

  Of the two products of attention a body may make none, one or both again.
  The gradient with respect to the image is not asked for: below 1%.
  """
  config = SIZES[name]
  formula, forward, gradient = counted(config)
  assert forward.flops == pytest.approx(formula, rel=0.01)
  product = 2 * getattr(config, "head_size", 0) * forward.scores
  assert any(
    gradient.flops - times * product == pytest.approx(3 * formula, rel=0.01)
    for times in (0, 1, 2)
  )


def test_a_loop_counts_as_often_as_it_runs():
  x = jax.ShapeDtypeStruct((4, 4), jnp.float32)

  def looped(x):
    return jax.lax.fori_loop(0, 7, lambda _, y: y @ x, x)

  def scanned(x):
    return jax.lax.scan(lambda y, _: (y @ x, None), x, None, length=7)[0]

  assert flops.of(scanned, x).flops == flops.of(looped, x).flops
  assert flops.of(scanned, x).flops == 7 * 2 * 4**3


def test_what_is_written_for_one_device_runs_on_all():
  mesh = jax.make_mesh(
    (4,), ("data",), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:4]
  )
  spec = jax.sharding.PartitionSpec("data")
  product = jax.shard_map(
    lambda a: a @ a.T, mesh=mesh, in_specs=spec, out_specs=spec
  )
  x = jax.ShapeDtypeStruct((8, 16), jnp.float32)
  assert flops.of(product, x).flops == 4 * 2 * 2 * 2 * 16


def test_scores_are_seen_and_products_with_parameters_are_not():
  x = jax.ShapeDtypeStruct((2, 8, 4, 16), jnp.float32)

  def attend(q, k, v):
    score = jnp.einsum("btnh,bsnh->bnts", q, k)
    return jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(score), v)

  assert flops.of(attend, x, x, x).scores == 0  # 8 x 8 is below 8 x 16.
  long = jax.ShapeDtypeStruct((2, 32, 4, 16), jnp.float32)
  assert flops.of(attend, long, long, long).scores == 2 * 4 * 32 * 32
  kernel = jax.ShapeDtypeStruct((16, 64), jnp.float32)
  assert flops.of(lambda x, w: x @ w, long, kernel).scores == 0
