"""Where the weights of the autoencoders live in diffusers' `vae/` folders."""

import collections.abc
import re
from typing import Any

import numpy as np

from flowjax import errors
from flowjax.interop import tables
from flowjax.models import convolutions

# An axis is named by its size, with a letter for what it is: I and O channels
# in and out, Y and X rows and columns of a kernel, P query, key and value, K
# vectors of a codebook.

# What attention was called in folders that older versions wrote.
_OLDER = {
  "query": "to_q",
  "key": "to_k",
  "value": "to_v",
  "proj_attn": "to_out.0",
}

# The fields of each class of diffusers with its defaults.
_BOTH: dict[str, Any] = {
  "in_channels": 3,
  "out_channels": 3,
  "down_block_types": ("DownEncoderBlock2D",),
  "up_block_types": ("UpDecoderBlock2D",),
  "block_out_channels": (64,),
  "layers_per_block": 1,
  "act_fn": "silu",
  "sample_size": 32,
  "norm_num_groups": 32,
  "scaling_factor": 0.18215,
  "mid_block_add_attention": True,
}
FIELDS: dict[str, dict[str, Any]] = {
  "autoencoder": {
    **_BOTH,
    "latent_channels": 4,
    "shift_factor": None,
    "latents_mean": None,
    "latents_std": None,
    "force_upcast": True,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
  },
  "vq": {
    **_BOTH,
    "latent_channels": 3,
    "num_vq_embeddings": 256,
    "vq_embed_dim": None,
    "norm_type": "group",
    "lookup_from_codebook": False,
    "force_upcast": False,
  },
}
CLASSES = {"AutoencoderKL": "autoencoder", "VQModel": "vq"}
_BLOCKS = {
  False: ("DownEncoderBlock2D", "UpDecoderBlock2D"),
  True: ("AttnDownEncoderBlock2D", "AttnUpDecoderBlock2D"),
}
# With other values the class is another network.
_FIXED: dict[str, tuple] = {
  "act_fn": ("silu", "swish"),
  "latents_mean": (None,),
  "latents_std": (None,),
  "norm_type": ("group",),
}


def diffusers_layout(config: Any) -> tables.Table:
  """Returns the table to the state dict of `AutoencoderKL` or `VQModel`."""
  widths, latent = config.widths, config.latent_channels
  is_vq = config.name == "vq"
  moments = latent if is_vq else 2 * latent
  rules = [
    *_conv("encoder/in", "encoder.conv_in", config.channels, widths[0]),
    *_levels(config, "encoder", convolutions.down(config), config.depth),
    *_middle(config, "encoder"),
    *_norm("encoder/norm", "encoder.conv_norm_out", widths[-1]),
    *_conv("encoder/out", "encoder.conv_out", widths[-1], moments),
    *_conv("decoder/in", "decoder.conv_in", latent, widths[-1]),
    *_middle(config, "decoder"),
    *_levels(config, "decoder", convolutions.up(config), config.depth + 1),
    *_norm("decoder/norm", "decoder.conv_norm_out", widths[0]),
    *_conv("decoder/out", "decoder.conv_out", widths[0], config.channels),
  ]
  vector = config.vector_width if is_vq else latent
  if is_vq or config.use_quant_conv:
    out = vector if is_vq else moments
    rules += _conv("quant_conv", "quant_conv", moments, out, 1)
  if is_vq or config.use_post_quant_conv:
    rules += _conv("post_quant_conv", "post_quant_conv", vector, latent, 1)
  if is_vq:
    axes = f"K{config.codes} O{vector}"
    rules += [
      tables.Rule(
        "codebook/embedding", "quantize.embedding.weight", f"{axes} -> {axes}"
      )
    ]
  return tables.Table(tuple(rules), _sizes(rules))


def diffusers_config(config: Any) -> dict[str, Any]:
  """Returns the fields of the class of diffusers that say something."""
  attends = [i in config.attention_levels for i in range(len(config.widths))]
  height, width = config.image_size
  fields = {
    "in_channels": config.channels,
    "out_channels": config.channels,
    "down_block_types": [_BLOCKS[each][0] for each in attends],
    "up_block_types": [_BLOCKS[each][1] for each in reversed(attends)],
    "block_out_channels": list(config.widths),
    "layers_per_block": config.depth,
    "latent_channels": config.latent_channels,
    "sample_size": height if height == width else [height, width],
    "norm_num_groups": config.groups,
    "scaling_factor": config.scaling_factor,
    "mid_block_add_attention": config.middle_attention,
    "force_upcast": config.force_upcast,
  }
  if config.name == "vq":
    return fields | {
      "num_vq_embeddings": config.codes,
      "vq_embed_dim": config.vector_width,
    }
  return fields | {
    "shift_factor": config.shift_factor,
    "use_quant_conv": config.use_quant_conv,
    "use_post_quant_conv": config.use_post_quant_conv,
  }


def fixed(fields: dict[str, Any]) -> dict[str, tuple]:
  """Returns the values of the fields with which the class is our network."""
  attends = _attends(fields)
  return {
    **{name: _FIXED[name] for name in _FIXED if name in fields},
    "out_channels": (fields["in_channels"],),
    "down_block_types": (tuple(_BLOCKS[each][0] for each in attends),),
    "up_block_types": (tuple(_BLOCKS[each][1] for each in reversed(attends)),),
  }


