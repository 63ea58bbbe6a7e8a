"""FLUX.1 dev: 11.9 billion parameters, told a guidance scale.

  flowjax train --config=configs/flux_dev.py --workdir=runs/flux \\
    --config.data.source=embedded:/data/latents --config.mesh.fsdp=8

The source is a folder of `.npz` files: latents of 1024x1024 images, scaled and
shifted as the VAE's config says (`image` [H, W, C]), with T5's embedded text
(`text` [L, E]) and CLIP's pooled one (`pooled` [P]); where some tokens are
padding also `text_mask` [L].

Made for 8 GPUs or TPU chips of 80 GB or more; the settings are a fine-tuner's,
not those of the original training, and not measured by us.
"""

from flowjax.models import flux
from flowjax.train import experiment, presets


def get_config(variant: str = "dev"):
  """Returns the config of the size "dev", or of "schnell"."""
  config = experiment.defaults("flux")
  config.steps = 100_000
  config.model.update(
    dtype="bfloat16", remat="save_attention", **flux.SIZES[variant]
  )
  config.data.update(
    source="embedded:/data/latents",
    image_size=(128, 128),
    channels=16,
    batch_size=64,
    workers=8,
    held_out=0.01,
  )
  presets.apply(config, "flux")
  config.optim.update(learning_rate=1e-5, clip_norm=1.0)
  if variant == "dev":
    config.sample.guidance.update(name="distilled", scale=3.5)
  config.log.update(validation_every=1_000, sample_count=8)
  return config
