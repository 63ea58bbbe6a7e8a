"""The config.json of diffusers' networks, from our configs and to them."""

import dataclasses
from typing import Any

from flowjax import errors, models, schema
from flowjax.interop import autoencoder, dit, formats, mmdit

# The version whose classes have the fields below.
VERSION = "0.36.0"

# Which network of ours a class of diffusers is. The first name of a network is
# written; released weights of a DiT have the other.
CLASSES = {
  "DiTTransformer2DModel": "dit",
  "Transformer2DModel": "dit",
  "SD3Transformer2DModel": "mmdit",
  "FluxTransformer2DModel": "flux",
  **autoencoder.CLASSES,
}

# The fields of each class with its defaults.
_DIT = {
  "num_attention_heads": 16,
  "attention_head_dim": 72,
  "in_channels": 4,
  "out_channels": None,
  "num_layers": 28,
  "dropout": 0.0,
  "norm_num_groups": 32,
  "attention_bias": True,
  "sample_size": 32,
  "patch_size": 2,
  "activation_fn": "gelu-approximate",
  "num_embeds_ada_norm": 1000,
  "upcast_attention": False,
  "norm_type": "ada_norm_zero",
  "norm_elementwise_affine": False,
  "norm_eps": 1e-5,
}
_DIT_FIXED = (
  "attention_bias",
  "activation_fn",
  "norm_type",
  "norm_elementwise_affine",
)
_MMDIT = {
  "sample_size": 128,
  "patch_size": 2,
  "in_channels": 16,
  "num_layers": 18,
  "attention_head_dim": 64,
  "num_attention_heads": 18,
  "joint_attention_dim": 4096,
  "caption_projection_dim": 1152,
  "pooled_projection_dim": 2048,
  "out_channels": 16,
  "pos_embed_max_size": 96,
  "dual_attention_layers": (),
  "qk_norm": None,
}
_FLUX = {
  "patch_size": 1,
  "in_channels": 64,
  "out_channels": None,
  "num_layers": 19,
  "num_single_layers": 38,
  "attention_head_dim": 128,
  "num_attention_heads": 24,
  "joint_attention_dim": 4096,
  "pooled_projection_dim": 768,
  "guidance_embeds": False,
  "axes_dims_rope": (16, 56, 56),
}
_FIELDS: dict[str, dict[str, Any]] = {
  "dit": _DIT,
  "mmdit": _MMDIT,
  "flux": _FLUX,
  **autoencoder.FIELDS,
}
# Fields that may be null, of which the default does not tell the type.
_OPTIONAL = {
  ("dit", "out_channels"): int,
  ("mmdit", "out_channels"): int,
  ("flux", "out_channels"): int,
  ("mmdit", "qk_norm"): str,
  ("autoencoder", "shift_factor"): float,
  ("vq", "vq_embed_dim"): int,
}
# They change nothing of what a trained network says, or have one value here.
_UNREAD = {
  "dit": ("dropout", "norm_num_groups", "upcast_attention"),
  "autoencoder": ("latents_mean", "latents_std"),
  "vq": ("lookup_from_codebook",),
}
# Those of a list that do not hold whole numbers.
_WORDS = ("down_block_types", "up_block_types")


def write(config: Any) -> dict[str, Any]:
  """Returns the content of config.json for a network of ours."""
  config = formats.without_labels(config)
  _require_told_apart(config)
  own = {
    "dit": _write_dit,
    "mmdit": mmdit.diffusers_config,
    "flux": _write_flux,
    "autoencoder": autoencoder.diffusers_config,
    "vq": autoencoder.diffusers_config,
  }
  name = next(name for name, kind in CLASSES.items() if kind == config.name)
  return {
    "_class_name": name,
    "_diffusers_version": VERSION,
    **_FIELDS[config.name],
    **own[config.name](config),
  }


