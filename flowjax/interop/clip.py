"""Where the weights of CLIP's text encoders live in transformers' files."""

from typing import Any

from flowjax import errors
from flowjax.interop import tables
from flowjax.models import clip

# V tokens, S positions, L layers, D width, K query, key and value, N heads,
# H head size, F hidden width of the MLP, P width of the projection.

CLASSES = ("CLIPTextModel", "CLIPTextModelWithProjection")
MODEL_TYPE = "clip_text_model"
# What transformers of version 5 leaves away from CLIPTextModel; all others, and
# all that was published, have it.
PREFIX = "text_model."
# 0, 1, 2, ..., which older files hold beside the weights.
UNREAD = "embeddings.position_ids"


def layout(config: clip.ClipConfig) -> tables.Table:
  """Returns the table to the state dict of the class of `CLASSES`."""
  embeddings = f"{PREFIX}embeddings"
  rules = [
    tables.Rule(
      "token_embed/embedding",
      f"{embeddings}.token_embedding.weight",
      "V D -> V D",
    ),
    tables.Rule(
      "pos_embed/embedding",
      f"{embeddings}.position_embedding.weight",
      "S D -> S D",
    ),
    *blocks(PREFIX),
    *norm("final_norm", f"{PREFIX}final_layer_norm", "D -> D"),
  ]
  if config.projection is not None:
    rules += tables.linear(
      "projection", "text_projection", "D -> P", bias=False
    )
  of_text = {
    "V": config.vocabulary,
    "S": config.positions,
    "P": config.pooled_width,
  }
  return tables.Table(tuple(rules), of_text | sizes(config))


def blocks(prefix: str) -> tuple[tables.Rule, ...]:
  """Returns the rules of the blocks that CLIP's encoders have alike."""
  layer = prefix + "encoder.layers.{L}"
  return (
    *tables.linear(
      "blocks/qkv",
      layer + ".self_attn.{K}_proj",
      "D -> K N H",
      names={"K": ("q", "k", "v")},
    ),
    *tables.linear("blocks/out", f"{layer}.self_attn.out_proj", "N H -> D"),
    *tables.linear("blocks/mlp_in", f"{layer}.mlp.fc1", "D -> F"),
    *tables.linear("blocks/mlp_out", f"{layer}.mlp.fc2", "F -> D"),
    *norm("blocks/attention_norm", f"{layer}.layer_norm1", "L D -> L D"),
    *norm("blocks/mlp_norm", f"{layer}.layer_norm2", "L D -> L D"),
  )


def sizes(config: Any) -> dict[str, int]:
  """Returns the sizes of which the rules of `blocks` speak."""
  return {
    "L": config.depth,
    "D": config.width,
    "K": 3,
    "N": config.heads,
    "H": config.width // config.heads,
    "F": config.mlp_width,
  }


def renamed(tensors: tables.Tensors) -> tables.Tensors:
  """Returns tensors by the keys of the table, whoever wrote them."""
  if any(key.startswith(PREFIX) for key in tensors):
    return tensors
  return {PREFIX + key: value for key, value in tensors.items()}


def read(content: dict[str, Any], tensors: tables.Tensors) -> clip.ClipConfig:
  """Returns our config of what a config.json describes.

  Whether there is a projection is as the tensors have it.
  """
  fields = write(clip.ClipConfig()) | content
  end = fields["eos_token_id"]
  if type(end) is not int:
    raise errors.UserError(f"eos_token_id = {end!r} must be a whole number.")
  projection = None
  if "text_projection.weight" in tensors:
    projection = fields["projection_dim"]
  return clip.ClipConfig(
    vocabulary=fields["vocab_size"],
    positions=fields["max_position_embeddings"],
    width=fields["hidden_size"],
    depth=fields["num_hidden_layers"],
    heads=fields["num_attention_heads"],
    mlp_width=fields["intermediate_size"],
    activation=fields["hidden_act"],
    projection=projection,
    end=end,
    epsilon=fields["layer_norm_eps"],
  )


def write(config: clip.ClipConfig) -> dict[str, Any]:
  """Returns the content of config.json."""
  kind = CLASSES[config.projection is not None]
  return {
    "architectures": [kind],
    "model_type": MODEL_TYPE,
    "vocab_size": config.vocabulary,
    "max_position_embeddings": config.positions,
    "hidden_size": config.width,
    "num_hidden_layers": config.depth,
    "num_attention_heads": config.heads,
    "intermediate_size": config.mlp_width,
    "hidden_act": config.activation,
    "projection_dim": config.pooled_width,
    "eos_token_id": config.end,
    "layer_norm_eps": config.epsilon,
  }


def norm(ours: str, theirs: str, pattern: str) -> tuple[tables.Rule, ...]:
  """Returns the rules of a norm with a scale and a bias."""
  return (
    tables.Rule(f"{ours}/scale", f"{theirs}.weight", pattern),
    tables.Rule(f"{ours}/bias", f"{theirs}.bias", pattern),
  )
