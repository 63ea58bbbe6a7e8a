"""An unconditional DiT on real handwritten digits, 8x8: it is told nothing.

  flowjax train --config=configs/digits_unconditional.py \\
    --workdir=runs/unconditional

2 CPU cores; twice the steps of configs/digits_dit.py. The data is inside
scikit-learn, and its labels are left out. `flowjax evaluate` then finds samples
of all ten classes, at a Fréchet distance of 6.7 (real digits: 3.0).
"""

import pathlib
import runpy

DIGITS = pathlib.Path(__file__).parent / "digits_dit.py"


def get_config():
  """Returns the config."""
  config = runpy.run_path(str(DIGITS))["get_config"]()
  config.steps = 2000
  config.model.num_classes = 0
  config.data.images_alone = True
  config.sample.guidance.scale = 1.0
  return config
