"""Networks, behind one seam: plain functions over a plain dict of arrays.

Nobody outside this folder knows with which library a network is written.
"""

import collections.abc
import dataclasses
import functools
from typing import Any

import jax

from flowjax.models import (
  autoencoder,
  beside,
  blocks,
  conditions,
  convolutions,
  coupling,
  dit,
  flux,
  mmdit,
  seam,
  vq,
)
from flowjax.ops import attention

CONFIGS: dict[str, Any] = {
  "dit": dit.DiTConfig,
  "coupling": coupling.CouplingConfig,
  "mmdit": mmdit.MMDiTConfig,
  "flux": flux.FluxConfig,
  "autoencoder": autoencoder.AutoencoderConfig,
  "vq": vq.VQConfig,
}
_MODULES: dict[str, Any] = {
  "dit": dit,
  "coupling": coupling,
  "mmdit": mmdit,
  "flux": flux,
  "autoencoder": autoencoder,
  "vq": vq,
}

# They reconstruct images, and have no field.
AUTOENCODERS = ("autoencoder", "vq")

# Within it, a network has derivatives in forward mode (`jax.jvp`) as well.
forward_mode = attention.forward_mode
# Values of `attention` with which it has not.
REVERSE_ALONE = attention.REVERSE_ALONE

# Values of `remat` that need the memory of the host.
OFFLOADING = blocks.OFFLOADING

Params = seam.Params
Cond = seam.Cond
Network = seam.Network

with_lora = beside.with_lora
with_text_encoder = beside.with_text_encoder
with_layout_encoder = beside.with_layout_encoder
with_image_encoder = beside.with_image_encoder
with_uncertainty = beside.with_uncertainty
with_beside = beside.with_beside
with_running_codebook = beside.with_running_codebook


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

  def apply(params, x_BHWC, t_B, cond, *rng):
    shallow = module.without_layers(network.config, network.own(params), layers)
    return module.apply(*shallow, x_BHWC, t_B, network.told(params, cond), *rng)

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

  def apply(params, x_BHWC, t_B, cond, *rng):
    told = network.told(params, cond)
    return alone(network.own(params), x_BHWC, t_B, told, *rng)

  return apply


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


def told(config: Any) -> str:
  """Says what a network of this config is told: labels, texts or nothing."""
  if getattr(config, "num_classes", 0):
    return "labels"
  return "texts" if conditions.reads_text(config) else "nothing"


def build(config: Any) -> Network:
  """Returns the network that `config` describes."""
  module = _MODULES[config.name]
  if hasattr(module, "encode"):
    return _autoencoder(module, config)
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


def _autoencoder(module: Any, config: Any) -> Network:
  """Returns an autoencoder, which is told nothing but images."""

  def apply(*inputs):
    del inputs
    raise ValueError(
      f"model.name={config.name!r} maps images to latents and back, and has no "
      "velocity at a time t: train a network of the latents to sample."
    )

  return Network(
    config=config,
    init=functools.partial(module.init, config),
    apply=apply,
    unconditional=lambda cond: cond,
    flops=module.flops(config),
    example=lambda count: {},
    dropped=lambda cond, rng: cond,
    last=functools.partial(convolutions.last, config),
    **{
      name: functools.partial(getattr(module, name), config)
      for name in ("encode", "decode", "reconstruct")
    },
  )
