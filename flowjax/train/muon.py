"""Muon: updates of kernels in which all directions are as large.

The momentum M = U S V^T of a kernel is replaced by nearly U V^T, by five steps
of a polynomial (Newton-Schulz). So what is seldom or faintly asked for, as the
shape that a digit's name stands for, is learned as fast as what is plain.
"""

import math
import re
import typing
from typing import Any

import jax
import optax
from optax import contrib

Dims: typing.TypeAlias = contrib.MuonDimensionNumbers

# Kernels by name, and which of their dims, from the end, are inputs and
# outputs: a product of others is so many kernels. Embeddings, the first and the
# last map, biases and scales are AdamW's, as in the authors' own runs.
KERNELS = (
  (r"(?!lora/).*block.*/qkv/kernel", ((-4,), (-2, -1))),
  (r"(?!lora/).*block.*/attention/out/kernel", ((-3, -2), (-1,))),
  (r"(?!lora/).*block.*/modulation/kernel", ((-3,), (-1,))),
  (r"(?!lora/).*block.*/mlp/(in|out)/kernel", ((-2,), (-1,))),
)


def scale(beta: float, rms: float) -> optax.GradientTransformation:
  """Returns gradients as Muon moves kernels, with updates of this RMS.

  An m x n matrix of orthogonal rows or columns has the RMS 1 / sqrt(max(m, n))
  (arXiv:2502.16982, section 2.2), which is divided out.
  """

  def sized(updates, params=None):
    del params

    def change(path, update):
      dims = of(path, update)
      assert dims is not None
      sides = (dims.reduction_axis, dims.output_axis)
      most = max(math.prod(update.shape[i] for i in side) for side in sides)
      return rms * math.sqrt(most) * update

    return jax.tree_util.tree_map_with_path(change, updates)

  def dims(tree):
    return jax.tree_util.tree_map_with_path(of, tree)

  return optax.chain(
    contrib.scale_by_muon(beta=beta, weight_dimension_numbers=dims),
    optax.stateless(sized),
  )


def labels(params: Any) -> Any:
  """Returns "muon" for each kernel that is one of `KERNELS`, else "adam"."""
  return jax.tree_util.tree_map_with_path(
    lambda path, leaf: "adam" if of(path, leaf) is None else "muon", params
  )


def of(path: Any, leaf: Any) -> Dims | None:
  """Returns which dims of a kernel are inputs and outputs, None for others."""
  name, rank = jax.tree_util.keystr(path, simple=True, separator="/"), leaf.ndim
  for pattern, (inputs, outputs) in KERNELS:
    if re.fullmatch(pattern, name):
      if name.endswith("mlp/in/kernel") and leaf.shape[-2] == 2:
        inputs = (-3,)  # SwiGLU's two maps are one array.
      return Dims(
        tuple(rank + i for i in inputs), tuple(rank + i for i in outputs)
      )
  return None
