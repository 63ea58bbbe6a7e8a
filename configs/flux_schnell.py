"""FLUX.1 schnell: 11.9 billion parameters, sampled in 1 to 4 steps.

  flowjax train --config=configs/flux_schnell.py --workdir=runs/flux \\
    --config.data.source=embedded:/data/latents --config.mesh.fsdp=8

As configs/flux_dev.py, without an embedding of the guidance scale and with
texts of 256 tokens.
"""

import pathlib
import runpy

DEV = pathlib.Path(__file__).with_name("flux_dev.py")


def get_config():
  """Returns the config."""
  config = runpy.run_path(str(DEV))["get_config"]("schnell")
  config.sample.grid.update(name="uniform", source=None, shift_by=None)
  config.sample.steps = 4
  return config
