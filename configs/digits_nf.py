"""A RealNVP of coupling layers on handwritten digits, by maximum likelihood.

  flowjax train --config=configs/digits_nf.py --workdir=runs/digits_nf

2 CPU cores, under a minute. The argument is the kind of layer: affine (RealNVP,
arXiv:1605.08803) or additive (NICE, arXiv:1410.8516). The validation loss is in
bits per dimension. It learns the training images by heart if it may: 400 steps.
"""

from flowjax.train import experiment


def get_config(kind: str = "affine"):
  """Returns the config of a flow of `kind` layers."""
  config = experiment.defaults("coupling")
  config.steps = 400
  config.model.update(image_size=(8, 8), channels=1, num_classes=10, kind=kind)
  config.flow.objective = "maximum_likelihood"
  config.flow.levels = 17  # Grey levels of a pixel.
  config.data.update(source="digits", batch_size=128)
  config.optim.update(
    learning_rate=2e-3, schedule="cosine", warmup_steps=50, clip_norm=1.0
  )
  config.ema.decay = 0.99
  config.log.update(
    metrics_every=10, validation_every=50, samples_every=400, sample_count=50
  )
  config.checkpoint.every = 200
  return config
