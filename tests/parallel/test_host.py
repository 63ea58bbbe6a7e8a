"""The memory of the host is used where there is one, and never silently not."""

import types

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from flowjax import errors
from flowjax.commands import configs, describe
from flowjax.parallel import host, rules
from flowjax.parallel import mesh as meshes
from flowjax.train import parts


def _mesh_of(platform, *kinds):
  memories = [types.SimpleNamespace(kind=kind) for kind in kinds]
  device = types.SimpleNamespace(
    platform=platform, addressable_memories=lambda: memories
  )
  return types.SimpleNamespace(devices=np.array([device]))


def test_devices_without_that_memory_are_refused_with_the_reason():
  host.require(_mesh_of("gpu", "device", "pinned_host"), "offload = True")
  host.require(_mesh_of("tpu"), "offload = True")
  with pytest.raises(
    ValueError, match="offload = True.*'pinned_host'.*'cpu' has device, other"
  ):
    host.require(_mesh_of("cpu", "device", "other"), "offload = True")


def test_only_what_is_in_the_host_moves():
  mesh = meshes.build(meshes.MeshConfig(data=1, fsdp=8))
  near = jax.sharding.NamedSharding(mesh, P("fsdp"))
  places = {"far": host.sharding(near), "near": near}
  tree = jax.device_put({"far": np.ones(8), "near": np.ones(8)}, places)
  fetched = jax.jit(lambda tree: host.fetch(tree, places))(tree)
  kinds = {name: leaf.sharding.memory_kind for name, leaf in fetched.items()}
  assert kinds == {"far": "device", "near": "device"}
  stowed = jax.jit(lambda tree: host.stow(tree, places), out_shardings=places)
  kinds = {n: x.sharding.memory_kind for n, x in stowed(fetched).items()}
  assert kinds == {"far": "pinned_host", "near": "device"}


@pytest.mark.parametrize(
  ("flag", "key"),
  [
    ("--config.optim.offload=True", r"config.optim: offload = True"),
    ("--config.model.remat=offload", r"config.model: remat = 'offload'"),
  ],
)
def test_a_run_that_cannot_offload_does_not_begin(flag, key, monkeypatch):
  config = configs.load("configs/digits_dit.py", [flag])
  parts.build(config)
  monkeypatch.setattr(host, "KIND", "memory_of_the_moon")
  with pytest.raises(errors.UserError, match=key):
    parts.build(config)


def test_describe_tells_what_the_host_holds():
  flags = ["--config.mesh.fsdp=8", "--config.optim.offload=True"]
  built = parts.build(configs.load("configs/digits_dit.py", flags))
  places = rules.places(built.rules, built.abstract.params, built.mesh)
  shown = describe._summary(built, places)
  moments = sum(
    map(describe._bytes_here, jax.tree.leaves(built.abstract.opt_state))
  )
  assert shown["  and in its host"].startswith(describe._size(moments - 8))
  assert "parameters, EMA)" in shown["state per device"]
