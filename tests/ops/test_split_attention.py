"""Attention over tokens that several devices share."""

# Shape suffixes: B batch, T queries, S keys, N heads, H head size.

import functools
import re

import jax
import jax.extend.core as core
import jax.numpy as jnp
import numpy as np
import pytest

from flowjax.ops import attention
from flowjax.ops.attention import blockwise, shares, xla
from flowjax.parallel import mesh as meshes
from flowjax.parallel import sums

# On 2, 4 and 8 devices, alone and beside examples and heads.
PLACES = {
  "ring-2": ("ring", dict(data=4, context=2)),
  "ring-8": ("ring", dict(data=1, context=8)),
  "ring-4-in-two": ("ring", dict(data=2, context=2, ulysses=2)),
  "ulysses-2": ("ulysses", dict(data=2, tensor=2, context=2)),
  "ulysses-4": ("ulysses", dict(data=2, context=4)),
  "ulysses-8": ("ulysses", dict(data=1, context=2, ulysses=4)),
  "product-4": ("ring_ulysses", dict(data=2, context=2, ulysses=2)),
  "product-8": ("ring_ulysses", dict(data=1, context=4, ulysses=2)),
  "product-of-one": ("ring_ulysses", dict(data=4, context=2)),
  "gathered": ("xla", dict(data=2, context=4)),
  "gathered-in-blocks": ("blockwise", dict(data=2, context=2, ulysses=2)),
}


@pytest.fixture(autouse=True, scope="module")
def _small_blocks():
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(blockwise, "BLOCK", 4)
    yield


@functools.cache
def draw(queries=29, keys=37, heads=8):
  """Draws lengths that nothing divides, and a mask of whose rows one is 0."""
  rng = np.random.default_rng(0)
  q, k, v = (
    rng.standard_normal((4, n, heads, 8)).astype(np.float32)
    for n in (queries, keys, keys)
  )
  mask = rng.random((4, keys)) < 0.6
  mask[2] = False
  return q, k, v, mask


def both(body, q, k, v, mask):
  """Returns the value and the gradients of an uneven sum of it."""
  attend = functools.partial(attention.attention, body=body, mask_BS=mask)
  y, pull = jax.vjp(attend, q, k, v)
  return y, pull(jnp.cos(jnp.arange(float(y.size))).reshape(y.shape))


@functools.cache
def alone(masked):
  q, k, v, mask = draw()
  return jax.jit(functools.partial(both, "xla"))(
    q, k, v, mask if masked else None
  )


@pytest.mark.slow(1)
@pytest.mark.parametrize(
  "place, masked",
  [*((place, True) for place in PLACES), ("product-8", False)],
)
def test_shared_tokens_hear_what_they_hear_on_one_device(place, masked):
  body, sizes = PLACES[place]
  q, k, v, mask = draw()
  with meshes.use(meshes.build(meshes.MeshConfig(**sizes))):
    found = jax.jit(functools.partial(both, body))(
      q, k, v, mask if masked else None
    )
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5),
    found,
    alone(masked),
  )


@pytest.mark.parametrize("body", ["ring", "ulysses", "ring_ulysses"])
def test_one_device_is_a_ring_as_well(body):
  q, k, v, mask = draw()
  found = jax.jit(functools.partial(both, body))(q, k, v, mask)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5),
    found,
    alone(True),
  )


@pytest.mark.parametrize(
  "sizes, body, says",
  [
    (dict(data=2, context=4), "ulysses", r"over \('context',\), and 'xla'"),
    (
      dict(data=2, context=2, ulysses=2),
      "ring_ulysses",
      r"over \('context', 'ulysses'\)",
    ),
    (dict(tensor=4, context=2, data=1), "ulysses", "'xla' within"),
    (
      dict(tensor=2, context=4, data=1),
      "ring",
      "not 'ulysses': it gives each of 4 devices.*2 heads",
    ),
  ],
  ids=str,
)
def test_auto_exchanges_where_heads_divide(caplog, sizes, body, says):
  heads = 8 if body != "ring" else 4
  q, k, v, _ = draw(heads=heads)
  attention._say.cache_clear()
  with meshes.use(meshes.build(meshes.MeshConfig(**sizes))):
    with caplog.at_level("INFO"):
      found = jax.make_jaxpr(attention.attention)(q, k, v)
      jax.make_jaxpr(attention.attention)(q, k, v)
    named = functools.partial(attention.attention, body=body)
    assert str(found) == str(jax.make_jaxpr(named)(q, k, v))
  (said,) = [record.getMessage() for record in caplog.records]
  assert said.startswith(f"attention='auto' is '{body}'")
  assert re.search(says, said)


