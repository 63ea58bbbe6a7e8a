"""Networks small enough to compare in every option, with weights that act."""

import jax
import numpy as np
import pytest

from flowjax import models
from flowjax.models import dit


@pytest.fixture(scope="session")
def tiny():
  """Returns a function that builds a tiny DiT's config."""

  def config(**changes):
    defaults = dict(
      image_size=(4, 4),
      channels=2,
      width=16,
      depth=2,
      heads=2,
      num_classes=3,
    )
    return dit.DiTConfig(**{**defaults, **changes})

  return config


@pytest.fixture(scope="session")
def draw():
  """Returns a function that draws parameters, none of them zero.

  A fresh network would not do: its gates are closed.
  """

  def params(config, seed=0):
    rng = np.random.default_rng(seed)
    abstract = jax.eval_shape(models.build(config).init, jax.random.key(0))
    return jax.tree.map(
      lambda leaf: 0.1 * rng.standard_normal(leaf.shape, np.float32), abstract
    )

  return params
