"""Compares an export for diffusers, as diffusers runs it, with ours."""

# Shape suffixes: B batch, H height, W width, C channels of the image, T its
# tokens, L text tokens, P one flattened patch.

import dataclasses
import importlib
import json
import logging
import pathlib
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flowjax import errors, models
from flowjax.interop import (
  diffusers_configs,
  formats,
  safetensors,
  torch_export,
)
from flowjax.models import vq

TIMES = np.array([0.0, 0.3, 1.0], np.float32)


def require(name: str) -> Any:
  """Returns a class of diffusers, or says what is missing."""
  torch_export.require_torch()
  _hide_unfit_torchvision()
  try:
    return getattr(importlib.import_module("diffusers"), name)
  except (ImportError, RuntimeError) as error:
    # It imports when asked, and wraps what went wrong.
    first: BaseException = error
    while first.__cause__ is not None:
      first = first.__cause__
    reason = str(first).strip().splitlines()[-1]
    raise errors.UserError(
      f"Comparing with diffusers needs its {name}, which cannot be imported "
      f"here: {reason}. pip install 'diffusers>={diffusers_configs.VERSION}'."
    ) from error


def _hide_unfit_torchvision() -> None:
  """Hides a torchvision that was built for another torch, and says so.

  No transformer needs it; what looks whether it is there would fail by it.
  """
  try:
    importlib.import_module("torchvision")
  except ImportError:
    return  # There is none.
  except (RuntimeError, OSError, AttributeError) as error:
    logging.warning(
      "torchvision does not fit this torch, and is passed over: %s.", error
    )
    sys.modules["torchvision"] = None  # type: ignore[assignment]


def load(directory: str | pathlib.Path) -> Any:
  """Returns the model of an export, as `from_pretrained` loads it."""
  torch, directory = torch_export.require_torch(), pathlib.Path(directory)
  content = json.loads((directory / "config.json").read_text())
  model, info = require(content["_class_name"]).from_pretrained(
    directory, torch_dtype=torch.float32, output_loading_info=True
  )
  faults = {name: keys for name, keys in info.items() if keys}
  if faults:
    raise errors.CheckpointError(f"{directory}, loaded by diffusers: {faults}")
  return model.eval()


def verify(
  directory: str | pathlib.Path,
  network: models.Network,
  params: dict,
  *,
  dtype: str = "float32",
  seed: int = 0,
) -> float:
  """Returns the largest difference between the outputs of diffusers and ours.

  `params` are as the export rounded them to `dtype`. Noise goes through both,
  in float32, at both ends of time and in between, with conditions and without.
  """
  torch, theirs = torch_export.require_torch(), load(directory)
  config = dataclasses.replace(
    network.config, dtype="float32", attention="auto"
  )
  network = models.build(config)
  if network.encode is not None:
    return _verify_autoencoder(theirs, network, params, seed)
  if dtype != "float32":
    _put_constants(theirs, config)
  rng = np.random.default_rng(seed)
  shape = (len(TIMES), *config.image_size, config.channels)
  x_BHWC = rng.standard_normal(shape, np.float32)

  apply = jax.jit(network.apply)
  params = jax.tree.map(np.asarray, params)
  difference = 0.0
  for each in torch_export.conditions(network, rng, len(TIMES)):
    if "text_mask" in each and config.name == "mmdit":
      continue  # SD3 has no masks there.
    # Accelerators round the inputs of float32 products unless told not to.
    with jax.default_matmul_precision("highest"):
      ours_BHWC = np.asarray(apply(params, x_BHWC, TIMES, each))
    told = _texts(config, pathlib.Path(directory), each)
    with torch.no_grad():
      out_BHWC = run(theirs, config, x_BHWC, TIMES, told).numpy()
    difference = max(difference, float(np.abs(out_BHWC - ours_BHWC).max()))
  return difference


def _verify_autoencoder(theirs, network, params: dict, seed: int) -> float:
  """Returns the difference of latents, and of what is decoded from them."""
  torch, config = torch_export.require_torch(), network.config
  rng = np.random.default_rng(seed)
  shape = (2, *config.image_size, config.channels)
  x_BHWC = rng.uniform(-1.0, 1.0, shape).astype(np.float32)

  def there(x_BHWC):
    return torch.as_tensor(np.array(x_BHWC)).permute(0, 3, 1, 2)

  with torch.no_grad(), jax.default_matmul_precision("highest"):
    found = theirs.encode(there(x_BHWC))
    if config.name == "vq":
      ours = vq.latents(config, params, jnp.asarray(x_BHWC))
      pairs = [(ours, found.latents)]
    else:
      mean, log_variance = network.encode(params, x_BHWC)
      ours, latent = mean, found.latent_dist
      pairs = [(mean, latent.mean), (log_variance, latent.logvar)]
    pairs += [(network.decode(params, ours), theirs.decode(there(ours)).sample)]
  return max(
    float(np.abs(np.asarray(a) - b.permute(0, 2, 3, 1).numpy()).max())
    for a, b in pairs
  )


