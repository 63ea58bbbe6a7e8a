"""The fingerprint: the same under any sharding, another for any change."""

import json
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from flowjax.train import manifest

DTYPES = (
  np.float32, ml_dtypes.bfloat16, np.int32, np.uint8, np.bool_, np.complex64,
)  # fmt: skip


def mesh(*shape):
  devices = np.array(jax.devices()[: np.prod(shape)]).reshape(shape)
  axes = ("data", "fsdp")[: len(shape)]
  return jax.sharding.Mesh(
    devices, axes, axis_types=(AxisType.Auto,) * len(axes)
  )


def place(array, mesh, *spec):
  return jax.device_put(array, NamedSharding(mesh, PartitionSpec(*spec)))


def fingerprint(array):
  return manifest.fingerprints({"x": jnp.asarray(array)})["x"]


def random_array(dtype, shape=(16, 24), seed=0):
  size = int(np.prod(shape)) * np.dtype(dtype).itemsize
  raw = np.random.default_rng(seed).integers(0, 256, size, np.uint8)
  if dtype == np.bool_:
    raw %= 2
  return raw.view(dtype).reshape(shape)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: np.dtype(d).name)
def test_no_sharding_changes_it(dtype):
  host = random_array(dtype)
  whole = fingerprint(host)
  placed = {
    "rows": place(host, mesh(8), "data"),
    "columns": place(host, mesh(8), None, "data"),
    "both": place(host, mesh(4, 2), "data", "fsdp"),
    "partly": place(host, mesh(4, 2), "fsdp"),
    "nowhere": place(host, mesh(4, 2)),
    "two": place(host, mesh(2), "data"),
    "other": jax.device_put(host, jax.devices()[5]),
  }
  assert manifest.fingerprints(placed) == dict.fromkeys(placed, whole)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: np.dtype(d).name)
def test_every_flipped_bit_changes_it(dtype):
  host = random_array(dtype)
  original = fingerprint(host)
  rng = np.random.default_rng(1)
  for _ in range(30):
    raw = host.view(np.uint8).copy().reshape(-1)
    bit = 0 if dtype == np.bool_ else rng.integers(8)
    raw[rng.integers(raw.size)] ^= np.uint8(1 << bit)
    assert fingerprint(raw.view(dtype).reshape(host.shape)) != original


def test_order_matters():
  host = random_array(np.float32)
  rows, columns = host.copy(), host.copy()
  rows[[2, 9]], columns[:, [0, 1]] = host[[9, 2]], host[:, [1, 0]]
  diagonal = host.copy()
  diagonal[2, 5], diagonal[5, 2] = host[5, 2], host[2, 5]
  variants = (host, rows, columns, diagonal, host[::-1].copy())
  assert len({fingerprint(x) for x in variants}) == len(variants)


def test_zeros_of_another_length_differ():
  assert len({fingerprint(np.zeros(n, np.float32)) for n in range(9)}) == 9


def test_nan_and_minus_zero_count_by_their_bits():
  assert fingerprint(np.float32(0.0)) != fingerprint(np.float32(-0.0))
  nan = np.array([0x7FC00000, 0x7FC00001], np.uint32).view(np.float32)
  assert fingerprint(nan[:1]) != fingerprint(nan[1:])
  assert fingerprint(nan) == fingerprint(nan.copy())


def test_typed_keys_and_their_sharding():
  keys = jax.random.split(jax.random.key(0), 8)
  spread = place(keys, mesh(8), "data")
  assert fingerprint(spread) == fingerprint(keys)
  assert fingerprint(jax.random.split(jax.random.key(1), 8)) != fingerprint(
    keys
  )
  assert manifest.leaf(keys).dtype == "key<fry>"


def test_wide_elements():
  with jax.enable_x64(True):
    host = random_array(np.float64)
    assert fingerprint(host) == fingerprint(place(host, mesh(8), "data"))
    high = host.copy()
    high.view(np.uint32)[3, 5] ^= 1
    assert fingerprint(high) != fingerprint(host)


def test_no_array_is_gathered():
  arrays = [
    place(random_array(np.float32), mesh(4, 2), "data", "fsdp"),
    place(random_array(np.float32), mesh(4, 2), None, ("fsdp", "data")),
  ]
  whole = NamedSharding(mesh(4, 2), PartitionSpec())
  program = jax.jit(manifest._hash_all, out_shardings=whole).lower(arrays)
  moved = re.findall(
    r"= \(?u32\[([\d,]*)\][^=]* (?:all-|collective|reduce-scatter)",
    program.compile().as_text(),
  )
  sizes = [np.prod([int(n) for n in dims.split(",") if n]) for dims in moved]
  assert sizes and max(sizes) <= 8  # One partial sum per device, no more.


def example():
  state = {
    "params": {"w": jnp.ones((2, 3)), "list": [jnp.zeros(2, jnp.bfloat16)]},
    "step": jnp.int32(7),
  }
  extra = {"data": {"seed": 1}}
  return json.loads(json.dumps(manifest.write(7, state, extra))), extra


def test_what_is_written_is_read_back():
  listing, extra = example()
  leaves, reason = manifest.read(7, listing, extra)
  assert reason is None
  assert {path: str(leaf) for path, leaf in leaves.items()} == {
    "params/list/0": "bfloat16[2]",
    "params/w": "float32[2,3]",
    "step": "int32[]",
  }


def test_every_change_of_a_manifest_is_seen():
  listing, extra = example()
  text = json.dumps(listing)
  for at in range(0, len(text), 3):
    other = chr(ord(text[at]) ^ 1)
    try:
      changed = json.loads(text[:at] + other + text[at + 1 :])
    except json.JSONDecodeError:
      continue
    assert manifest.read(7, changed, extra)[1] is not None, text[
      at - 9 : at + 9
    ]


def test_extra_and_step_are_part_of_it():
  listing, extra = example()
  assert "extra" in manifest.read(7, listing, {"data": {"seed": 2}})[1]
  assert "step 7" in manifest.read(8, listing, extra)[1]
  assert manifest.read(7, [], extra)[1] is not None


def test_nested_is_the_inverse_of_paths():
  named = {"a/b/c": 1, "a/d": 2, "e": 3}
  assert manifest.nested(named) == {"a": {"b": {"c": 1}, "d": 2}, "e": 3}
  assert manifest.named_leaves(manifest.nested(named)) == named
