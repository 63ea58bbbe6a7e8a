"""The moving average of the parameters that samples are drawn from."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class EmaConfig:
  """Decay of the average per step; `warmup` lets it start short.

  With warm-up, step n decays by min(decay, (1 + n) / (10 + n)), so that an
  early average is not held back by the random initialisation.
  """

  decay: float = 0.9999
  warmup: bool = True

  def __post_init__(self):
    if not 0 <= self.decay < 1:
      raise ValueError(f"decay = {self.decay} must be in [0, 1).")


def decay_at(config: EmaConfig, step: jax.Array) -> jax.Array:
  """Returns the decay of step `step`, counted from 0."""
  if not config.warmup:
    return jnp.float32(config.decay)
  n = step.astype(jnp.float32)
  return jnp.minimum(config.decay, (1.0 + n) / (10.0 + n))


def update(ema: Any, params: Any, decay: jax.Array) -> Any:
  """Moves the average towards `params`: decay ema + (1 - decay) params."""
  return jax.tree.map(lambda e, p: e + (1.0 - decay) * (p - e), ema, params)
