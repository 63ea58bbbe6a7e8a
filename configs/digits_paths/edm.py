"""Digits by EDM: exploding variance, preconditioned (arXiv:2206.00364).

  flowjax train --config=configs/digits_paths/edm.py \\
    --workdir=runs/edm

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
  config.flow.path.name = "edm"
  config.flow.prediction = "edm"
  config.flow.sigma_data = 0.85  # Of these images; EDM's own have 0.5.
  config.flow.law.name = "log_normal_sigma"
  config.sample.solver.name = "edm_heun"
  config.flow.path.sigma_min = 1e-3  # Below the last sigma of the grid.
  config.sample.grid.update(name="karras", sigma_min=2e-3)
  return config
