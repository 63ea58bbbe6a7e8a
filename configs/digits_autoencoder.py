"""An autoencoder of latent diffusion on real handwritten digits, f = 2.

  flowjax train --config=configs/digits_autoencoder.py --workdir=runs/digits_ae

2 CPU cores, about 2 minutes. `samples/` shows digits that it never saw and
below them what it makes of their 4x4x2 latents. The argument says what
regularises these: kl (the default), vq, with a codebook, or vq_ema, with one
that is a moving average. `flowjax export --format=diffusers` writes a vae/
folder for diffusers.
"""

from flowjax.train import experiment


def get_config(kind: str = "kl"):
  """Returns the config of an autoencoder of a kind: kl, vq or vq_ema."""
  if kind not in ("kl", "vq", "vq_ema"):
    raise ValueError(f"kind {kind!r} must be kl, vq or vq_ema.")
  config = experiment.defaults("autoencoder" if kind == "kl" else "vq")
  config.steps = 1000
  config.model.update(
    image_size=(8, 8),
    channels=1,
    latent_channels=2,
    widths=(16, 32),
    depth=1,
    groups=8,
  )
  config.data.update(source="digits", batch_size=64)
  config.reconstruction.distance = "l2"
  if kind == "kl":
    config.reconstruction.divergence = 1e-3
  else:
    config.model.codes = 128
  if kind == "vq_ema":
    config.reconstruction.codebook_decay = 0.99
  config.optim.update(
    learning_rate=2e-3, schedule="cosine", warmup_steps=50, clip_norm=1.0
  )
  config.ema.decay = 0.99
  config.log.update(
    metrics_every=10, validation_every=100, samples_every=500, sample_count=30
  )
  config.checkpoint.every = 500
  return config