def read(content: dict[str, Any], like: Any = None) -> Any:
  """Returns our config of what a config.json describes.

  What diffusers does not say is as in `like`, by default as in the defaults of
  ours. Raises UserError for a class or a value that is not ours.
  """
  require_known(content)
  kind = CLASSES[content["_class_name"]]
  fields = _FIELDS[kind] | content
  _require_types(kind, fields)
  own = {"dit": _read_dit, "mmdit": _read_mmdit, "flux": _read_flux}
  if kind in autoencoder.FIELDS:
    _require(fields, autoencoder.fixed(fields))
    changes = autoencoder.our_config(kind, fields)
  else:
    changes = own[kind](fields, like)
  with errors.naming("config.json"):
    return dataclasses.replace(like or models.CONFIGS[kind](), **changes)


def require_known(content: dict[str, Any]) -> None:
  """Raises UserError for a class that is no network of ours."""
  name = content.get("_class_name")
  if not isinstance(name, str) or name not in CLASSES:
    raise errors.UserError(
      f"_class_name = {name!r} is no network of FlowJAX. "
      f"{schema.closest(str(name), CLASSES)}"
    )


def unknown(content: dict[str, Any]) -> list[str]:
  """Returns the fields that say something, and that the class does not have."""
  fields = _FIELDS[CLASSES[content["_class_name"]]]
  return [
    name
    for name, value in content.items()
    if name not in fields and not name.startswith("_") and value
  ]


def kind(content: dict[str, Any]) -> str | None:
  """Returns the name of our network that a config.json is of, if it is."""
  return CLASSES.get(str(content.get("_class_name")))


def _require_types(kind: str, fields: dict[str, Any]) -> None:
  """Refuses what no class of diffusers could be built with."""
  for name, default in _FIELDS[kind].items():
    wanted = _OPTIONAL.get((kind, name), type(default))
    value = fields[name]
    if name in _UNREAD.get(kind, ()):
      continue
    if (kind, name) in _OPTIONAL and value is None:
      continue
    item_kind = str if name in _WORDS else int
    # Of an autoencoder it may be height and width.
    sizes = name == "sample_size" and kind in autoencoder.FIELDS
    fits = type(value) is wanted
    if wanted is float:
      fits = type(value) in (int, float)
    elif wanted is tuple:
      fits = isinstance(value, (tuple, list))
      fits = fits and all(type(item) is item_kind for item in value)
    elif sizes and isinstance(value, list):
      fits = list(map(type, value)) == [int, int]
    if not fits:
      what = {tuple: "a list of whole numbers", int: "a whole number"}
      if sizes:
        what[int] = "a whole number, or two"
      if name in _WORDS:
        what[tuple] = "a list of names"
      raise errors.UserError(
        f"config.json: {name} = {value!r} must be "
        f"{what.get(wanted, f'of type {wanted.__name__}')}, such as "
        f"{list(default) if wanted is tuple else default!r}. The file is "
        "damaged or edited; copy it again."
      )


def _require(fields: dict[str, Any], wanted: dict[str, tuple]) -> None:
  """Refuses values with which the class is another network than ours."""
  for name, values in wanted.items():
    found = fields[name]
    found = tuple(found) if isinstance(found, list) else found
    if found not in values:
      raise errors.UserError(
        f"config.json: {name} = {found!r}, where ours has "
        f"{' or '.join(map(repr, values))}: this is another network."
      )


def _channels(fields: dict[str, Any]) -> dict[str, Any]:
  """Returns our channels: what goes in beyond what comes out is a context."""
  into, out = fields["in_channels"], fields["out_channels"]
  if out is None or into == out:
    return {"channels": into, "context_channels": 0, "out_channels": None}
  if into > out:
    context = into - out
    return {"channels": out, "context_channels": context, "out_channels": None}
  return {"channels": into, "context_channels": 0, "out_channels": out}


def _require_told_apart(config: Any) -> None:
  """Refuses a network whose channels a config.json does not tell apart."""
  more = getattr(config, "out_channels", None) not in (None, config.channels)
  if more and config.context_channels:
    raise errors.UserError(
      f"context_channels = {config.context_channels} and out_channels = "
      f"{config.out_channels}: diffusers says how many channels go in and come "
      "out, and with both not which of them are the image. Such a network can "
      "be exported with --format=torch."
    )


