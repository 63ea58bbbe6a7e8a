"""Text encoders: on one device and on eight, in bfloat16, and what they see."""

# Shape suffixes: B batch, L tokens, E width.

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowjax.models import clip, t5
from flowjax.parallel import mesh as meshes
from flowjax.parallel import placing, rules

CLIP = clip.ClipConfig(
  vocabulary=48, positions=8, width=32, depth=2, heads=4, projection=16, end=47
)
T5 = t5.T5Config(
  vocabulary=48, width=32, mlp_width=40, heads=4, head_size=8, depth=2
)
CASES = {"clip": (clip, CLIP), "t5": (t5, T5)}
TOKEN_BL = np.random.default_rng(0).integers(0, 48, (8, 6))
MASK_BL = np.arange(6) < np.arange(8)[:, None] % 6 + 1
# Larger leaves than this many numbers must be divided.
LARGE = 256


@functools.cache
def drawn(module, config):
  # rbg compiles in a fifth of the time that threefry takes.
  rng = jax.random.key(0, impl="rbg")
  return jax.device_get(jax.jit(lambda: module.init(config, rng))())


@functools.cache
def program(module, config, mesh=None):
  """Returns it for a mesh, which is no part of what jit knows a program by."""
  return jax.jit(lambda params, texts: module.apply(config, params, *texts))


def apply(module, config, params, texts, mesh=None):
  return jax.device_get(program(module, config, mesh)(params, texts))


@pytest.mark.slow(1)
@pytest.mark.parametrize("name", CASES)
def test_eight_devices_say_what_one_says(name):
  module, config = CASES[name]
  mesh = meshes.build(meshes.MeshConfig(data=1, fsdp=-1, tensor=2))

  def init():
    return module.init(config, jax.random.key(0, impl="rbg"))

  abstract = jax.eval_shape(init)
  places = rules.places(rules.for_model(config), abstract, mesh)
  for place in places.values():
    if np.prod(place.shape) > LARGE:
      ways = np.prod(place.shape) * 4 // place.bytes_per_device
      assert ways == (4 if place.name.startswith("pos_embed") else 8), place
    assert not place.undivided, place
  spread = rules.shardings(rules.for_model(config), abstract, mesh)
  # Drawn where it lives: no device holds the whole.
  params = jax.jit(init, out_shardings=spread)()
  wanted = apply(module, config, jax.device_get(params), (TOKEN_BL, MASK_BL))
  with meshes.use(mesh):
    texts = placing.put_whole(mesh)((TOKEN_BL, MASK_BL))
    found = apply(module, config, params, texts, mesh)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), found, wanted
  )


@pytest.mark.slow(1)
@pytest.mark.parametrize("name", CASES)
def test_bfloat16_is_near_and_stays_finite(name):
  module, config = CASES[name]
  params = drawn(module, config)
  half = dataclasses.replace(config, dtype="bfloat16")
  wanted, found = (
    apply(module, config, params, (TOKEN_BL, MASK_BL))[0]
    for config in (config, half)
  )
  assert found.dtype == np.float32
  spread = np.abs(wanted).max()
  assert 0 < np.abs(found - wanted).max() < 0.05 * spread
  # The sum of T5's blocks leaves what float16 holds.
  loud = jax.tree.map(np.array, params)
  loud["blocks"]["mlp_out"]["kernel"] *= 1e8
  loud = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), loud)
  text_BLE = apply(module, half, loud, (TOKEN_BL, MASK_BL))[0]
  assert np.isfinite(text_BLE).all()


@pytest.mark.slow(1)
@pytest.mark.parametrize("name", CASES)
def test_padding_is_not_seen_and_clip_does_not_look_ahead(name):
  module, config = CASES[name]
  params = drawn(module, config)
  other_BL = np.where(MASK_BL, TOKEN_BL, (TOKEN_BL + 1) % 48)
  a, b = (apply(module, config, params, (x, MASK_BL)) for x in
          (TOKEN_BL, other_BL))  # fmt: skip
  np.testing.assert_array_equal(a[0][MASK_BL], b[0][MASK_BL])
  # Without a mask padding is seen by what comes before it in T5 alone.
  a, b = (apply(module, config, params, (x, None)) for x in
          (TOKEN_BL, other_BL))  # fmt: skip
  same = np.array_equal(a[0][MASK_BL], b[0][MASK_BL])
  assert same == (name == "clip")


@pytest.mark.parametrize(
  "kind, changes, text",
  [
    (clip.ClipConfig, dict(heads=5), "heads=5 do not divide width=768"),
    (clip.ClipConfig, dict(activation="gelU"), "Did you mean 'gelu'"),
    (clip.ClipConfig, dict(skip=13), "skip=13"),
    (clip.ClipConfig, dict(depth=0), "depth=0 must be positive"),
    (t5.T5Config, dict(dtype="float16"), "float16 its activations overflow"),
    (t5.T5Config, dict(buckets=30), "multiple of 4"),
    (t5.T5Config, dict(max_distance=8), "max_distance=8"),
  ],
)
def test_what_cannot_be_is_refused(kind, changes, text):
  with pytest.raises(ValueError, match=text):
    kind(**changes)
