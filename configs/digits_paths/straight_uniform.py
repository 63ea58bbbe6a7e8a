"""Digits by rectified flow with uniform times (arXiv:2209.03003).

  flowjax train --config=configs/digits_paths/straight_uniform.py \\
    --workdir=runs/straight_uniform

One of eight that train the network of configs/digits_dit.py and differ in their
mathematics alone; `flowjax compare --workdirs runs/*` draws them side by side.
2 CPU cores, about 2 minutes.
"""

import pathlib
import runpy

DIGITS = pathlib.Path(__file__).parents[1] / "digits_dit.py"


def get_config():
  """Returns the config."""
  config = runpy.run_path(str(DIGITS))["get_config"]()
  config.flow.law.name = "uniform"
  return config
