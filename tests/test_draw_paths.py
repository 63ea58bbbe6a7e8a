"""The picture of paths in docs/flow.md can be drawn."""

import importlib.util
import pathlib

import numpy as np
import pytest

SCRIPT = pathlib.Path(__file__).parents[1] / "launch" / "draw_paths.py"


def load():
  spec = importlib.util.spec_from_file_location("draw_paths", SCRIPT)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


@pytest.mark.slow
def test_it_draws_what_goes_from_noise_to_the_clusters(tmp_path):
  Image = pytest.importorskip("PIL.Image")
  script = load()
  script.STEPS, script.BATCH, script.SOLVED = 200, 128, 64
  rng = script.jax.random.key(0)
  columns = []
  for panel in script.panels()[-2:]:
    before = script.conditional(panel, rng)
    assert script.nearest(before[-1])[1].max() < 6.0 * script.SPREAD
    after = script.trained(panel, rng)
    assert after.shape == before.shape and np.isfinite(after).all()
    # Half trained, yet nearer to the clusters than noise is.
    assert np.mean(script.nearest(after[-1])[1]) < 1.5
    columns.append((panel, before, after))
  script.draw(columns, tmp_path / "paths.png")
  pixels = np.asarray(Image.open(tmp_path / "paths.png").convert("RGB"))
  assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50
