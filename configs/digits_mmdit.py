"""SD3's MM-DiT on real handwritten digits, 8x8: a text is learned per label.

  flowjax train --config=configs/digits_mmdit.py --workdir=runs/digits_mmdit

2 CPU cores, 7 minutes beside other work. `flowjax evaluate` then finds at least
98% of guided samples recognised as their class (99.6% were, of unguided ones
97.8%), and unguided ones at a Fréchet distance of at most twice that of real
digits (3.61 beside 2.97).

The argument "sd3.5" adds QK-norm and dual attention, as SD3.5-medium has them,
and "sd3.5_large" QK-norm alone.
"""

from flowjax.train import experiment

VARIANTS = {
  "sd3": {},
  "sd3.5": {"qk_norm": True, "dual_layers": 2},
  "sd3.5_large": {"qk_norm": True},
}


def get_config(variant: str = "sd3"):
  """Returns the config of one of the `VARIANTS`."""
  if variant not in VARIANTS:
    raise ValueError(f"variant {variant!r} is none of {', '.join(VARIANTS)}.")
  config = experiment.defaults("mmdit")
  config.steps = 1000
  config.model.update(
    image_size=(8, 8),
    channels=1,
    patch_size=2,
    depth=4,
    heads=4,
    head_size=24,
    text_width=64,
    pooled_width=64,
    position_table=8,
    num_classes=10,
    label_tokens=4,
    **VARIANTS[variant],
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
  return config
