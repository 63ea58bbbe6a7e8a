"""LPIPS: by the published keys, and what torch makes of the same weights."""

import jax
import numpy as np
import pytest
from safetensors import numpy as safetensors

from flowjax import errors
from flowjax.models import perceptual
from flowjax.train import perceptual as published

torch = pytest.importorskip("torch")


@pytest.fixture(name="file", scope="module")
def _file(tmp_path_factory):
  """Random weights by their published keys: kernels [out, in, 3, 3]."""
  rng, tensors = np.random.default_rng(0), {}
  for name, key in published.keys().items():
    shape = perceptual.shapes()[name]
    if len(shape) == 4:
      shape = (shape[3], shape[2], 3, 3)
      draw = rng.standard_normal(shape, np.float32)
      tensors[key] = draw * np.float32(np.sqrt(2 / (9 * shape[1])))
    elif name.endswith("scale"):
      tensors[key] = rng.uniform(size=(1, *shape, 1, 1)).astype("f4")
    else:
      tensors[key] = 0.1 * rng.standard_normal(shape, np.float32)
  path = tmp_path_factory.mktemp("lpips") / "lpips.safetensors"
  safetensors.save_file(tensors, path)
  return path


def in_torch(tensors, x_BCHW, y_BCHW):
  """LPIPS with VGG-16, from its paper: features, unit length, heads."""
  shift = torch.tensor([-0.030, -0.088, -0.188])[None, :, None, None]
  scale = torch.tensor([0.458, 0.448, 0.450])[None, :, None, None]
  features = []
  for image in (x_BCHW, y_BCHW):
    h, found, number = (image - shift) / scale, [], 0
    for stage, convolutions in enumerate((2, 2, 3, 3, 3)):
      if stage:
        h = torch.nn.functional.max_pool2d(h, 2)
      for _ in range(convolutions):
        weight = tensors[f"features.{number}.weight"]
        bias = tensors[f"features.{number}.bias"]
        h = torch.relu(torch.nn.functional.conv2d(h, weight, bias, padding=1))
        number += 2
      number += 1
      found.append(h / (h.norm(dim=1, keepdim=True) + 1e-10))
    features.append(found)
  total = 0.0
  for k, (a, b) in enumerate(zip(*features, strict=True)):
    head = tensors[f"lin{k}.model.1.weight"]
    weighted = torch.nn.functional.conv2d((a - b) ** 2, head)
    total = total + weighted.mean(dim=(1, 2, 3))
  return total.numpy()


@pytest.mark.slow(2)
def test_the_distance_is_that_of_torch(file):
  params = published.read(str(file))
  rng = np.random.default_rng(1)
  x, y = rng.uniform(-1, 1, (2, 2, 16, 16, 3)).astype("f4")
  ours = jax.jit(perceptual.distance)(params, x, y)
  tensors = {
    key: torch.as_tensor(value)
    for key, value in safetensors.load_file(file).items()
  }
  theirs = in_torch(
    tensors, *(torch.as_tensor(i).permute(0, 3, 1, 2) for i in (x, y))
  )
  assert (theirs > 0.1).all()
  np.testing.assert_allclose(ours, theirs, rtol=1e-4)


def test_weights_that_are_not_there_or_are_others(tmp_path):
  with pytest.raises(errors.UserError, match="perceptual.file = None"):
    published.read(None)
  with pytest.raises(errors.UserError, match="no such file"):
    published.read(str(tmp_path / "lpips.safetensors"))
  other = tmp_path / "other.safetensors"
  wrong = {"features.0.weight": np.zeros((64, 3, 5, 5), np.float32)}
  safetensors.save_file(wrong, other)
  with pytest.raises(errors.CheckpointError) as found:
    published.read(str(other))
  assert "mis-shaped  features.0.weight [64, 3, 5, 5]" in str(found.value)
  assert "missing     lin4.model.1.weight" in str(found.value)
  (tmp_path / "text").write_text("no tensors")
  with pytest.raises(errors.CheckpointError, match="not a safetensors file"):
    published.read(str(tmp_path / "text"))
