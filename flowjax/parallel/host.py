"""The memory of the host, for what devices read seldom.

An array there has the sharding that it would have on its devices: each has its
part in the pinned memory of its own host. It is brought over to be computed
with, and taken back, inside the step, where the compiler can overlap the two
with other work.
"""

from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding

KIND = "pinned_host"
_PLATFORMS = ("tpu", "gpu", "cuda", "rocm")


def sharding(near: NamedSharding) -> NamedSharding:
  """Returns the same sharding, in the memory of the host."""
  return near.with_memory_kind(KIND)


def is_there(place: jax.sharding.Sharding | None) -> bool:
  """Returns whether what has this sharding is in the memory of the host."""
  return place is not None and place.memory_kind == KIND


def require(mesh: Mesh, key: str) -> None:
  """Raises ValueError if the devices of a mesh cannot do what `key` asks."""
  device = mesh.devices.flat[0]
  try:
    kinds = [memory.kind for memory in device.addressable_memories()]
  except (RuntimeError, NotImplementedError):
    kinds = []  # A device that is elsewhere does not say.
  if KIND in kinds or (not kinds and device.platform in _PLATFORMS):
    return
  raise ValueError(
    f"{key} keeps arrays in the memory kind '{KIND}', and a device "
    f"'{device.platform}' has {', '.join(kinds) or 'none that it names'}. "
    "Leave it out, or use GPUs or TPUs."
  )


def fetch(tree: Any, places: Any) -> Any:
  """Returns a tree on its devices, whose `places` may be in the host."""
  return _moved(tree, places, "device")


def stow(tree: Any, places: Any) -> Any:
  """Returns a tree in its `places`, of which some may be in the host."""
  return _moved(tree, places, KIND)


def _moved(tree, places, kind):
  if not any(map(is_there, jax.tree.leaves(places))):
    return tree

  def move(leaf, place):
    if not is_there(place):
      return leaf
    return jax.device_put(leaf, place.with_memory_kind(kind))

  return jax.tree.map(move, tree, places)
