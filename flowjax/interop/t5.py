"""Where the weights of T5's encoder live in transformers' files."""

from typing import Any

import numpy as np

from flowjax import errors
from flowjax.interop import tables
from flowjax.models import t5

# V tokens, B buckets, L layers, D width, K query, key and value, N heads,
# H head size, G gate and value of the MLP, F its hidden width.

CLASSES = ("T5EncoderModel",)
MODEL_TYPE = "t5"
# The same table of tokens under two names, of which files have one or both.
TOKENS, TIED = "shared.weight", "encoder.embed_tokens.weight"
# What is T5 v1.1, and what is of no account in an encoder.
_GATED = "gated-gelu"


def layout(config: t5.T5Config) -> tables.Table:
  """Returns the table to the state dict of `T5EncoderModel`."""
  attention = "encoder.block.{L}.layer.0"
  mlp = "encoder.block.{L}.layer.1"
  rules = (
    tables.Rule("token_embed/embedding", TOKENS, "V D -> V D"),
    tables.Rule(
      "position_bias/embedding",
      "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
      "B N -> B N",
    ),
    *tables.linear(
      "blocks/qkv",
      attention + ".SelfAttention.{K}",
      "D -> K N H",
      bias=False,
      names={"K": ("q", "k", "v")},
    ),
    *tables.linear(
      "blocks/out", f"{attention}.SelfAttention.o", "N H -> D", bias=False
    ),
    *tables.linear(
      "blocks/mlp_in", mlp + ".DenseReluDense.wi_{G}", "D -> G F", bias=False
    ),
    *tables.linear(
      "blocks/mlp_out", f"{mlp}.DenseReluDense.wo", "F -> D", bias=False
    ),
    _norm("blocks/attention_norm", f"{attention}.layer_norm", "L D -> L D"),
    _norm("blocks/mlp_norm", f"{mlp}.layer_norm", "L D -> L D"),
    _norm("final_norm", "encoder.final_layer_norm", "D -> D"),
  )
  sizes = {
    "V": config.vocabulary,
    "B": config.buckets,
    "L": config.depth,
    "D": config.width,
    "K": 3,
    "N": config.heads,
    "H": config.head_size,
    "G": 2,
    "F": config.mlp_width,
  }
  return tables.Table(rules, sizes)


def renamed(tensors: tables.Tensors) -> tables.Tensors:
  """Returns tensors with the table of tokens once, under its first name."""
  if TIED not in tensors:
    return tensors
  table = tensors[TIED]
  if not np.array_equal(tensors.get(TOKENS, table), table):
    raise errors.CheckpointError(
      f"{TOKENS} and {TIED} differ: an encoder of T5 has one table of tokens."
    )
  rest = {key: value for key, value in tensors.items() if key != TIED}
  return {TOKENS: table, **rest}


def read(content: dict[str, Any], tensors: tables.Tensors) -> t5.T5Config:
  """Returns our config of what a config.json describes.

  Raises UserError for a T5 that is not of version 1.1.
  """
  del tensors
  fields = write(t5.T5Config()) | {"feed_forward_proj": "relu"} | content
  if fields["feed_forward_proj"] != _GATED:
    raise errors.UserError(
      f"feed_forward_proj = {fields['feed_forward_proj']!r}: only T5 v1.1 is "
      f"read, which has {_GATED!r}, as the T5 of SD3 and FLUX is."
    )
  return t5.T5Config(
    vocabulary=fields["vocab_size"],
    width=fields["d_model"],
    mlp_width=fields["d_ff"],
    heads=fields["num_heads"],
    head_size=fields["d_kv"],
    depth=fields["num_layers"],
    buckets=fields["relative_attention_num_buckets"],
    max_distance=fields["relative_attention_max_distance"],
    epsilon=fields["layer_norm_epsilon"],
  )


def write(config: t5.T5Config) -> dict[str, Any]:
  """Returns the content of config.json."""
  return {
    "architectures": list(CLASSES),
    "model_type": MODEL_TYPE,
    "vocab_size": config.vocabulary,
    "d_model": config.width,
    "d_ff": config.mlp_width,
    "d_kv": config.head_size,
    "num_heads": config.heads,
    "num_layers": config.depth,
    "relative_attention_num_buckets": config.buckets,
    "relative_attention_max_distance": config.max_distance,
    "layer_norm_epsilon": config.epsilon,
    "feed_forward_proj": _GATED,
    "is_encoder_decoder": False,
    "tie_word_embeddings": False,
  }


def _norm(ours: str, theirs: str, pattern: str) -> tables.Rule:
  return tables.Rule(f"{ours}/scale", f"{theirs}.weight", pattern)
