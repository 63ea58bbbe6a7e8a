"""An MM-DiT that reads captions, on scenes of real handwritten digits, 32x32.

  flowjax train --config=configs/scenes_mmdit.py --workdir=runs/scenes

The encoder of the captions is trained with the network. The network says what
the image is, not its velocity: patches of 8x8 have more numbers than a token
has, and of noise, unlike of digits, none can be spared.

The argument "flux" trains a FLUX in the same way: configs/scenes_mmdit.py:flux.
"""

from flowjax.data import scenes
from flowjax.train import experiment

TOKENS, WIDTH = 16, 128


def get_config(network: str = "mmdit"):
  """Returns the config of an "mmdit" or a "flux"."""
  if network not in ("mmdit", "flux"):
    raise ValueError(f"network {network!r} must be 'mmdit' or 'flux'.")
  config = experiment.defaults(network)
  config.steps = 2800
  config.model.update(
    image_size=(32, 32),
    channels=3,
    patch_size=8,
    text_width=WIDTH,
    pooled_width=WIDTH,
    text_tokens=TOKENS,
    rope_theta=100.0,  # For a grid of 4x4.
  )
  if network == "mmdit":
    config.model.update(
      depth=4, heads=4, head_size=32, qk_norm=True, position="rope2d"
    )
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
  # What a caption says is decided near noise, so there the times are.
  config.flow.prediction = "data"
  config.flow.path.low = 1e-3
  config.flow.law.shift = 3.0
  # By Adam's measure colours and places drown what a digit's name asks for.
  config.optim.update(
    name="muon",
    learning_rate=3e-3,
    muon_rms=0.6,
    beta2=0.95,
    schedule="cosine",
    warmup_steps=100,
    clip_norm=1.0,
  )
  config.ema.decay = 0.995
  config.sample.solver.name = "dpmpp_2m"
  config.sample.grid.shift = 3.0
  config.sample.steps = 25
  config.sample.guidance.scale = 2.0
  config.log.update(
    metrics_every=20, validation_every=1000, samples_every=1000, sample_count=48
  )
  config.checkpoint.every = 500
  return config