def _put_constants(theirs: Any, config: Any) -> None:
  """Gives them what is no parameter, a table of positions, unrounded."""
  torch = torch_export.require_torch()
  layout = formats.layout(config, "diffusers")
  for key, constant in layout.constants.items():
    theirs.get_buffer(key).copy_(torch.as_tensor(np.asarray(constant)))


def run(theirs: Any, config: Any, x_BHWC: Any, t_B: Any, cond: dict) -> Any:
  """Returns what their model makes of our inputs, [B, H, W, C] in torch.

  `cond` has label or text and pooled; x and t may be of numpy or torch.
  """
  torch = torch_export.require_torch()
  x_BHWC, t_B = torch.as_tensor(x_BHWC), torch.as_tensor(t_B)
  cond = {key: torch.as_tensor(np.array(cond[key])) for key in cond}
  if "context" in cond:
    x_BHWC = torch.cat([x_BHWC, cond.pop("context")], dim=-1)
  call = {"dit": _run_dit, "mmdit": _run_mmdit, "flux": _run_flux}
  return call[config.name](theirs, config, x_BHWC, t_B, cond)


def _texts(
  config: Any, directory: pathlib.Path, cond: dict
) -> dict[str, np.ndarray]:
  """Looks up the texts that a network has learned for its labels."""
  if formats.without_labels(config) is config:
    return cond
  learned, label_B = (
    safetensors.read(directory / formats.LABELS_FILE),
    cond["label"],
  )
  others = {key: cond[key] for key in cond if key != "label"}
  texts = {key: learned[key].astype(np.float32)[label_B] for key in learned}
  return {**others, **texts}


def _run_dit(theirs, config, x_BHWC, t_B, cond):
  # Without labels the table has one row, which stands for none.
  label_B = cond.get("label", torch_export.require_torch().zeros(len(t_B)))
  out_BCHW = theirs(
    x_BHWC.permute(0, 3, 1, 2),
    timestep=config.timestep_scale * t_B,
    class_labels=label_B.long(),
  ).sample
  return out_BCHW.permute(0, 2, 3, 1)


def _run_mmdit(theirs, config, x_BHWC, t_B, cond):
  out_BCHW = theirs(
    x_BHWC.permute(0, 3, 1, 2),
    encoder_hidden_states=cond["text"],
    pooled_projections=cond["pooled"],
    timestep=config.timestep_scale * t_B,
  ).sample
  return out_BCHW.permute(0, 2, 3, 1)


def _run_flux(theirs, config, x_BHWC, t_B, cond):
  torch, patch = torch_export.require_torch(), config.patch_size
  batch, height, width, channels = x_BHWC.shape
  rows, columns = height // patch, width // patch
  # A patch is (channel, row, column) there.
  x = x_BHWC.reshape(batch, rows, patch, columns, patch, channels)
  x_BTP = x.permute(0, 1, 3, 5, 2, 4).reshape(batch, rows * columns, -1)
  place = torch.zeros(rows, columns, 3)
  place[..., 1] = torch.arange(rows)[:, None]
  place[..., 2] = torch.arange(columns)
  guidance_B = None
  if config.guidance_embed:
    guidance_B = cond.get(
      "guidance", torch.full_like(t_B, config.train_guidance)
    )
  options = {}
  if "text_mask" in cond:
    seen_BT = torch.ones(x_BTP.shape[:2], dtype=torch.bool)
    mask_BS = torch.cat([cond["text_mask"], seen_BT], dim=1)
    options["attention_mask"] = mask_BS[:, None, None]
  # It multiplies time and guidance by 1000 itself.
  out_BTP = theirs(
    x_BTP,
    encoder_hidden_states=cond["text"],
    pooled_projections=cond["pooled"],
    timestep=t_B,
    img_ids=place.flatten(0, 1),
    txt_ids=torch.zeros(cond["text"].shape[1], 3),
    guidance=guidance_B,
    joint_attention_kwargs=options,
  ).sample
  out = out_BTP.reshape(batch, rows, columns, -1, patch, patch)
  return out.permute(0, 1, 4, 2, 5, 3).reshape(batch, height, width, -1)
