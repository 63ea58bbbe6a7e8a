"""Parameters beside a network's own: adapters, an encoder, averages.

Each function returns another network, which `init` gives a group of parameters
more and whose `own` leads back to those of the network as it was built.
"""

# Shape suffixes: B batch, H height, W width, C channels, L text tokens, E width
# of the text, P width of the pooled text, K vectors of a codebook, D their
# width.

import collections.abc
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from flowjax.models import conditions, lora, seam, text, uncertainty, vq


def with_lora(network: seam.Network, config: lora.LoraConfig) -> seam.Network:
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
  network: seam.Network,
  config: text.TextConfig,
  empty: tuple[jax.typing.ArrayLike, jax.typing.ArrayLike],
) -> seam.Network:
  """Returns the network with an encoder of captions, trained beside it.

  Its parameters are "text_encoder". The condition has "token" [B, L] and
  "token_mask" [B, L] in place of the text, and may have a "negative" of the
  same; without a condition the caption is `empty`, token [L] and mask [L].
  """
  model = network.config
  _check_text_encoder(config, model)
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
    emptied, rate = unconditional(cond), model.condition_dropout
    return conditions.exchanged(cond, emptied, tuple(nothing), rate, rng)

  def apply(params, x_BHWC, t_B, cond, rng=None):
    cond = cond if rng is None else dropped(cond, rng)
    return network.apply(without(params), x_BHWC, t_B, told(params, cond))

  def example(batch):
    shape, whole = (batch, config.tokens), network.example(batch)
    return {
      **{key: whole[key] for key in whole if key not in conditions.TEXT},
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


def _check_text_encoder(config: text.TextConfig, model: Any) -> None:
  """Raises ValueError for an encoder that a model cannot listen to."""
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


def with_uncertainty(network: seam.Network) -> seam.Network:
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
  network: seam.Network,
  group: str,
  init: collections.abc.Callable[..., seam.Params],
) -> seam.Network:
  """Returns an autoencoder with parameters `group`, drawn by `init(rng)`.

  They are no part of it: whoever trains it has a use for them.
  """

  def both(rng):
    # Adapters have fold_in(rng, 1).
    return {**network.init(rng), group: init(jax.random.fold_in(rng, 2))}

  def own(params):
    return network.own({k: v for k, v in params.items() if k != group})

  return dataclasses.replace(network, init=both, own=own)


def with_running_codebook(network: seam.Network, group: str) -> seam.Network:
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