def _write_dit(config: Any) -> dict[str, Any]:
  return {
    "num_attention_heads": config.heads,
    "attention_head_dim": config.head_size,
    "in_channels": config.channels_in,
    "out_channels": config.channels_out,
    "num_layers": config.depth,
    "sample_size": config.image_size[0],
    "patch_size": config.patch_size,
    "num_embeds_ada_norm": config.num_classes,
    "norm_eps": config.mlp_norm_epsilon,
  }


def _read_dit(fields: dict[str, Any], like: Any) -> dict[str, Any]:
  _require(fields, {name: (_DIT[name],) for name in _DIT_FIXED})
  return {
    "image_size": (fields["sample_size"],) * 2,
    **_channels(fields),
    "patch_size": fields["patch_size"],
    "width": fields["num_attention_heads"] * fields["attention_head_dim"],
    "depth": fields["num_layers"],
    "heads": fields["num_attention_heads"],
    "num_classes": fields["num_embeds_ada_norm"],
    "mlp_norm_epsilon": fields["norm_eps"],
    **dit.HELD["diffusers"],
  }


def _read_mmdit(fields: dict[str, Any], like: Any) -> dict[str, Any]:
  width = fields["num_attention_heads"] * fields["attention_head_dim"]
  dual = tuple(range(len(fields["dual_attention_layers"])))
  _require(
    fields,
    {
      "caption_projection_dim": (width,),
      "dual_attention_layers": (dual,),
      "qk_norm": (None, "rms_norm"),
    },
  )
  # It takes images of any size; this is the one that it was made for.
  size = (fields["sample_size"],) * 2
  return {
    "image_size": like.image_size if like else size,
    **_channels(fields),
    "patch_size": fields["patch_size"],
    "depth": fields["num_layers"],
    "heads": fields["num_attention_heads"],
    "head_size": fields["attention_head_dim"],
    "text_width": fields["joint_attention_dim"],
    "pooled_width": fields["pooled_projection_dim"],
    "position": "sincos2d",
    "position_table": fields["pos_embed_max_size"],
    "qk_norm": fields["qk_norm"] is not None,
    "dual_layers": len(dual),
    "mlp_ratio": 4.0,
    "timestep_scale": 1000.0,
  }


def _write_flux(config: Any) -> dict[str, Any]:
  # Patches come to it already flattened.
  pixels = config.patch_size**2
  return {
    "in_channels": config.channels_in * pixels,
    "out_channels": config.channels * pixels
    if config.context_channels
    else None,
    "num_layers": config.double_depth,
    "num_single_layers": config.single_depth,
    "attention_head_dim": config.head_size,
    "num_attention_heads": config.heads,
    "joint_attention_dim": config.text_width,
    "pooled_projection_dim": config.pooled_width,
    "guidance_embeds": config.guidance_embed,
    "axes_dims_rope": list(config.rope_axes),
  }


def _read_flux(fields: dict[str, Any], like: Any) -> dict[str, Any]:
  _require(fields, {"patch_size": (1,)})
  patch, channels = (like or models.CONFIGS["flux"]()).patch_size, {}
  for name, values in _channels(fields).items():
    if values and values % patch**2:
      raise errors.UserError(
        f"config.json: in_channels = {fields['in_channels']} and out_channels "
        f"= {fields['out_channels']} are no numbers of channels times {patch}x"
        f"{patch}, the pixels of a patch. Say how its patches are packed by a "
        "--config with another config.model.patch_size."
      )
    channels[name] = values and values // patch**2
  if channels.pop("out_channels"):
    raise errors.UserError(
      f"config.json: out_channels = {fields['out_channels']} is more than "
      f"in_channels = {fields['in_channels']}: this is another network."
    )
  return {
    **channels,
    "width": fields["num_attention_heads"] * fields["attention_head_dim"],
    "heads": fields["num_attention_heads"],
    "double_depth": fields["num_layers"],
    "single_depth": fields["num_single_layers"],
    "text_width": fields["joint_attention_dim"],
    "pooled_width": fields["pooled_projection_dim"],
    "guidance_embed": fields["guidance_embeds"],
    "rope_axes": tuple(fields["axes_dims_rope"]),
    "rope_theta": 10000.0,
    "mlp_ratio": 4.0,
    "timestep_scale": 1000.0,
  }