@pytest.mark.parametrize(
  "body, sizes, says",
  [
    (
      "ulysses",
      dict(data=1, context=8),
      r"each of 8 devices \(mesh axes context\) a part of 4 heads, which 8 "
      r"does not divide. Sizes that do: 1, 2, 4; 'ring' takes any",
    ),
    (
      "ring_ulysses",
      dict(data=1, tensor=2, ulysses=4),
      r"axes ulysses\) a part of 2 heads.*Sizes that do: 1, 2;",
    ),
    ("ring", dict(data=1, tensor=8), "4 'heads' cannot be split over 8"),
    ("ring", dict(data=8), "4 'batch' cannot be split over 8"),
  ],
)
def test_what_does_not_divide_is_refused_with_what_would(body, sizes, says):
  q, k, v, _ = draw(heads=4)
  with meshes.use(meshes.build(meshes.MeshConfig(**sizes))):
    with pytest.raises(ValueError, match=says):
      attention.attention(q, k, v, body=body)


def _nested(jaxpr):
  yield jaxpr
  for inner in core.subjaxprs(jaxpr):
    yield from _nested(inner)


def test_keys_are_sent_on_before_they_are_used():
  """So that the transfer and what is computed meanwhile can overlap."""
  q, k, v, mask = draw()
  with meshes.use(meshes.build(meshes.MeshConfig(data=1, context=8))):
    program = jax.make_jaxpr(functools.partial(both, "ring"))(q, k, v, mask)
  steps = 0
  for jaxpr in _nested(program.jaxpr):
    kinds = [equation.primitive.name for equation in jaxpr.eqns]
    if "ppermute" not in kinds or "scan" not in kinds or jaxpr is program:
      continue
    sent = {
      variable
      for equation in jaxpr.eqns
      if equation.primitive.name == "ppermute"
      for variable in equation.outvars
    }
    computed = [e for e in jaxpr.eqns if e.primitive.name == "scan"]
    # Inside of a step: keys (and gradients) travel, and one loop computes.
    if len(computed) == 1:
      steps += 1
      assert kinds.index("ppermute") < kinds.index("scan")
      assert not sent & {v for v in computed[0].invars if _is_variable(v)}
  assert steps == 2  # forwards, and for the gradient


def test_a_policy_of_remat_can_spare_the_ring_a_turn():
  """Kept are a query's answer and sum, by the name of what is returned."""
  q, k, v, _ = draw()

  def sent(wrap):
    attend = wrap(functools.partial(attention.attention, body="ring"))
    program = jax.make_jaxpr(functools.partial(_slope, attend))(q, k, v)
    return str(program).count("ppermute[")

  def remade(policy):
    return functools.partial(jax.checkpoint, policy=policy)

  named = jax.checkpoint_policies.save_only_these_names("attention")
  with meshes.use(meshes.build(meshes.MeshConfig(data=4, context=2))):
    kept = sent(lambda attend: attend)
    assert sent(remade(named)) == kept
    # A turn sends keys, values and their mask.
    assert sent(remade(None)) == kept + 3


def _slope(attend, *qkv):
  return jax.grad(lambda qkv: jnp.sum(jnp.sin(attend(*qkv))))(qkv)


def _is_variable(atom):
  return not hasattr(atom, "val")


@pytest.mark.slow
@pytest.mark.parametrize(
  "body, sizes",
  [
    ("ring", dict(data=1, context=8)),
    ("ring_ulysses", dict(data=1, context=4, ulysses=2)),
  ],
)
def test_memory_grows_with_the_local_tokens_and_not_with_their_square(
  body, sizes
):
  """Value and gradient, on a device; blocks of scores are of 16 x 16."""

  def temporary(body, tokens):
    x = jax.ShapeDtypeStruct((1, tokens, 8, 8), np.float32)
    spec = jax.sharding.PartitionSpec(None, ("context", "ulysses"))
    program = jax.jit(
      functools.partial(both, body, mask=None),
      in_shardings=spec,
      out_shardings=(spec, (spec,) * 3),
    )
    compiled = program.lower(x, x, x).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(blockwise, "BLOCK", 16)
    with meshes.use(meshes.build(meshes.MeshConfig(**sizes))):
      some, many = (temporary(body, n) for n in (512, 1024))
      whole = temporary("xla", 1024)
  assert many < 2.1 * some and whole > 6.0 * many


@pytest.mark.parametrize("heads, body", [(8, "ulysses"), (3, "blockwise")])
def test_auto_knows_forward_mode_where_tokens_are_split(heads, body):
  q = jnp.zeros((2, 16, heads, 8))
  with meshes.use(meshes.build(meshes.MeshConfig(data=2, context=4))):
    assert attention._chosen(q, q) == ("ring" if heads == 3 else "ulysses")
    with attention.forward_mode():
      assert attention._chosen(q, q) == body
      jax.eval_shape(
        lambda q: jax.jvp(lambda q: attention.attention(q, q, q), (q,), (q,)), q
      )


def test_a_fused_kernel_is_alone_with_its_share_of_an_accumulated_batch():
  """The compiler divides no such kernel by itself."""
  q = jnp.zeros((8, 16, 2, 8))

  def each(_, q):
    return shares.attend(xla.attend, q, q, q, None)

  with meshes.use(meshes.build(meshes.MeshConfig(data=8))):
    program = jax.make_jaxpr(sums.Sums(shares=8).over(each))
    assert "shard_map" in str(program(jnp.zeros(8), q))
