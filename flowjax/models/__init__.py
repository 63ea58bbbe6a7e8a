"""Networks, behind one seam: plain functions over a plain dict of arrays.

Nobody outside this folder knows with which library a network is written.
"""

import collections.abc
import dataclasses
import functools
from typing import Any

import jax

from flowjax.models import blocks, coupling, dit, flux, lora, mmdit, uncertainty
from flowjax.ops import attention

CONFIGS: dict[str, Any] = {
  "dit": dit.DiTConfig,
  "coupling": coupling.CouplingConfig,
  "mmdit": mmdit.MMDiTConfig,
  "flux": flux.FluxConfig,
}
_MODULES: dict[str, Any] = {
  "dit": dit,
  "coupling": coupling,
  "mmdit": mmdit,
  "flux": flux,
}

# Within it, a network has derivatives in forward mode (`jax.jvp`) as well.
forward_mode = attention.forward_mode
# Values of `attention` with which it has not.
REVERSE_ALONE = attention.REVERSE_ALONE

# Values of `remat` that need the memory of the host.
OFFLOADING = blocks.OFFLOADING

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
  example: collections.abc.Callable[[int], Cond]  # A condition of zeros.
  # dropped(cond, rng): as training drops it, each example by itself.
  dropped: collections.abc.Callable[[Cond, jax.Array], Cond]
  forward: collections.abc.Callable[..., tuple] | None = None
  inverse: collections.abc.Callable[..., jax.Array] | None = None
  uncertainty: collections.abc.Callable[..., jax.Array] | None = None
  # From all parameters to those of the network as it was built.
  own: collections.abc.Callable[[Params], Params] = lambda params: params


def with_lora(network: Network, config: lora.LoraConfig) -> Network:
  """Returns the network with adapters, parameters "lora", beside its kernels.

  With the parameters of `init` it gives what it gave without them. Raises
  ValueError, also from `init`, for a target that the network does not have.
  """
  if network.forward is not None:
    raise ValueError(
      f"rank = {config.rank}: a network {network.config.name!r} has no "
      "adapters; set 0."
    )

  def init(rng):
    params = network.init(rng)
    factors = lora.init(config, params, jax.random.fold_in(rng, 1))
    return {**params, lora.GROUP: factors}

  def apply(params, *inputs):
    return network.apply(lora.beside(config, params), *inputs)

  def own(params):
    return network.own(lora.beside(config, params))

  return dataclasses.replace(network, init=init, apply=apply, own=own)


def with_uncertainty(network: Network) -> Network:
  """Returns the network with parameters "uncertainty" beside its own.

  `uncertainty(params, t_B)` is then its u_B; `apply` does not see them.
  """

  def init(rng):
    return {**network.init(rng), "uncertainty": uncertainty.init()}

  def without(params):
    return {key: params[key] for key in params if key != "uncertainty"}

  def apply(params, *inputs):
    return network.apply(without(params), *inputs)

  return dataclasses.replace(
    network,
    init=init,
    apply=apply,
    own=lambda params: network.own(without(params)),
    uncertainty=lambda params, t_B: uncertainty.apply(
      params["uncertainty"], t_B
    ),
  )


def over_shares(
  network: Network,
  over: collections.abc.Callable[
    [collections.abc.Callable[..., Any]], collections.abc.Callable[..., Any]
  ],
) -> Network:
  """Returns the network with `over(function)` for what it computes.

  That may deal out the batch: what is random is drawn before, for the whole.
  """

  def drawn(cond, rng):
    return cond if rng is None else network.dropped(cond, rng)

  def apply(params, x_BHWC, t_B, cond, rng=None):
    return over(network.apply)(params, x_BHWC, t_B, drawn(cond, rng))

  changed: dict[str, Any] = {"apply": apply}
  if network.forward is not None:
    through = over(network.forward)
    changed["forward"] = lambda params, x_BHWC, cond, rng=None: through(
      params, x_BHWC, drawn(cond, rng)
    )
  if network.uncertainty is not None:
    changed["uncertainty"] = over(network.uncertainty)
  return dataclasses.replace(network, **changed)


def without_layers(
  network: Network, layers: collections.abc.Sequence[int]
) -> collections.abc.Callable[..., jax.Array]:
  """Returns `apply` of the network without some of its blocks.

  Skip-layer guidance pushes away from what such a network says. Raises
  ValueError for a block that is not there, or must stay.
  """
  module = _degradable(network, layers, "without_layers")
  module.check_layers(network.config, layers)

  def apply(params, *inputs):
    shallow = module.without_layers(network.config, network.own(params), layers)
    return module.apply(*shallow, *inputs)

  return apply


def with_identity_attention(
  network: Network, layers: collections.abc.Sequence[int]
) -> collections.abc.Callable[..., jax.Array]:
  """Returns `apply` of the network whose tokens see themselves alone in blocks.

  There the weights of attention are replaced by the identity. Perturbed
  attention guidance (arXiv:2403.17377) pushes away from what such a network
  says. Raises ValueError for a block that is not there.
  """
  module = _degradable(network, layers, "with_identity_attention")
  alone = module.with_identity_attention(network.config, layers)
  return lambda params, *inputs: alone(network.own(params), *inputs)


def _degradable(network: Network, layers, way: str) -> Any:
  """Returns the module of the network, which has the function `way`."""
  module = _MODULES[network.config.name]
  if not hasattr(module, way):
    able = [name for name in _MODULES if hasattr(_MODULES[name], way)]
    raise ValueError(
      f"blocks {tuple(layers)}: guidance by blocks is not made for a network "
      f"{network.config.name!r}; it is for {', '.join(able)}."
    )
  depth = network.config.depth
  if any(not 0 <= layer < depth for layer in layers):
    raise ValueError(
      f"blocks {tuple(layers)}: this network has the blocks 0 to {depth - 1}."
    )
  return module


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
    example=functools.partial(module.example, config),
    dropped=functools.partial(module.dropped, config),
    **both_ways,
  )
