"""Digits by iDDPM's cosine schedule (arXiv:2102.09672) and v.

  flowjax train --config=configs/digits_paths/cosine_v.py \\
    --workdir=runs/cosine_v

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
  config.flow.path.name = "cosine"
  config.flow.prediction = "v"
  config.flow.law.name = "uniform"
  config.sample.solver.name = "dpmpp_2m"
  return config
