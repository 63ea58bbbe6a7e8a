"""Losses: factories that return loss(params, batch, rng) -> (scalar, metrics).

A batch is a dict. "image" is what flows, "mask" says which examples are real
(1) and which are padding (0), and all else is the condition of the network.
Noise is drawn for the global shape, so that neither the mesh nor the padding
changes what an example receives.
"""

# Shape suffixes: B batch, T fixed times. Images have any shape that starts with
# B.

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from flowjax.flow import paths, times

Batch = Mapping[str, jax.Array]
Condition = dict[str, jax.Array]
Metrics = dict[str, jax.Array]
Loss = Callable[[Any, Batch, jax.Array], tuple[jax.Array, Metrics]]
# velocity(params, x_t, t_B, cond, rng); without rng nothing in it is random.
Velocity = Callable[
  [Any, jax.Array, jax.Array, Condition, jax.Array | None], jax.Array
]
Weight = Callable[[jax.Array], jax.Array]

# The validation protocol of SD3 and MLPerf: the middles of 8 equal intervals.
EIGHTHS = tuple((i + 0.5) / 8 for i in range(8))


def flow_matching(
  velocity: Velocity,
  path: paths.Path,
  law: times.TimeLaw,
  *,
  weight: Weight | None = None,
) -> Loss:
  """Returns the loss E w(t) |velocity(x_t, t) - (alpha' x + sigma' eps)|^2.

  Conditional flow matching (arXiv:2210.02747, eq. 9), t drawn from `law`. Its
  minimum is the marginal velocity E[alpha' x + sigma' eps | x_t], for every law
  and every weight. `loss_by_example` is the squared error before the weight.
  """

  def loss(params, batch, rng):
    rng_t, rng_eps, rng_net = jax.random.split(rng, 3)
    t_B = law.sample(rng_t, batch["image"].shape[:1])
    field = _conditioned(velocity, params, batch, rng_net)
    loss_B = _errors(field, path, batch, t_B, rng_eps)
    weighted_B = loss_B if weight is None else weight(t_B) * loss_B
    metrics = {"t": t_B, "loss_by_example": loss_B}
    return _average(weighted_B, batch), metrics

  return loss


def fixed_time(
  velocity: Velocity, path: paths.Path, times: Sequence[float] = EIGHTHS
) -> Loss:
  """Returns the loss of every example at every one of `times`, for validation.

  Only the noise is drawn, anew for each time; the network runs without rng.
  One time after the other, so that it needs no more memory than one batch.
  """

  def loss(params, batch, rng):
    field = _conditioned(velocity, params, batch, None)

    def at(t_and_rng):
      t, rng_eps = t_and_rng
      t_B = jnp.full(batch["image"].shape[:1], t)
      return _errors(field, path, batch, t_B, rng_eps)

    t_T = jnp.asarray(times, jnp.float32)
    loss_TB = jax.lax.map(at, (t_T, jax.random.split(rng, len(times))))
    loss_B = jnp.mean(loss_TB, axis=0)
    by_time_T = jax.vmap(lambda errors_B: _average(errors_B, batch))(loss_TB)
    metrics = {"loss_by_time": by_time_T, "loss_by_example": loss_B}
    return _average(loss_B, batch), metrics

  return loss


def _conditioned(velocity: Velocity, params, batch: Batch, rng):
  cond = {key: batch[key] for key in batch if key not in ("image", "mask")}
  return lambda x_t, t_B: velocity(params, x_t, t_B, cond, rng)


def _errors(field, path, batch, t_B, rng) -> jax.Array:
  """Returns the squared error of each example, 0 where it is padding."""
  x = batch["image"]
  eps = jax.random.normal(rng, x.shape, jnp.float32)
  v = field(path.interpolate(x, eps, t_B), t_B)
  # The target is float32: so is all that follows, whatever dtype v has.
  residual = v - path.velocity(x, eps, t_B)
  loss_B = jnp.mean(jnp.square(residual), axis=tuple(range(1, x.ndim)))
  if "mask" not in batch:
    return loss_B
  # Chosen, not multiplied: padding may hold anything, also what is not finite.
  return jnp.where(batch["mask"].astype(bool), loss_B, 0.0)


def _average(loss_B: jax.Array, batch: Batch) -> jax.Array:
  if "mask" not in batch:
    return jnp.mean(loss_B)
  real = jnp.sum(batch["mask"].astype(jnp.float32))
  # A batch of nothing but padding has loss 0, and weight 0 to whoever averages.
  return jnp.sum(loss_B) / jnp.maximum(real, 1.0)
