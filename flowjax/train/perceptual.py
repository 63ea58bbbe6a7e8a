"""The weights of LPIPS from a file: VGG-16 and the heads, in safetensors.

By the keys under which both were published: `features.N.weight` of VGG-16, as
torchvision has it, and `linK.model.1.weight` of LPIPS.
"""

import pathlib
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors import numpy as safetensors

from flowjax import errors
from flowjax.models import perceptual
from flowjax.train import manifest

KEY = "config.reconstruction.perceptual.file"


def require(file: str | None) -> pathlib.Path:
  """Returns the path of the weights; raises UserError if they are not there."""
  if file is None or not pathlib.Path(file).is_file():
    raise errors.UserError(
      f"{KEY} = {file!r}: no such file. A perceptual loss needs the weights of "
      "VGG-16 and of LPIPS's heads in one safetensors file (docs/"
      "autoencoders.md says how to make it). Name it, or set "
      "config.reconstruction.perceptual.weight=0.0."
    )
  return pathlib.Path(file)


def keys() -> dict[str, str]:
  """Returns the key in the file of each parameter, by its name here."""
  found, number = {}, 0
  for i, stage in enumerate(perceptual.STAGES):
    for j in range(len(stage)):
      found[f"stage_{i}/conv_{j}/kernel"] = f"features.{number}.weight"
      found[f"stage_{i}/conv_{j}/bias"] = f"features.{number}.bias"
      number += 2  # A convolution and its rectifier.
    number += 1  # A pooling.
    found[f"stage_{i}/head/scale"] = f"lin{i}.model.1.weight"
  return found


def read(file: str | None) -> dict[str, Any]:
  """Returns the parameters of `models.perceptual`, arrays of numpy.

  Raises CheckpointError that lists what is missing or has another shape.
  """
  path = require(file)
  try:
    tensors = safetensors.load_file(path)
  except (SafetensorError, OSError, KeyError) as error:
    raise errors.CheckpointError(
      f"{path} is not a safetensors file of weights: {error}."
    ) from error
  found, faults = {}, []
  shapes = perceptual.shapes()
  for name, key in keys().items():
    tensor = tensors.get(key)
    if tensor is None:
      faults.append(f"  missing     {key}")
      continue
    ours = _turned(tensor)
    if ours.shape != shapes[name]:
      faults.append(f"  mis-shaped  {key} {list(tensor.shape)}")
    found[name] = np.ascontiguousarray(ours, np.float32)
  if faults:
    raise errors.CheckpointError(
      f"{path} does not hold VGG-16 and the heads of LPIPS:\n"
      + "\n".join(faults)
    )
  return manifest.nested(found)


def _turned(tensor: np.ndarray) -> np.ndarray:
  """Returns a kernel [out, in, 3, 3] as [3, 3, in, out], a head as [in]."""
  if tensor.ndim != 4:
    return tensor
  if tensor.shape[0] == 1:
    return tensor.reshape(-1)
  return tensor.transpose(2, 3, 1, 0)
