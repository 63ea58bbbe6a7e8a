"""From digits to other digits: rectified flow between two sets of images.

  flowjax train --config=configs/digits_pairs.py --workdir=runs/pairs
  flowjax sample --workdir=runs/pairs --init-image=four.png

At t = 1 there is no noise but a digit from 0 to 4, and at t = 0 one from 5 to 9
(arXiv:2209.03003, section 5.2). No pairs are known: within a batch optimal
transport brings together what is alike, so that a digit changes no more than it
has to. 2 CPU cores will do. `flowjax evaluate` shows held-out digits
and what became of them, and says how many of these are of the other set.
"""

import pathlib
import runpy

DIGITS = pathlib.Path(__file__).parent / "digits_dit.py"


def get_config():
  """Returns the config."""
  config = runpy.run_path(str(DIGITS))["get_config"]()
  config.model.num_classes = 0
  config.data.update(
    source="digits:5,6,7,8,9",
    pair_source="digits:0,1,2,3,4",
    images_alone=True,
  )
  config.flow.coupling.update(name="pairs", then="optimal_transport")
  config.flow.law.name = "uniform"
  config.sample.guidance.scale = 1.0
  return config
