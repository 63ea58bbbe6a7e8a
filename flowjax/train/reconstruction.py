"""How an autoencoder is trained: what `config.reconstruction` says.

  loss = |x' - x| + w_p LPIPS(x', x) + penalties of latents - w_a D(x') + hinge

(arXiv:2012.09841, eq. 5 to 7; arXiv:2112.10752, appendix G). Terms are means
over the values of an image, where latent diffusion sums them: its weight of the
KL divergence means the same here. Generator and discriminator learn in one step
from one sum: what either must not move is a constant to the other.
"""

# Shape suffixes: B batch, H height, W width, C channels.

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from flowjax import models, schema
from flowjax.flow import losses, objective
from flowjax.models import adversary, perceptual, vq
from flowjax.train import running

DISTANCES = {"l1": jnp.abs, "l2": jnp.square}
# The weight of the adversary follows from a quotient, of which it is a bound.
MOST = 1e4
SMALL = 1e-4


def _group(kind: Any) -> Any:
  return dataclasses.field(default_factory=kind)


@dataclasses.dataclass(frozen=True)
class PerceptualConfig:
  """LPIPS (arXiv:1801.03924), whose weights are in a safetensors `file`."""

  weight: float = 0.0
  file: str | None = None

  def __post_init__(self):
    _not_below_zero(self, "weight")


@dataclasses.dataclass(frozen=True)
class AdversaryConfig:
  """A discriminator of patches (arXiv:1611.07004), from the step `start` on.

  `adaptive` multiplies its weight by how much steeper the other terms are at
  the last layer of the decoder (arXiv:2012.09841, eq. 7).
  """

  weight: float = 0.0
  start: int = 50_000
  adaptive: bool = True
  width: int = 64
  layers: int = 3

  def __post_init__(self):
    _not_below_zero(self, "weight", "start")
    for name in ("width", "layers"):
      if getattr(self, name) < 1:
        raise ValueError(f"{name} = {getattr(self, name)} must be at least 1.")

  @property
  def shape(self) -> dict[str, int]:
    """What the discriminator is made of."""
    return {"width": self.width, "layers": self.layers}


@dataclasses.dataclass(frozen=True)
class ReconstructionConfig:
  """The terms of the loss and their weights.

  `divergence` is for a KL autoencoder; `codebook` and `commitment` are for one
  with a codebook, which with `codebook_decay` is a moving average of latents
  and has no loss of its own (arXiv:1711.00937, appendix A.1).
  """

  distance: str = "l1"
  divergence: float = 1e-6
  codebook: float = 1.0
  commitment: float = 0.25
  codebook_decay: float | None = None
  perceptual: PerceptualConfig = _group(PerceptualConfig)
  adversary: AdversaryConfig = _group(AdversaryConfig)

  def __post_init__(self):
    _not_below_zero(self, "divergence", "codebook", "commitment")
    schema.require_among(self, distance=DISTANCES)
    decay = self.codebook_decay
    if decay is not None and not 0.0 <= decay < 1.0:
      raise ValueError(f"codebook_decay = {decay} must be in [0, 1); 0.99.")

  @property
  def frozen(self) -> tuple[str, ...]:
    """Patterns of the parameters that the loss needs as they are."""
    return (f"{perceptual.GROUP}/.*",) if self.perceptual.weight else ()

  def check(self, model: Any) -> None:
    """Raises ValueError for what would be without effect on a model."""
    unheeded = {
      "autoencoder": ("codebook", "commitment", "codebook_decay"),
      "vq": ("divergence",),
    }
    for name in unheeded[model.name]:
      default = getattr(ReconstructionConfig(), name)
      if getattr(self, name) != default:
        raise ValueError(
          f"{name} = {getattr(self, name)} would be without effect on a model "
          f"{model.name!r}; leave it at {default}."
        )
    if self.perceptual.weight and model.channels not in (1, 3):
      raise ValueError(
        f"perceptual.weight = {self.perceptual.weight} is for images of 1 or 3 "
        f"channels, not {model.channels}."
      )
    layers, side = self.adversary.layers, min(model.image_size)
    if self.adversary.weight and adversary.sides(side, layers) < 1:
      raise ValueError(
        f"adversary.layers = {layers} leaves no patch of images {side} wide: "
        f"it takes {3 * 2**layers} pixels or more."
      )

  def network(self, network: models.Network) -> models.Network:
    """Returns the autoencoder with the parameters that its loss needs."""
    config = network.config
    if self.codebook_decay is not None:
      network = models.with_running_codebook(network, running.CODEBOOK)
    if self.perceptual.weight:
      network = models.with_beside(
        network, perceptual.GROUP, lambda rng: perceptual.init()
      )
    if not self.adversary.weight:
      return network
    network = models.with_beside(
      network,
      adversary.GROUP,
      lambda rng: adversary.init(
        rng,
        channels=config.channels,
        image_size=config.image_size,
        **self.adversary.shape,
      ),
    )
    return models.with_beside(
      network, running.STEPS, lambda rng: {"count": jnp.zeros(())}
    )


