"""The autoencoders of latent diffusion on ImageNet (arXiv:2112.10752).

  flowjax train --config=configs/imagenet_autoencoder.py:kl_f8 \\
    --workdir=runs/kl_f8 --config.data.source=folder:/data/imagenet

The argument is KIND_FACTOR: kl or vq, and how many pixels of a side are one
latent: f1, f2, f4, f8, f16 or f32, with the channels of the paper's table 8
(f1 has as many as pixels), which can so be measured again. The recipe is the
paper's: |x' - x|, LPIPS, a KL weight of 1e-6 or a codebook, and a discriminator
after 50,000 steps, for vq after 250,000; Adam at 4.5e-6 for each image of a
batch. `--config.reconstruction.perceptual.file` names the weights of LPIPS, and
`--config.reconstruction.perceptual.weight=0.0` does without. Made for 8 GPUs or
TPU chips or more; not trained by us yet, so no time and no FID are known.
"""

from flowjax.train import experiment

# By the factor: widths over 128, and the level of attention. Those of f1 and f2
# are not told in the paper; they are the first levels of f4.
KL = {
  "f1": ((1,), (), 3),
  "f2": ((1, 2), (), 2),
  "f4": ((1, 2, 4), (), 3),
  "f8": ((1, 2, 4, 4), (), 4),
  "f16": ((1, 1, 2, 2, 4), (4,), 16),
  "f32": ((1, 1, 2, 2, 4, 4), (4, 5), 64),
}
# The same, and the vectors of the codebook.
VQ = {
  "f1": ((1,), (), 3, 8192),
  "f2": ((1, 2), (), 2, 2048),
  "f4": ((1, 2, 4), (), 3, 8192),
  "f8": ((1, 2, 2, 4), (3,), 4, 16384),
  "f16": ((1, 1, 2, 2, 4), (4,), 8, 16384),
  "f32": ((1, 1, 2, 2, 4, 4), (4, 5), 16, 16384),
}


def get_config(variant: str = "kl_f8"):
  """Returns the config of `variant`, such as "kl_f8" or "vq_f4"."""
  kind, _, factor = variant.partition("_")
  table = {"kl": KL, "vq": VQ}.get(kind, {})
  if factor not in table:
    raise ValueError(
      f"variant {variant!r} must be KIND_FACTOR with kl or vq, and one of "
      f"{', '.join(KL)}; such as kl_f8."
    )
  widths, attention, channels, *codes = table[factor]
  config = experiment.defaults("autoencoder" if kind == "kl" else "vq")
  config.steps = 500_000
  config.model.update(
    image_size=(256, 256),
    channels=3,
    latent_channels=channels,
    widths=tuple(128 * width for width in widths),
    attention_levels=attention,
    dtype="bfloat16",
  )
  if codes:
    (config.model.codes,) = codes
  config.data.update(
    source="folder:/data/imagenet",
    image_size=(256, 256),
    channels=3,
    batch_size=96,
    workers=8,
    flip=True,
    held_out=0.004,  # About 5,000 images.
  )
  config.reconstruction.perceptual.update(
    weight=1.0, file="/data/lpips_vgg16.safetensors"
  )
  config.reconstruction.adversary.update(
    weight=0.5 if kind == "kl" else 0.75,
    start=50_000 if kind == "kl" else 250_000,
  )
  config.optim.update(learning_rate=96 * 4.5e-6, beta1=0.5, beta2=0.9)
  config.ema.decay = 0.999
  config.log.validation_every = 10_000
  config.log.sample_count = 16
  return config
