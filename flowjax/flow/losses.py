"""Losses: factories that return loss(params, batch, rng) -> (scalar, metrics).

A batch is a dict. "image" is what flows, "mask" says which examples are real
(1) and which are padding (0), "region" the same of the pixels of each, and all
else is the condition of the network.
Noise is drawn for the global shape, so that neither the mesh nor the padding
changes what an example receives.

A network predicts data, noise, velocity or another of `prediction.PREDICTIONS`,
and its error is taken in that space: a weight speaks of it, and so do the
losses by example.
"""

# Shape suffixes: B batch, T fixed times. Images have any shape that starts with
# B and ends with the channels.

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from flowjax.flow import (
  couplings,
  distances,
  objective,
  paths,
  times,
  variance,
  weights,
)
from flowjax.flow import prediction as predictions

Batch = objective.Batch
Condition = objective.Condition
Metrics = dict[str, jax.Array]
Loss = Callable[[Any, Batch, jax.Array], tuple[jax.Array, Metrics]]
# predict(params, x_t, t_B, cond, rng); without rng nothing in it is random.
Predictor = Callable[
  [Any, jax.Array, jax.Array, Condition, jax.Array | None], jax.Array
]
# The same, and the logarithm u_B of how uncertain each prediction is.
Uncertain = Callable[
  [Any, jax.Array, jax.Array, Condition, jax.Array | None],
  tuple[jax.Array, jax.Array],
]
Velocity = Predictor
Weight = Callable[[jax.Array], jax.Array]

# The validation protocol of SD3 and MLPerf: the middles of 8 equal intervals.
EIGHTHS = tuple((i + 0.5) / 8 for i in range(8))

INDEPENDENT = couplings.independent()


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
  return matching(velocity, path, law, weight=weight)


def matching(
  predict: Predictor,
  path: paths.Path,
  law: times.TimeLaw,
  *,
  prediction: str = "velocity",
  weight: Weight | None = None,
  distance: str | distances.Distance = "l2",
  coupling: couplings.Coupling = INDEPENDENT,
  sigma_data: float = 0.5,
) -> Loss:
  """Returns the loss E w(t) d(predict(x_t, t), what it predicts of x and eps).

  t is drawn from `law` and kept where the path is finite; x and eps are paired
  by `coupling`. `loss_by_example` is the distance before the weight.
  """
  goal = objective.Objective(path, prediction, coupling, sigma_data)
  measure = _measure(distance)
  sample_t = _inside(goal, law)

  def loss(params, batch, rng):
    t_B, drawn, rng_net = _draw(goal, sample_t, batch, rng)
    value = predict(params, drawn.x_t, t_B, drawn.cond, rng_net)
    loss_B = objective.masked(measure(value, drawn.target, batch), batch)
    weighted_B = _weighted(weight, t_B, loss_B)
    metrics = {"t": t_B, "loss_by_example": loss_B}
    return objective.average(weighted_B, batch), metrics

  return loss


def uncertain(
  predict: Uncertain,
  path: paths.Path,
  law: times.TimeLaw,
  *,
  prediction: str = "velocity",
  weight: Weight | None = None,
  distance: str | distances.Distance = "l2",
  coupling: couplings.Coupling = INDEPENDENT,
  sigma_data: float = 0.5,
) -> Loss:
  """Returns the loss E w(t) exp(-u) d + u of `predict` that returns (value, u).

  EDM2 (arXiv:2312.02696, eq. 14): u_B is learned, usually from t alone, and its
  optimum is u = log E[w d | t], so that every t weighs alike in the gradient.
  """
  goal = objective.Objective(path, prediction, coupling, sigma_data)
  measure = _measure(distance)
  sample_t = _inside(goal, law)

  def loss(params, batch, rng):
    t_B, drawn, rng_net = _draw(goal, sample_t, batch, rng)
    value, u_B = predict(params, drawn.x_t, t_B, drawn.cond, rng_net)
    loss_B = objective.masked(measure(value, drawn.target, batch), batch)
    weighted_B = _weighted(weight, t_B, loss_B)
    if u_B.shape != loss_B.shape:
      raise ValueError(
        f"An uncertainty is one number per example, {loss_B.shape}, not "
        f"{u_B.shape}."
      )
    u_B = objective.masked(paths.wide(u_B), batch)
    total_B = weights.learned_uncertainty(weighted_B, u_B)
    metrics = {"t": t_B, "loss_by_example": loss_B, "uncertainty": u_B}
    return objective.average(total_B, batch), metrics

  return loss