def loss(config: ReconstructionConfig, network: models.Network) -> losses.Loss:
  """Returns the training loss of an autoencoder."""
  weights = {
    "divergence": config.divergence,
    "codebook": 0.0 if config.codebook_decay is not None else config.codebook,
    "commitment": config.commitment,
  }

  def total(params, batch, rng):
    x_BHWC = batch["image"]
    made = _required(network.reconstruct)(params, x_BHWC, rng)
    layer = params["decoder"]["out"]
    image_BHWC = _required(network.last)(layer, made.features_BHWC)

    def error(image_BHWC):
      return jnp.mean(_error(config, params, image_BHWC, x_BHWC))

    if config.adversary.weight:
      value = _against(config, network, params, error, made, image_BHWC, x_BHWC)
    else:
      value = error(image_BHWC)
    for name, penalty_B in made.penalties.items():
      value += weights[name] * jnp.mean(penalty_B)
    if config.codebook_decay is not None:
      averages = params[running.CODEBOOK]
      for name, average in averages.items():
        value += running.averaged(
          average, made.statistics[name], config.codebook_decay
        )
    return value, {}

  return total


def validation_loss(
  config: ReconstructionConfig, network: models.Network
) -> losses.Loss:
  """Returns the distance of held-out images from their reconstructions.

  Nothing in it is random: latents are at their mean. The metrics "means" are
  averages over examples: PSNR in decibels, 10 log10(4 / mean (x' - x)^2), the
  penalties, and of a codebook the number of its vectors in use.
  """

  def total(params, batch, rng):
    del rng
    x_BHWC = batch["image"]
    made = _required(network.reconstruct)(params, x_BHWC, None)
    layer = params["decoder"]["out"]
    image_BHWC = _required(network.last)(layer, made.features_BHWC)
    square_B = jnp.mean(jnp.square(image_BHWC - x_BHWC), axis=(1, 2, 3))
    by_example = {
      "psnr": 10.0 * jnp.log10(4.0 / jnp.maximum(square_B, 1e-10)),
      **made.penalties,
    }
    error_B = _error(config, params, image_BHWC, x_BHWC)

    def mean(value_B):
      return objective.average(objective.masked(value_B, batch), batch)

    means = {name: mean(value_B) for name, value_B in by_example.items()}
    if "index" in made.statistics:
      means["codes_in_use"] = vq.perplexity(
        network.config.codes,
        made.statistics["index"],
        batch.get("mask", jnp.ones(len(x_BHWC))).astype(jnp.float32),
      )
    return mean(error_B), {"means": means}

  return total


def _error(config, params, image_BHWC, x_BHWC) -> jax.Array:
  """Returns how far reconstructions are from images, [B]."""
  measure = DISTANCES[config.distance]
  error_B = jnp.mean(measure(image_BHWC - x_BHWC), axis=(1, 2, 3))
  if config.perceptual.weight:
    apart_B = perceptual.distance(params[perceptual.GROUP], image_BHWC, x_BHWC)
    error_B += config.perceptual.weight * apart_B
  return error_B


def _against(
  config: ReconstructionConfig,
  network: models.Network,
  params: dict[str, Any],
  error: Any,
  made: Any,
  image_BHWC: jax.Array,
  x_BHWC: jax.Array,
) -> jax.Array:
  """Returns the error, and what generator and discriminator are to each other.

  Both gradients with respect to the image are found once; from them follow the
  weight and, linearly, the gradient of the generator.
  """
  chosen = config.adversary
  begun = (params[running.STEPS]["count"] >= chosen.start).astype(jnp.float32)
  still_BHWC = jax.lax.stop_gradient(image_BHWC)
  fixed = jax.lax.stop_gradient(params[adversary.GROUP])

  def judge(params, image_BHWC):
    return adversary.apply(params, image_BHWC, **chosen.shape)

  def caught(image_BHWC):
    return -jnp.mean(judge(fixed, image_BHWC))

  value, slope_BHWC = jax.value_and_grad(error)(still_BHWC)
  unfooled, away_BHWC = jax.value_and_grad(caught)(still_BHWC)
  weight = chosen.weight * begun
  if chosen.adaptive:
    weight *= _steepness(network, params, made, slope_BHWC, away_BHWC)
  total = value + weight * unfooled
  total += running.taking(image_BHWC, slope_BHWC + weight * away_BHWC)
  real, false = (
    judge(params[adversary.GROUP], images) for images in (x_BHWC, still_BHWC)
  )
  hinge = jnp.mean(jax.nn.relu(1.0 - real)) + jnp.mean(jax.nn.relu(1.0 + false))
  total += 0.5 * begun * hinge
  return total + running.counted(params[running.STEPS]["count"])


def _steepness(network, params, made, slope_BHWC, away_BHWC) -> jax.Array:
  """Returns |d error / dW| / |d adversary / dW|, W the last kernel."""
  layer, features_BHWC = jax.lax.stop_gradient(
    (params["decoder"]["out"], made.features_BHWC)
  )
  _, back = jax.vjp(lambda p: network.last(p, features_BHWC), layer)
  of_error, of_adversary = (
    optax.global_norm(back(slope)[0]["kernel"])
    for slope in (slope_BHWC, away_BHWC)
  )
  return jnp.clip(of_error / (of_adversary + SMALL), 0.0, MOST)


def _required(function: Any) -> Any:
  if function is None:
    raise ValueError("config.reconstruction is for autoencoders alone.")
  return function


def _not_below_zero(config: Any, *names: str) -> None:
  for name in names:
    if not getattr(config, name) >= 0:
      raise ValueError(f"{name} = {getattr(config, name)} is below 0; 0: none.")
