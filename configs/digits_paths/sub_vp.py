"""Digits by the sub-VP SDE and noise (arXiv:2011.13456).

  flowjax train --config=configs/digits_paths/sub_vp.py \\
    --workdir=runs/sub_vp

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
  config.flow.path.name = "sub_vp"
  config.flow.prediction = "noise"
  config.flow.law.name = "uniform"
  return config
