"""A class-conditional DiT with 2-D RoPE on real handwritten digits, 8x8.

  flowjax train --config=configs/digits_dit.py --workdir=runs/digits

2 CPU cores, a few minutes. The data is inside scikit-learn.
"""

from flowjax.train import experiment


def get_config():
  """Returns the config."""
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
  config.sample.update(solver="heun", steps=25, guidance=1.5)
  config.log.update(
    metrics_every=10, validation_every=100, samples_every=500, sample_count=50
  )
  config.checkpoint.every = 500
  return config
