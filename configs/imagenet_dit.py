"""DiT on ImageNet latents, at the sizes of the paper (arXiv:2212.09748).

  flowjax train --config=configs/imagenet_dit.py:xl_2 --workdir=runs/xl_2 \\
    --config.data.source=folder:/data/imagenet_latents

The argument is SIZE_PATCH: s, b, l or xl, and patch 2, 4 or 8. Parameters at
patch 2: 33M, 130M, 458M, 675M. The source is a folder of class folders, each
with one 32x32x4 `.npy` array per image: 256x256 images, encoded and scaled.
The recipe is the paper's: AdamW at 1e-4, no decay, batch 256, EMA 0.9999,
400,000 steps; with rectified flow and 2-D RoPE in place of its DDPM loss and
sincos position, and 1 image in 250 held out for the validation loss. Made for 8
GPUs or TPU chips or more (`--config.mesh.fsdp=8`); not trained by us yet, so no
time and no FID are known.
"""

from flowjax.models import dit
from flowjax.train import experiment


def get_config(variant: str = "xl_2"):
  """Returns the config of `variant`, such as "s_2" or "xl_4"."""
  size, _, patch = variant.partition("_")
  if size not in dit.SIZES or patch not in ("2", "4", "8"):
    raise ValueError(
      f"variant {variant!r} must be SIZE_PATCH with a size of "
      f"{', '.join(dit.SIZES)} and a patch of 2, 4, 8; such as xl_2."
    )
  config = experiment.defaults("dit")
  config.steps = 400_000
  config.model.update(
    image_size=(32, 32),
    channels=4,
    patch_size=int(patch),
    num_classes=1000,
    dtype="bfloat16",
    **dit.SIZES[size],
  )
  config.data.update(
    source="folder:/data/imagenet_latents",
    image_size=(32, 32),
    channels=4,
    batch_size=256,
    workers=8,
    held_out=0.004,  # About 5,000 images.
  )
  config.optim.update(learning_rate=1e-4)
  config.sample.guidance.scale = 1.5
  config.log.validation_every = 10_000
  config.log.sample_count = 16
  return config
