"""First states of tests in which all that a network has matters."""

import jax
import numpy as np


def first_state(run):
  """Returns a state before any step, drawn; zeros would hide what is behind."""
  rng = np.random.default_rng(0)

  def draw(path, leaf):
    one = path[-1].key == "scale"
    return one + 0.1 * rng.standard_normal(leaf.shape, np.float32)

  params = jax.tree_util.tree_map_with_path(draw, run.abstract.params)
  state = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), run.abstract)
  return state._replace(params=params, ema=params)
