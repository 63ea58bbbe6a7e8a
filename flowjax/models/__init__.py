"""Networks, behind one seam: plain functions over a plain dict of arrays.

Nobody outside this folder knows with which library a network is written.
"""

import collections.abc
import dataclasses
import functools
from typing import Any

import jax
import numpy as np

from flowjax.models import coupling, dit, uncertainty

CONFIGS: dict[str, Any] = {
  "dit": dit.DiTConfig,
  "coupling": coupling.CouplingConfig,
}
_MODULES: dict[str, Any] = {"dit": dit, "coupling": coupling}

Params = dict[str, Any]
Cond = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Network:
  """A network as pure functions of its parameters.

  `apply(params, x_BHWC, t_B, cond, rng=None)` returns v_BHWC in float32. An
  rng says that this is training: conditioning is then dropped now and then,
  so that `unconditional(cond)` means something to the network.

  A normalizing flow has `forward(params, x_BHWC, cond, rng=None)`, which
  returns z_BHWC and log|det dz/dx| [B], and `inverse(params, z_BHWC, cond)`,
  which returns x_BHWC; its `apply` refuses. Other networks have neither.
  """

  config: Any
  init: collections.abc.Callable[[jax.Array], Params]
  apply: collections.abc.Callable[..., jax.Array]
  unconditional: collections.abc.Callable[[Cond], Cond]
  flops: int  # forward, per example; a multiply-add is two
  forward: collections.abc.Callable[..., tuple] | None = None
  inverse: collections.abc.Callable[..., jax.Array] | None = None
  uncertainty: collections.abc.Callable[..., jax.Array] | None = None


def with_uncertainty(network: Network) -> Network:
  """Returns the network with parameters "uncertainty" beside its own.

  `uncertainty(params, t_B)` is then its u_B; `apply` does not see them.
  """

  def init(rng):
    return {**network.init(rng), "uncertainty": uncertainty.init()}

  def apply(params, *inputs):
    own = {key: params[key] for key in params if key != "uncertainty"}
    return network.apply(own, *inputs)

  return dataclasses.replace(
    network,
    init=init,
    apply=apply,
    uncertainty=lambda params, t_B: uncertainty.apply(
      params["uncertainty"], t_B
    ),
  )


def without_layers(
  network: Network, layers: collections.abc.Sequence[int]
) -> collections.abc.Callable[..., jax.Array]:
  """Returns `apply` of the network without some of its blocks.

  Skip-layer guidance pushes away from what such a network says. The blocks are
  stacked, so leaving some out is a shallower network on a part of the stack.
  Raises ValueError for a block that is not there.
  """
  depth = network.config.depth
  outside = [layer for layer in layers if not 0 <= layer < depth]
  if outside or len(set(layers)) >= depth:
    raise ValueError(
      f"skip_layers = {tuple(layers)}: this network has the blocks 0 to "
      f"{depth - 1}, and at least one must stay."
    )
  kept = np.array([i for i in range(depth) if i not in layers])
  shallow = build(dataclasses.replace(network.config, depth=len(kept)))

  def apply(params, *inputs):
    blocks = jax.tree.map(lambda leaf: leaf[kept], params["blocks"])
    own = {key: params[key] for key in params if key != "uncertainty"}
    return shallow.apply({**own, "blocks": blocks}, *inputs)

  return apply


def build(config: Any) -> Network:
  """Returns the network that `config` describes."""
  module = _MODULES[config.name]
  both_ways = {
    name: functools.partial(getattr(module, name), config)
    for name in ("forward", "inverse")
    if hasattr(module, name)
  }
  return Network(
    config=config,
    init=functools.partial(module.init, config),
    apply=functools.partial(module.apply, config),
    unconditional=functools.partial(module.unconditional, config),
    flops=module.flops(config),
    **both_ways,
  )
