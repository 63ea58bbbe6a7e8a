"""Parameters beside a network's own: adapters, an encoder, averages.

Each function returns another network, which `init` gives a group of parameters
more and whose `own` leads back to those of the network as it was built.
"""

# Shape suffixes: B batch, H height, W width, C channels, L text tokens, N
# boxes, E width of the text, P width of the pooled text, K vectors of a
# codebook, D their width.

import collections.abc
import dataclasses
import functools
from typing import Any

import jax
import numpy as np

from flowjax.models import (
  encoders,
  image_encoder,
  layout,
  lora,
  seam,
  text,
  uncertainty,
  vq,
)


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
  encoders.check(
    network.config,
    f"vocabulary = {config.vocabulary}",
    tokens=config.tokens,
    width=config.width,
  )

  def apply(params, cond):
    mask_BL = cond["token_mask"].astype(bool)
    text_BLE, pooled_BP = text.apply(config, params, cond["token"], mask_BL)
    return {"text": text_BLE, "pooled": pooled_BP, "text_mask": mask_BL}

  token_L, mask_L = empty
  return encoders.with_encoder(
    network,
    encoders.Encoder(
      group=text.GROUP,
      reads="captions",
      init=functools.partial(text.init, config),
      apply=apply,
      empty={
        "token": np.asarray(token_L, np.int32),
        "token_mask": np.asarray(mask_L, bool),
      },
      flops=text.flops(config),
    ),
  )


def with_layout_encoder(
  network: seam.Network, config: layout.LayoutConfig
) -> seam.Network:
  """Returns the network with an encoder of layouts, trained beside it.

  Its parameters are "layout_encoder". The condition has "boxes" [B, N, 5] and
  "box_mask" [B, N] in place of the text, and may have a "negative" of the same;
  without a condition there is no box.
  """
  encoders.check(
    network.config,
    f"classes = {config.classes}",
    tokens=config.boxes + 1,
    width=config.width,
  )

  def apply(params, cond):
    text_BLE, pooled_BP, mask_BL = layout.apply(
      config, params, cond["boxes"], cond["box_mask"].astype(bool)
    )
    return {"text": text_BLE, "pooled": pooled_BP, "text_mask": mask_BL}

  return encoders.with_encoder(
    network,
    encoders.Encoder(
      group=layout.GROUP,
      reads="layouts",
      init=functools.partial(layout.init, config),
      apply=apply,
      empty={
        "boxes": np.zeros((config.boxes, 5), np.float32),
        "box_mask": np.zeros(config.boxes, bool),
      },
      flops=layout.flops(config),
    ),
  )


def with_image_encoder(
  network: seam.Network, config: image_encoder.EmbeddingConfig
) -> seam.Network:
  """Returns the network with what makes a text of an image, trained beside it.

  Its parameters are "image_encoder". The condition has "original" [B, H, W, C]
  or, if that is not learned, "embedding" [B, P], and "original_mask" [B] or
  "embedding_mask"; without a condition the mask is false.
  """
  model = network.config
  encoders.check(
    model, f"size = {config.size}", tokens=config.tokens, width=None
  )
  key, shape = image_encoder.told(config, model)
  mask = f"{key}_mask"

  def apply(params, cond):
    told = cond[key], cond[mask].astype(bool)
    text_BKE, pooled_BQ = image_encoder.apply(config, model, params, *told)
    return {"text": text_BKE, "pooled": pooled_BQ}

  return encoders.with_encoder(
    network,
    encoders.Encoder(
      group=image_encoder.GROUP,
      reads="images" if config.depth else "embedded images",
      init=functools.partial(image_encoder.init, config, model),
      apply=apply,
      empty={key: np.zeros((), np.float32), mask: np.zeros((), bool)},
      shapes={key: shape},
      flops=image_encoder.flops(config, model),
    ),
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
