"""How fast devices add up what each of them holds, along a mesh axis."""

import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from flowjax.parallel import distributed

_TURNS = 5


def all_reduce(mesh: Mesh, axis: str, bytes_per_device: int) -> float:
  """Returns the bytes per second that a device moves in an all-reduce.

  Of n devices that sum S bytes, each must send and receive 2 (n - 1) / n S
  (Patarasuk and Yuan 2009, theorem 1): that, by the median time. Raises
  ValueError if the sum is wrong.
  """
  ways, count = mesh.shape[axis], max(1, bytes_per_device // 4)
  spec = P(mesh.axis_names)

  def make():
    # As many elements on each device, with the number of the device in them.
    return jnp.repeat(jnp.arange(mesh.size, dtype=jnp.float32), count)

  def total(x):
    return jax.lax.psum(x, axis)

  sharding = jax.sharding.NamedSharding(mesh, spec)
  x = jax.jit(make, out_shardings=sharding)()
  others = tuple(name for name in mesh.axis_names if name != axis)
  run = distributed.together(
    jax.jit(jax.shard_map(total, mesh=mesh, in_specs=spec, out_specs=P(others)))
  )
  found = jax.block_until_ready(run(x))
  _check(mesh, axis, found)
  times = []
  for _ in range(_TURNS):
    before = time.monotonic()
    jax.block_until_ready(run(x))
    times.append(time.monotonic() - before)
  return 2 * (ways - 1) / ways * 4 * count / float(np.median(times))


def _check(mesh: Mesh, axis: str, found: jax.Array) -> None:
  numbers = np.arange(mesh.size, dtype=np.float32).reshape(mesh.devices.shape)
  place = mesh.axis_names.index(axis)
  sums = numbers.sum(axis=place, keepdims=True)
  wanted = np.broadcast_to(sums, numbers.shape)
  of_device = dict(
    zip(mesh.devices.flat, wanted.reshape(-1).tolist(), strict=True)
  )
  for shard in found.addressable_shards:
    if not (np.asarray(shard.data) == of_device[shard.device]).all():
      raise ValueError(
        f"an all-reduce over {axis} gave {np.asarray(shard.data)[0]} on "
        f"{shard.device}, and not {of_device[shard.device]}"
      )
