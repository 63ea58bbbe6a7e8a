"""What a checkpoint claims to hold, so that a restore can prove it.

Orbax keeps no checksum of array data: a flipped bit loads without a word. Each
checkpoint therefore carries a manifest with the path, shape, dtype and
fingerprint of every leaf, and a digest of itself.
"""

# Shape suffixes: N leaves. Words are the unsigned bits of an element.

import collections
import dataclasses
import hashlib
import json
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flowjax.parallel import distributed, host

FORMAT = 1


@dataclasses.dataclass(frozen=True)
class Leaf:
  """One array of a checkpoint: its shape, dtype and 64-bit fingerprint."""

  shape: tuple[int, ...]
  dtype: str
  fingerprint: str = ""

  def __str__(self) -> str:
    return f"{self.dtype}[{','.join(map(str, self.shape))}]"


def named_leaves(tree: Any) -> dict[str, Any]:
  """Returns the leaves of a pytree by path, such as `params/final/out/bias`."""
  flat, _ = jax.tree_util.tree_flatten_with_path(tree)
  named = {
    jax.tree_util.keystr(path, simple=True, separator="/"): leaf
    for path, leaf in flat
  }
  assert len(named) == len(flat), "two leaves of the state share one path"
  return named


def nested(named: dict[str, Any]) -> dict[str, Any]:
  """Returns plain nested dicts, whatever containers the leaves came from."""
  tree: dict[str, Any] = {}
  for path, item in named.items():
    *folders, name = path.split("/")
    node = tree
    for folder in folders:
      node = node.setdefault(folder, {})
    node[name] = item
  return tree


def leaf(array: Any, fingerprint: str = "") -> Leaf:
  """Returns the entry of an array, or of its abstract stand-in."""
  return Leaf(tuple(array.shape), str(array.dtype), fingerprint)


def write(step: int, state: Any, extra: Any) -> dict[str, Any]:
  """Returns the manifest of a state, as JSON can hold it."""
  named = named_leaves(state)
  prints = fingerprints(named)
  leaves = {
    path: dataclasses.asdict(leaf(array, prints[path]))
    for path, array in named.items()
  }
  body = {
    "format": FORMAT,
    "step": step,
    "leaves": leaves,
    "extra": digest(extra),
  }
  return {**body, "digest": digest(body)}


def read(
  step: int, manifest: Any, extra: Any
) -> tuple[dict[str, Leaf], str | None]:
  """Returns the leaves a manifest lists, or the reason not to believe it."""
  if not isinstance(manifest, dict) or "digest" not in manifest:
    return {}, "the manifest is damaged"
  body = {key: item for key, item in manifest.items() if key != "digest"}
  if digest(body) != manifest["digest"]:
    return {}, "the manifest is damaged"
  if body["format"] != FORMAT:
    return {}, f"the manifest has format {body['format']}, not {FORMAT}"
  if body["step"] != step:
    return {}, f"the manifest belongs to step {body['step']}"
  if digest(extra) != body["extra"]:
    return {}, "the extra data (data state, config) is damaged"
  return {
    path: Leaf(tuple(entry["shape"]), entry["dtype"], entry["fingerprint"])
    for path, entry in body["leaves"].items()
  }, None


def digest(value: Any) -> str:
  """Returns the SHA-256 of a JSON value, whatever the order of its keys."""
  text = json.dumps(value, sort_keys=True, separators=(",", ":"))
  return hashlib.sha256(text.encode()).hexdigest()


def fingerprints(named: dict[str, jax.Array]) -> dict[str, str]:
  """Returns 16 hexadecimal digits per leaf that no sharding changes.

  The word w at global index i is mixed with its place by m, a bijection of
  uint32 (the finaliser of MurmurHash3), and summed modulo 2^32 in two ways:

    h_i = m(w_i + m(i + c_1)),   sum_i h_i   and   sum_i m(h_i + c_2).

  Addition commutes, so that the order of the shards does not matter; m is a
  bijection, so that a change confined to one word always shows. All of it runs
  where the shards are, and two numbers per leaf come back. What is kept in the
  memory of the host is brought to its devices for it, one leaf at a time.
  """
  groups = collections.defaultdict(list)
  for path, array in named.items():
    alone = path if host.is_there(array.sharding) else ""
    groups[_whole(array.sharding), alone].append(path)
  prints = {}
  for (sharding, _), paths in groups.items():
    arrays = [host.fetch(named[path], named[path].sharding) for path in paths]
    hash_all = distributed.together(jax.jit(_hash_all, out_shardings=sharding))
    hashes_N2 = np.asarray(hash_all(arrays))
    for path, (low, high) in zip(paths, hashes_N2.tolist(), strict=True):
      prints[path] = f"{high:08x}{low:08x}"
  return prints


def _whole(sharding: jax.sharding.Sharding) -> jax.sharding.Sharding:
  """Returns the sharding that gives every process the whole result."""
  if isinstance(sharding, jax.sharding.NamedSharding):
    return jax.sharding.NamedSharding(
      sharding.mesh, jax.sharding.PartitionSpec()
    )
  return sharding


def _hash_all(arrays: list[jax.Array]) -> jax.Array:
  return jnp.stack([_hash(array) for array in arrays])


@jax.jit  # Moments and averages have the shapes of their parameters.
def _hash(array: jax.Array) -> jax.Array:
  words = _words(array)
  # The index is built from iotas, not by a reshape: those follow a sharding.
  index = jnp.zeros(words.shape, jnp.uint32)
  for dim in range(words.ndim):
    stride = math.prod(words.shape[dim + 1 :]) % 2**32
    iota = jax.lax.broadcasted_iota(jnp.uint32, words.shape, dim)
    index += iota * jnp.uint32(stride)
  first = _mix(words + _mix(index + jnp.uint32(0x9E3779B9)))
  second = _mix(first + jnp.uint32(0x7F4A7C15))
  # One reduction of both reads the array once; two cost twelve times as much.
  zero = jnp.uint32(0)
  sums = jax.lax.reduce(
    (first, second), (zero, zero),
    lambda x, y: (x[0] + y[0], x[1] + y[1]), tuple(range(words.ndim)),
  )  # fmt: skip
  return jnp.stack(sums)


def _words(array: jax.Array) -> jax.Array:
  """Returns the bits of an array as uint32, wider elements as a last dim."""
  if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
    array = jax.random.key_data(array)
  if array.dtype == jnp.bool_:
    return array.astype(jnp.uint32)
  if jnp.issubdtype(array.dtype, jnp.complexfloating):
    array = jnp.stack([array.real, array.imag], axis=-1)
  bits = min(8 * array.dtype.itemsize, 32)
  unsigned = {8: jnp.uint8, 16: jnp.uint16, 32: jnp.uint32}[bits]
  return jax.lax.bitcast_convert_type(array, unsigned).astype(jnp.uint32)


def _mix(x: jax.Array) -> jax.Array:
  x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
  x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
  return x ^ (x >> 16)