def hybrid(
  predict: Predictor,
  path: paths.Path,
  law: times.TimeLaw,
  *,
  prediction: str = "noise",
  weight: Weight | None = None,
  distance: str | distances.Distance = "l2",
  scale: float = 1e-3,
) -> Loss:
  """Returns the loss L_simple + scale L_vlb of a network that learns variance.

  iDDPM's (arXiv:2102.09672, eq. 16), and the DiT paper's. `predict` returns
  twice the channels: the prediction, then v, which chooses each step's
  variance between its two bounds (`variance`). The path is a table of N steps;
  t is rounded up to one of its entries. L_vlb = N E[L_i] in bits per dimension,
  i uniform if the law is, trains v alone: to it the prediction is a constant.
  """
  goal = objective.Objective(path, prediction)
  measure = _measure(distance)
  posterior = variance.posterior(path)

  def sample_t(rng, shape):
    return posterior.time(posterior.index(law.sample(rng, shape)))

  def loss(params, batch, rng):
    t_B, drawn, rng_net = _draw(goal, sample_t, batch, rng)
    i_B = posterior.index(t_B)
    both = predict(params, drawn.x_t, t_B, drawn.cond, rng_net)
    value, v = variance.split(both, drawn.x)
    loss_B = objective.masked(measure(value, drawn.target, batch), batch)
    constant = jax.lax.stop_gradient(paths.wide(value))
    data = predictions.convert(
      path, prediction, "data", constant, drawn.x_t, t_B
    )
    bits_B = posterior.bits(drawn.x, drawn.x_t, i_B, data, v)
    bound_B = posterior.steps * objective.masked(bits_B, batch)
    weighted_B = _weighted(weight, t_B, loss_B)
    metrics = {"t": t_B, "loss_by_example": loss_B, "bound_by_example": bound_B}
    return objective.average(weighted_B + scale * bound_B, batch), metrics

  return loss


def fixed_time(
  predict: Predictor,
  path: paths.Path,
  times: Sequence[float] = EIGHTHS,
  *,
  prediction: str = "velocity",
  distance: str | distances.Distance = "l2",
  coupling: couplings.Coupling = INDEPENDENT,
  sigma_data: float = 0.5,
) -> Loss:
  """Returns the loss of every example at every one of `times`, for validation.

  Only the noise is drawn, anew for each time; the network runs without rng.
  One time after the other, so that it needs no more memory than one batch.
  """
  goal = objective.Objective(path, prediction, coupling, sigma_data)
  measure = _measure(distance)

  def loss(params, batch, rng):
    def at(t_and_rngs):
      t, rng_eps, rng_pair = t_and_rngs
      t_B = jnp.full(batch["image"].shape[:1], t)
      drawn = goal.draw(batch, t_B, rng_eps, rng_pair)
      value = predict(params, drawn.x_t, t_B, drawn.cond, None)
      return objective.masked(measure(value, drawn.target, batch), batch)

    t_T = goal.inside(jnp.asarray(times, jnp.float32))
    count = len(times)
    rng_pair_T = jax.random.split(jax.random.fold_in(rng, count), count)
    loss_TB = jax.lax.map(at, (t_T, jax.random.split(rng, count), rng_pair_T))
    loss_B = jnp.mean(loss_TB, axis=0)
    by_time_T = jax.vmap(lambda loss_B: objective.average(loss_B, batch))(
      loss_TB
    )
    metrics = {"loss_by_time": by_time_T, "loss_by_example": loss_B}
    return objective.average(loss_B, batch), metrics

  return loss


def _inside(goal: objective.Objective, law: times.TimeLaw):
  return lambda rng, shape: goal.inside(law.sample(rng, shape))


def _draw(goal: objective.Objective, sample_t, batch: Batch, rng: jax.Array):
  """Returns t_B, what is drawn at it, and the key of the network."""
  rng_t, rng_eps, rng_net = jax.random.split(rng, 3)
  t_B = sample_t(rng_t, batch["image"].shape[:1])
  drawn = goal.draw(batch, t_B, rng_eps, jax.random.fold_in(rng, 3))
  return t_B, drawn, rng_net


def _weighted(weight: Weight | None, t_B: jax.Array, loss_B: jax.Array):
  return loss_B if weight is None else weight(t_B) * loss_B


def _measure(distance: str | distances.Distance):
  """Returns the distance within a batch's region, which broadcasts nothing."""
  named = distances.build(distance) if isinstance(distance, str) else distance

  def measure(value, target, batch):
    if value.shape != target.shape:
      raise ValueError(
        f"The network returns {value.shape} where {target.shape} is to be "
        "predicted; one that also returns a variance is trained by `hybrid`, "
        "and elsewhere wrapped in `variance.predicted`."
      )
    if "region" in batch:
      return named(value, target, batch["region"])
    return named(value, target)

  return measure
