"""An unconditional DiT on real handwritten digits, 8x8: it is told nothing.

  flowjax train --config=configs/digits_unconditional.py \\
    --workdir=runs/unconditional

2 CPU cores; twice the steps of configs/digits_dit.py. The data is inside
scikit-learn, and its labels are left out. `flowjax evaluate` then finds samples
of all ten classes, at a Fréchet distance of 6.7 (real digits: 3.0).
"""

from flowjax.train import experiment


def get_config():
  """Returns the config."""
  config = experiment.defaults("dit")
  config.steps = 2000
  config.model.update(
    image_size=(8, 8),
    channels=1,
    patch_size=2,
    width=128,
    depth=4,
    heads=4,
    num_classes=0,
  )
  config.data.update(source="digits", images_alone=True, batch_size=128)
  config.optim.update(
    learning_rate=2e-3, schedule="cosine", warmup_steps=100, clip_norm=1.0
  )
  config.ema.decay = 0.995
  config.sample.steps = 25
  config.log.update(
    metrics_every=10, validation_every=100, samples_every=500, sample_count=50
  )
  config.checkpoint.every = 500
  return config
