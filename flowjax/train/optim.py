"""The optimizer: AdamW or Muon, its schedule, and which parameters decay."""

import dataclasses
from typing import Any

import jax
import optax

from flowjax import schema
from flowjax.parallel import rules, sums
from flowjax.train import muon, running

SCHEDULES = ("constant", "cosine", "linear")
NAMES = ("adamw", "muon")


@dataclasses.dataclass(frozen=True)
class OptimConfig:
  """AdamW (arXiv:1711.05101) or Muon, a warm-up, and what follows it.

  `name` is "adamw", or "muon", which moves the kernels of blocks as
  train/muon.py says, with momentum `muon_beta` and updates whose root mean
  square is `muon_rms` times the learning rate, and all else as AdamW does.
  `weight_decay_rules` are (regex, multiplier) over parameter names; the first
  that matches decides. `accumulate` splits each batch into so many parts
  whose gradients are summed in float32. `reduce_dtype` is that of sums of
  gradients over devices. `offload` keeps the moments in the memory of the host.
  A step whose loss or gradient is not finite is skipped; after `max_skipped` in
  a row training stops. Parameters whose names a regex in `freeze` matches stay
  as they are.
  """

  name: str = "adamw"
  learning_rate: float = 1e-4
  schedule: str = "constant"
  warmup_steps: int = 0
  final_learning_rate: float = 0.0
  beta1: float = 0.9
  beta2: float = 0.999
  epsilon: float = 1e-8
  muon_beta: float = 0.95
  muon_rms: float = 0.2  # About that of AdamW's updates.
  weight_decay: float = 0.0
  weight_decay_rules: tuple[tuple[str, float], ...] = (
    (r".*/kernel", 1.0),
    (r".*", 0.0),
  )
  clip_norm: float | None = None
  accumulate: int = 1
  reduce_dtype: str = "float32"
  offload: bool = False
  max_skipped: int = 10
  freeze: tuple[str, ...] = ()

  def __post_init__(self):
    schema.require_patterns("freeze", self.freeze)
    schema.require_among(
      self, name=NAMES, schedule=SCHEDULES, reduce_dtype=sums.DTYPES
    )
    positive = ("learning_rate", "epsilon", "muon_rms", "accumulate")
    positive += ("max_skipped",)
    for name in positive:
      if not getattr(self, name) > 0:
        raise ValueError(f"{name} = {getattr(self, name)} must be above 0.")
    for name in ("warmup_steps", "weight_decay", "final_learning_rate"):
      if not getattr(self, name) >= 0:
        raise ValueError(f"{name} = {getattr(self, name)} must not be below 0.")
    for name in ("beta1", "beta2", "muon_beta"):
      if not 0 <= getattr(self, name) < 1:
        raise ValueError(f"{name} = {getattr(self, name)} must be in [0, 1).")
    if self.clip_norm is not None and not self.clip_norm > 0:
      raise ValueError(
        f"clip_norm = {self.clip_norm} must be above 0, or None for no "
        "clipping."
      )


def schedule(config: OptimConfig, steps: int) -> optax.Schedule:
  """Returns the learning rate as a function of the number of updates."""
  peak, last = config.learning_rate, config.final_learning_rate
  rest = max(1, steps - config.warmup_steps)
  after = {
    "constant": lambda: optax.constant_schedule(peak),
    "cosine": lambda: optax.cosine_decay_schedule(peak, rest, last / peak),
    "linear": lambda: optax.linear_schedule(peak, last, rest),
  }[config.schedule]()
  if not config.warmup_steps:
    return after
  # The first update already moves: it counts from 1 / warmup_steps.
  ramp = optax.linear_schedule(
    peak / config.warmup_steps, peak, max(1, config.warmup_steps - 1)
  )
  return optax.join_schedules([ramp, after], [config.warmup_steps])


def build(
  config: OptimConfig, steps: int, abstract_params: Any
) -> optax.GradientTransformation:
  """Builds the optimizer for trained parameters of these names and shapes."""
  learned = running.learned(abstract_params)
  decay = rules.match(config.weight_decay_rules, learned)
  clip = (
    optax.identity()
    if config.clip_norm is None
    else optax.clip_by_global_norm(config.clip_norm)
  )
  directions = optax.scale_by_adam(config.beta1, config.beta2, config.epsilon)
  if config.name == "muon":
    directions = _with_muon(config, directions, learned)
  optimizer = optax.chain(
    clip,
    directions,
    add_scaled_weights(config.weight_decay, decay),
    optax.scale_by_learning_rate(schedule(config, steps)),
  )
  return running.beside(optimizer, abstract_params)


def _with_muon(
  config: OptimConfig, adam: optax.GradientTransformation, params: Any
) -> optax.GradientTransformation:
  """Returns Muon for the kernels of blocks, and Adam for all else."""
  labels = muon.labels(params)
  if "muon" not in jax.tree.leaves(labels):
    raise ValueError(
      "optim.name = 'muon': this network has no kernels of blocks for it to "
      "move; take 'adamw'."
    )
  kernels = muon.scale(config.muon_beta, config.muon_rms)
  return optax.partition({"muon": kernels, "adam": adam}, labels)


def add_scaled_weights(
  weight_decay: float, multipliers: Any
) -> optax.GradientTransformation:
  """Adds `weight_decay` times each parameter's own multiplier of itself."""

  def update(updates, params):
    return jax.tree.map(
      lambda u, p, m: u + weight_decay * m * p if m else u,
      updates,
      params,
      multipliers,
    )

  return optax.stateless(update)
