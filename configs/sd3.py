"""Stable Diffusion 3 and 3.5 at their published sizes (arXiv:2403.03206).

  flowjax train --config=configs/sd3.py:3.5_medium --workdir=runs/sd3 \\
    --config.data.source=embedded:/data/latents --config.mesh.fsdp=8

The argument: medium (2.03 billion parameters), 3.5_medium (2.24) or 3.5_large
(8.06). The source is a folder of `.npz` files: latents of 1024x1024 images,
scaled and shifted as the VAE's config says (`image` [H, W, C]), with the
embedded text of CLIP and T5 (`text` [L, E]) and the pooled text (`pooled` [P]);
where some tokens are padding also `text_mask` [L].

Made for 8 GPUs or TPU chips or more; the settings are a fine-tuner's, not those
of the original training, and not measured by us.
"""

from flowjax.models import mmdit
from flowjax.train import experiment, presets


def get_config(variant: str = "medium"):
  """Returns the config of "medium", "3.5_medium" or "3.5_large"."""
  name = f"sd{variant}" if variant.startswith("3") else f"sd3_{variant}"
  if name not in mmdit.SIZES:
    raise ValueError(
      f"variant {variant!r} must be medium, 3.5_medium or 3.5_large."
    )
  config = experiment.defaults("mmdit")
  config.steps = 100_000
  config.model.update(
    dtype="bfloat16", remat="save_attention", **mmdit.SIZES[name]
  )
  config.data.update(
    source="embedded:/data/latents",
    image_size=(128, 128),
    channels=16,
    batch_size=256,
    workers=8,
    held_out=0.01,
  )
  presets.apply(config, "sd3")
  config.optim.update(learning_rate=2e-5, clip_norm=1.0)
  config.sample.guidance.scale = 5.0
  config.log.update(validation_every=1_000, sample_count=8)
  return config
