"""Networks, behind one seam: plain functions over a plain dict of arrays.

Nobody outside this folder knows with which library a network is written.
"""

import collections.abc
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from flowjax.models import (
  autoencoder,
  blocks,
  convolutions,
  coupling,
  dit,
  flux,
  lora,
  mmdit,
  text,
  uncertainty,
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
  encode: collections.abc.Callable[..., tuple] | None = None
  decode: collections.abc.Callable[..., jax.Array] | None = None
  reconstruct: collections.abc.Callable[..., Any] | None = None
  last: collections.abc.Callable[..., jax.Array] | None = None
  # From all parameters to those of the network as it was built.
  own: collections.abc.Callable[[Params], Params] = lambda params: params
  # From all parameters and a condition to what the network as it was built is
  # told.
  told: collections.abc.Callable[[Params, Cond], Cond] = lambda _, cond: cond


def with_lora(network: Network, config: lora.LoraConfig) -> Network:
  """Returns the network with adapters, parameters "lora", beside its kernels.

  With the parameters of `init` it gives what it gave without them. Raises
  ValueError, also from `init`, for a target that the network does not have.
  """
  if network.forward is not None or network.encode is not None:
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


def with_text_encoder(
  network: Network,
  config: text.TextConfig,
  empty: tuple[jax.typing.ArrayLike, jax.typing.ArrayLike],
) -> Network:
  """Returns the network with an encoder of captions, trained beside it.

  Its parameters are "text_encoder". The condition has "token" [B, L] and
  "token_mask" [B, L] in place of the text, and may have a "negative" of the
  same; without a condition the caption is `empty`, token [L] and mask [L].
  """
  model = network.config
  if not hasattr(model, "text_width") or model.num_classes:
    raise ValueError(
      f"vocabulary = {config.vocabulary}: a network {model.name!r} with "
      f"num_classes = {model.num_classes} reads no text; take an MM-DiT or a "
      "FLUX with num_classes = 0, or set vocabulary = 0."
    )
  if not model.text_width == model.pooled_width == config.width:
    raise ValueError(
      f"width = {config.width} must be that of the text, model.text_width = "
      f"{model.text_width}, and model.pooled_width = {model.pooled_width}."
    )
  if model.text_tokens != config.tokens:
    raise ValueError(
      f"tokens = {config.tokens} and model.text_tokens = {model.text_tokens} "
      "must be the same."
    )
  nothing = dict(zip(("token", "token_mask"), empty, strict=True))

  def init(rng):
    encoder = text.init(config, jax.random.fold_in(rng, 2))
    return {**network.init(rng), text.GROUP: encoder}

  def without(params):
    return {key: params[key] for key in params if key != text.GROUP}

  def encoded(params, cond):
    mask_BL = cond["token_mask"].astype(bool)
    text_BLE, pooled_BP = text.apply(
      config, params[text.GROUP], cond["token"], mask_BL
    )
    return {"text": text_BLE, "pooled": pooled_BP, "text_mask": mask_BL}

  def told(params, cond):
    if "token" not in cond:
      raise ValueError(
        "The network reads captions, cond={'token': [B, L], 'token_mask': "
        f"[B, L]}}, got the keys {sorted(cond)}."
      )
    others = {key: cond[key] for key in cond if key not in nothing}
    if "negative" in cond:
      others["negative"] = encoded(params, cond["negative"])
    return {**others, **encoded(params, cond)}

  def unconditional(cond):
    if "negative" in cond:
      return {**cond, **cond["negative"]}
    emptied = {
      key: jnp.broadcast_to(
        jnp.asarray(row, cond[key].dtype)[None], cond[key].shape
      )
      for key, row in nothing.items()
    }
    return {**cond, **emptied}

  def dropped(cond, rng):
    emptied = unconditional(cond)
    drop_B = jax.random.bernoulli(
      rng, model.condition_dropout, cond["token"].shape[:1]
    )
    lost = {
      key: jnp.where(drop_B[:, None], emptied[key], cond[key])
      for key in nothing
    }
    return {**cond, **lost}

  def apply(params, x_BHWC, t_B, cond, rng=None):
    cond = cond if rng is None else dropped(cond, rng)
    return network.apply(without(params), x_BHWC, t_B, told(params, cond))

  def example(batch):
    shape = (batch, config.tokens)
    return {
      "token": jnp.zeros(shape, jnp.int32),
      "token_mask": jnp.ones(shape, bool),
    }

  return dataclasses.replace(
    network,
    init=init,
    apply=apply,
    unconditional=unconditional,
    flops=network.flops + text.flops(config),
    example=example,
    dropped=dropped,
    own=lambda params: network.own(without(params)),
    told=told,
  )


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


def with_beside(
  network: Network, group: str, init: collections.abc.Callable[..., Params]
) -> Network:
  """Returns an autoencoder with parameters `group`, drawn by `init(rng)`.

  They are no part of it: whoever trains it has a use for them.
  """

  def both(rng):
    # Adapters have fold_in(rng, 1).
    return {**network.init(rng), group: init(jax.random.fold_in(rng, 2))}

  def own(params):
    return network.own({k: v for k, v in params.items() if k != group})

  return dataclasses.replace(network, init=both, own=own)


def with_running_codebook(network: Network, group: str) -> Network:
  """Returns a VQ autoencoder whose codebook is the quotient of averages.

  The parameters `group` have them, "count" and "sum", in place of the codebook.
  """

  def init(rng):
    params = network.init(rng)
    code_KD = params.pop("codebook")["embedding"]
    return {**params, group: vq.running(code_KD)}

  def own(params):
    rest = {key: value for key, value in params.items() if key != group}
    code_KD = vq.quotient(params[group])
    return network.own({**rest, "codebook": {"embedding": code_KD}})

  changed: dict[str, Any] = {
    name: _on_own(getattr(network, name), own)
    for name in ("encode", "decode", "reconstruct")
  }
  return dataclasses.replace(network, init=init, own=own, **changed)


def _on_own(function: Any, own: Any) -> collections.abc.Callable[..., Any]:
  return lambda params, *inputs: function(own(params), *inputs)


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
