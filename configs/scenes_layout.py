"""An MM-DiT that is told boxes, on scenes of real handwritten digits, 32x32.

  flowjax train --config=configs/scenes_layout.py --workdir=runs/layout

A layout says which digit, in which colour, is in which box; boxes are tokens,
and their encoder is trained with the network. As in configs/scenes_mmdit.py the
network says what the image is, and Muon moves the kernels of its blocks.

2 CPU cores. `flowjax evaluate` then sees in 99% of the boxes of held-out
layouts the digit and the colour that was asked for, at an intersection over
union of 0.97, and in 0.1% of those of other layouts.
"""

import pathlib
import runpy

from flowjax.data import scenes

SCENES = pathlib.Path(__file__).parent / "scenes_mmdit.py"
BOXES, WIDTH = 3, 128


def get_config():
  """Returns the config."""
  config = runpy.run_path(str(SCENES))["get_config"]()
  config.steps = 1500
  config.task.name = "layout"
  # Boxes in place of captions.
  config.model.text_tokens = BOXES + 1
  config.data.update(
    tokenizer=None, tokens=32, words=(), boxes=BOXES, box_names=scenes.NAMES
  )
  config.text.update(vocabulary=0, tokens=32)
  config.layout.update(
    classes=len(scenes.NAMES), boxes=BOXES, width=WIDTH, depth=2
  )
  config.log.update(validation_every=500, samples_every=500, sample_count=32)
  return config
