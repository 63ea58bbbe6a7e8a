"""Where the weights of CLIP's image encoder live in transformers' files."""

from typing import Any

from flowjax.interop import clip, tables
from flowjax.models import clip_vision

# L layers, D width, T places, Y, Z, C rows, columns and colours of a patch, P
# width of the embedding; others as in interop/clip.py.

CLASSES = ("CLIPVisionModelWithProjection",)
MODEL_TYPE = "clip_vision_model"
PREFIX = "vision_model."


def layout(config: clip_vision.ClipVisionConfig) -> tables.Table:
  """Returns the table to the state dict of the class of `CLASSES`."""
  embeddings = f"{PREFIX}embeddings"
  rules = [
    tables.Rule(
      "patch_embed/kernel",
      f"{embeddings}.patch_embedding.weight",
      "(Y Z C) D -> D C Y Z",
    ),
    tables.Rule("class_embed", f"{embeddings}.class_embedding", "D -> D"),
    tables.Rule(
      "pos_embed/embedding",
      f"{embeddings}.position_embedding.weight",
      "T D -> T D",
    ),
    *clip.blocks(PREFIX),
    # Misspelt in all that was published.
    *clip.norm("first_norm", f"{PREFIX}pre_layrnorm", "D -> D"),
    *clip.norm("final_norm", f"{PREFIX}post_layernorm", "D -> D"),
    *tables.linear("projection", "visual_projection", "D -> P", bias=False),
  ]
  sizes = {
    "T": config.patches + 1,
    "Y": config.patch_size,
    "Z": config.patch_size,
    "C": 3,
    "P": config.projection,
    **clip.sizes(config),
  }
  return tables.Table(tuple(rules), sizes)


def renamed(tensors: tables.Tensors) -> tables.Tensors:
  """Returns tensors by the keys of the table; theirs are these."""
  return tensors


def read(
  content: dict[str, Any], tensors: tables.Tensors
) -> clip_vision.ClipVisionConfig:
  """Returns our config of what a config.json describes."""
  del tensors
  fields = write(clip_vision.ClipVisionConfig()) | content
  return clip_vision.ClipVisionConfig(
    image_size=fields["image_size"],
    patch_size=fields["patch_size"],
    width=fields["hidden_size"],
    depth=fields["num_hidden_layers"],
    heads=fields["num_attention_heads"],
    mlp_width=fields["intermediate_size"],
    activation=fields["hidden_act"],
    projection=fields["projection_dim"],
    epsilon=fields["layer_norm_eps"],
  )


def write(config: clip_vision.ClipVisionConfig) -> dict[str, Any]:
  """Returns the content of config.json."""
  return {
    "architectures": list(CLASSES),
    "model_type": MODEL_TYPE,
    "num_channels": 3,
    "image_size": config.image_size,
    "patch_size": config.patch_size,
    "hidden_size": config.width,
    "num_hidden_layers": config.depth,
    "num_attention_heads": config.heads,
    "intermediate_size": config.mlp_width,
    "hidden_act": config.activation,
    "projection_dim": config.projection,
    "layer_norm_eps": config.epsilon,
  }
