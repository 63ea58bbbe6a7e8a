"""Digits by rectified flow with logit-normal times (arXiv:2403.03206).

  flowjax train --config=configs/digits_paths/straight_logit_normal.py \\
    --workdir=runs/straight_logit_normal

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
  return config
