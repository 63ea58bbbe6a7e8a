"""Finds what fits a cluster: the mesh, the batch, the lightest remat.

The model goes through all of them in seconds; the compiler checks the best.
"""

import collections.abc
import dataclasses
import math

from flowjax import errors
from flowjax.parallel import mesh as meshes
from flowjax.parallel import topology
from flowjax.train import experiment, plan

# How many the compiler looks at, and how many are shown.
COMPILED, SHOWN = 3, 8
# From the lightest on, which computes least again. What is kept in the memory
# of the host waits for its bus, which the model does not know.
REMATS = ("none", "matmuls", "dots", "save_attention", "full")
# Heads and hidden width are divided within a node; tokens no further either.
LARGEST_TENSOR, LARGEST_CONTEXT = 8, 8
# With a larger share of HBM by the model, the compiler is not asked.
ROOM = 1.0


def run(
  config: experiment.Experiment,
  where: topology.Topology,
  *,
  compiles: int = COMPILED,
  told: collections.abc.Callable[[str], None] = print,
) -> list[plan.Plan]:
  """Returns what fits, the fastest first; raises UserError if nothing does.

  For each mesh and remat the largest batch of 2^k per device that fits, up to
  what `config` has in all.
  """
  found: list[plan.Plan] = []
  smallest = math.inf
  for shape in shapes(config, where):
    for remat in _remats(config):
      best, least = _largest(_with(config, shape, remat), where)
      smallest = min(smallest, least)
      if best is not None:
        found.append(best)
  if not found:
    raise errors.UserError(
      f"Nothing fits {where}: the least that the model finds is "
      f"{smallest / 2**30:.1f} GiB per device of "
      f"{where.chip.hbm_bytes / 2**30:.1f}. Take more devices, a smaller "
      "config.data.batch_size, or config.optim.accumulate."
    )
  found.sort(key=_rank)
  told(f"{len(found)} combinations fit by the model.")
  return _checked(config, where, found, compiles, told)


def _rank(one: plan.Plan) -> float:
  return one.step.seconds / one.batch_size


def _checked(config, where, found, compiles, told) -> list[plan.Plan]:
  """Lets the compiler look at the first, and drops those that do not fit."""
  checked: list[plan.Plan] = []
  for one in found:
    if len(checked) == compiles:
      break
    told(
      f"Compiling {one.shape}, batch {one.batch_size}, remat {one.remat} ..."
    )
    again, _ = plan.compiled(
      _with(config, one.shape, one.remat, one.batch_size), where
    )
    if again.fits:
      checked.append(again)
    else:
      told(f"  it needs {again.bytes_per_device / 2**30:.1f} GiB: too much.")
  known = {(str(c.shape), c.batch_size, c.remat) for c in checked}
  rest = [
    f for f in found if (str(f.shape), f.batch_size, f.remat) not in known
  ]
  if compiles:
    checked.sort(key=_rank)
    return (checked + rest)[:SHOWN]
  return rest[:SHOWN]


def shapes(
  config: experiment.Experiment, where: topology.Topology
) -> list[dict[str, int]]:
  """Returns the meshes that this model allows on these devices."""
  model, found = config.model, []
  for tensor in _powers(LARGEST_TENSOR):
    for context in _powers(LARGEST_CONTEXT):
      if not _divides(model, tensor, context) or where.size % (
        tensor * context
      ):
        continue
      rest = where.size // (tensor * context)
      for fsdp in _powers(rest):
        if rest % fsdp == 0 and fsdp * tensor * context <= where.domain:
          sizes = (rest // fsdp, fsdp, tensor, context, 1)
          found.append(dict(zip(meshes.AXES, sizes, strict=True)))
  return found


def _divides(model, tensor: int, context: int) -> bool:
  if not hasattr(model, "heads"):
    return tensor == context == 1
  tokens = math.prod(model.grid)
  return not (
    model.heads % tensor or model.mlp_width % tensor or tokens % context
  )


def _powers(most: int) -> list[int]:
  return [2**k for k in range(most.bit_length())]


def _remats(config: experiment.Experiment) -> tuple[str, ...]:
  return REMATS if hasattr(config.model, "remat") else ("none",)


def _with(config, shape, remat, batch: int | None = None):
  model = config.model
  if hasattr(model, "remat"):
    model = dataclasses.replace(model, remat=remat)
  data = config.data
  if batch is not None:
    data = dataclasses.replace(data, batch_size=batch)
  mesh = meshes.MeshConfig(**shape)
  return dataclasses.replace(config, model=model, data=data, mesh=mesh)


def _largest(config, where) -> tuple[plan.Plan | None, float]:
  """Returns the plan of the largest batch that fits, and the least memory."""
  ways = config.mesh.data * config.mesh.fsdp * config.optim.accumulate
  most = config.data.batch_size // ways
  best, least = None, math.inf
  for each in _powers(most):
    one = plan.modelled(
      dataclasses.replace(
        config, data=dataclasses.replace(config.data, batch_size=each * ways)
      ),
      where,
    )
    least = min(least, one.bytes_per_device)
    if one.bytes_per_device > ROOM * one.hbm_bytes:
      break
    best = one
  return best, least