def our_config(kind: str, fields: dict[str, Any]) -> dict[str, Any]:
  """Returns what the fields of diffusers say of our config."""
  size = fields["sample_size"]
  found = {
    "image_size": (size, size) if isinstance(size, int) else tuple(size),
    "channels": fields["in_channels"],
    "latent_channels": fields["latent_channels"],
    "widths": tuple(fields["block_out_channels"]),
    "depth": fields["layers_per_block"],
    "attention_levels": tuple(np.flatnonzero(_attends(fields)).tolist()),
    "middle_attention": fields["mid_block_add_attention"],
    "groups": fields["norm_num_groups"],
    "scaling_factor": float(fields["scaling_factor"]),
    "force_upcast": fields["force_upcast"],
  }
  if kind == "vq":
    return found | {
      "codes": fields["num_vq_embeddings"],
      "code_width": fields["vq_embed_dim"],
    }
  return found | {
    "shift_factor": fields["shift_factor"],
    "use_quant_conv": fields["use_quant_conv"],
    "use_post_quant_conv": fields["use_post_quant_conv"],
  }


def renamed(tensors: tables.Tensors) -> dict[str, np.ndarray]:
  """Returns the tensors by the names that attention has today."""

  def today(key: str) -> str:
    found = re.fullmatch(r"(.+\.attentions\.\d+)\.(\w+)\.(weight|bias)", key)
    if not found or found[2] not in _OLDER:
      return key
    return f"{found[1]}.{_OLDER[found[2]]}.{found[3]}"

  named: dict[str, np.ndarray] = {}
  for key, tensor in tensors.items():
    if today(key) in named:
      raise errors.CheckpointError(f"{key} is there by two names, old and new.")
    named[today(key)] = tensor
  return named


def _attends(fields: dict[str, Any]) -> list[bool]:
  """Returns which levels are said to have attention, that of pixels first."""
  kinds = list(fields["down_block_types"])
  kinds += [None] * (len(fields["block_out_channels"]) - len(kinds))
  return [kind == _BLOCKS[True][0] for kind in kinds]


def _levels(
  config: Any, side: str, levels: list, count: int
) -> collections.abc.Iterator[tables.Rule]:
  """Yields the rules of all levels of the encoder, or of the decoder."""
  way = "down" if side == "encoder" else "up"
  for i, (level, into, then) in enumerate(levels):
    ours, theirs = f"{side}/level_{level}", f"{side}.{way}_blocks.{i}"
    width = config.widths[level]
    for j in range(count):
      first = into if j == 0 else width
      yield from _residual(
        f"{ours}/block_{j}", f"{theirs}.resnets.{j}", first, width
      )
      if level in config.attention_levels:
        yield from _attention(
          f"{ours}/attention_{j}", f"{theirs}.attentions.{j}", width
        )
    if then:
      sampler = f"{theirs}.{way}samplers.0.conv"
      yield from _conv(f"{ours}/{way}", sampler, width, width)


def _middle(config: Any, side: str) -> collections.abc.Iterator[tables.Rule]:
  ours, theirs, width = f"{side}/middle", f"{side}.mid_block", config.widths[-1]
  for j in range(2):
    names = f"{ours}/block_{j}", f"{theirs}.resnets.{j}"
    yield from _residual(*names, width, width)
  if config.middle_attention:
    names = f"{ours}/attention_0", f"{theirs}.attentions.0"
    yield from _attention(*names, width)


def _residual(
  ours: str, theirs: str, into: int, width: int
) -> collections.abc.Iterator[tables.Rule]:
  yield from _norm(f"{ours}/norm_1", f"{theirs}.norm1", into)
  yield from _conv(f"{ours}/conv_1", f"{theirs}.conv1", into, width)
  yield from _norm(f"{ours}/norm_2", f"{theirs}.norm2", width)
  yield from _conv(f"{ours}/conv_2", f"{theirs}.conv2", width, width)
  if into != width:
    shortcut = f"{theirs}.conv_shortcut"
    yield from _conv(f"{ours}/shortcut", shortcut, into, width, 1)


def _attention(
  ours: str, theirs: str, width: int
) -> collections.abc.Iterator[tables.Rule]:
  yield from _norm(f"{ours}/norm", f"{theirs}.group_norm", width)
  yield from tables.linear(
    f"{ours}/qkv",
    theirs + ".{P3}",
    f"I{width} -> P3 O{width}",
    names={"P3": ("to_q", "to_k", "to_v")},
  )
  yield from tables.linear(
    f"{ours}/out", f"{theirs}.to_out.0", f"I{width} -> O{width}"
  )


def _norm(
  ours: str, theirs: str, width: int
) -> collections.abc.Iterator[tables.Rule]:
  yield tables.Rule(
    f"{ours}/scale", f"{theirs}.weight", f"O{width} -> O{width}"
  )
  yield tables.Rule(f"{ours}/bias", f"{theirs}.bias", f"O{width} -> O{width}")


def _conv(
  ours: str, theirs: str, into: int, out: int, size: int = 3
) -> collections.abc.Iterator[tables.Rule]:
  kernel = f"Y{size} X{size} I{into} O{out} -> O{out} I{into} Y{size} X{size}"
  yield tables.Rule(f"{ours}/kernel", f"{theirs}.weight", kernel)
  yield tables.Rule(f"{ours}/bias", f"{theirs}.bias", f"O{out} -> O{out}")


def _sizes(rules: list[tables.Rule]) -> dict[str, int]:
  """Returns the sizes of axes, which are in their names."""
  named = {axis for rule in rules for axis in re.findall(r"\w+", rule.pattern)}
  return {axis: int(axis[1:]) for axis in named}
