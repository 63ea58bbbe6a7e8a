"""An MM-DiT that reads captions, on scenes of real handwritten digits, 32x32.

  flowjax train --config=configs/scenes_mmdit.py --workdir=runs/scenes

The encoder of the captions is trained with the network. The argument "flux"
trains a FLUX in the same way: configs/scenes_mmdit.py:flux.
"""

from flowjax.data import scenes
from flowjax.train import experiment

TOKENS, WIDTH = 16, 128


def get_config(network: str = "mmdit"):
  """Returns the config of an "mmdit" or a "flux"."""
  if network not in ("mmdit", "flux"):
    raise ValueError(f"network {network!r} must be 'mmdit' or 'flux'.")
  config = experiment.defaults(network)
  config.steps = 4000
  config.model.update(
    image_size=(32, 32),
    channels=3,
    patch_size=4,
    text_width=WIDTH,
    pooled_width=WIDTH,
    text_tokens=TOKENS,
  )
  if network == "mmdit":
    config.model.update(depth=4, heads=4, head_size=32, position="rope2d")
  else:
    config.model.update(
      width=128,
      heads=4,
      double_depth=2,
      single_depth=4,
      rope_axes=(4, 14, 14),
      guidance_embed=False,
    )
  config.data.update(
    source="scenes",
    image_size=(32, 32),
    channels=3,
    batch_size=64,
    tokenizer="words",
    tokens=TOKENS,
    words=scenes.WORDS,
  )
  config.text.update(
    vocabulary=3 + len(scenes.WORDS), tokens=TOKENS, width=WIDTH, depth=2
  )
  config.optim.update(
    learning_rate=1e-3, schedule="cosine", warmup_steps=200, clip_norm=1.0
  )
  config.ema.decay = 0.998
  config.sample.steps = 25
  config.sample.guidance.scale = 3.0
  config.log.update(
    metrics_every=20, validation_every=1000, samples_every=2000, sample_count=50
  )
  config.checkpoint.every = 1000
  return config
