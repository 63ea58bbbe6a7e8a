"""From digits to other digits: rectified flow between two sets of images.

  flowjax train --config=configs/digits_pairs.py --workdir=runs/pairs
  flowjax sample --workdir=runs/pairs --init-image=four.png

At t = 1 there is no noise but a digit from 0 to 4, and at t = 0 one from 5 to 9
(arXiv:2209.03003, section 5.2). No pairs are known: within a batch optimal
transport brings together what is alike, so that a digit changes no more than it
has to. 2 CPU cores will do. `flowjax evaluate` shows held-out digits
and what became of them, and says how many of these are of the other set.
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
    num_classes=0,
  )
  config.data.update(
    source="digits:5,6,7,8,9",
    pair_source="digits:0,1,2,3,4",
    images_alone=True,
    batch_size=128,
  )
  config.flow.coupling.update(name="pairs", then="optimal_transport")
  config.flow.law.name = "uniform"
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
