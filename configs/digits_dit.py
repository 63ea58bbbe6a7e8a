"""A class-conditional DiT with 2-D RoPE on real handwritten digits, 8x8.

  flowjax train --config=configs/digits_dit.py --workdir=runs/digits

2 CPU cores, about 2 minutes. The data is inside scikit-learn. `flowjax
evaluate` then finds at least 98% of guided samples recognised as their class,
and unguided ones at a Fréchet distance of at most twice that of real digits.

An argument names a preset of flowjax/train/presets.py, to train the same
network by the mathematics of another paper: configs/digits_dit.py:edm.
"""

from flowjax.train import experiment, presets


def get_config(preset: str | None = None):
  """Returns the config, by the mathematics of `preset` if it is given."""
  config = experiment.defaults("dit")
  config.steps = 1000
  config.model.update(
    image_size=(8, 8),
    channels=1,
    patch_size=2,
    width=128,
    depth=4,
    heads=4,
    num_classes=10,
  )
  config.data.update(source="digits", batch_size=128)
  config.optim.update(
    learning_rate=2e-3, schedule="cosine", warmup_steps=100, clip_norm=1.0
  )
  config.ema.decay = 0.995
  config.sample.steps = 25
  config.sample.guidance.scale = 1.5
  config.log.update(
    metrics_every=10, validation_every=100, samples_every=500, sample_count=50
  )
  config.checkpoint.every = 500
  if preset is not None:
    presets.apply(config, preset)
  return config
