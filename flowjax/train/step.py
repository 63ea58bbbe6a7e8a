"""One step of training: state and batch in, state and metrics out.

Shape suffixes: A parts of an accumulated batch, B batch.
"""

import collections.abc
from typing import Any

import jax
import jax.numpy as jnp
import optax

from flowjax.parallel import host, sums
from flowjax.train import ema, freezing, running
from flowjax.train import state as states

Loss = collections.abc.Callable[
  [Any, dict[str, jax.Array], jax.Array], tuple[jax.Array, dict[str, Any]]
]
Step = collections.abc.Callable[
  [states.TrainState, dict[str, jax.Array]],
  tuple[states.TrainState, dict[str, jax.Array]],
]


def build(
  loss: Loss,
  optimizer: optax.GradientTransformation,
  *,
  seed: int,
  ema_config: ema.EmaConfig,
  accumulate: int = 1,
  schedule: optax.Schedule | None = None,
  frozen: freezing.Names = freezing.NONE,
  summing: sums.Sums = sums.PLAIN,
  opt_places: Any = None,
) -> Step:
  """Returns the pure step of training with `loss` and `optimizer`.

  Randomness is fold_in(seed, step), so that a resumed run draws what the
  straight run would have drawn. A loss or gradient that is not finite leaves
  parameters, average and optimizer as they were, and is counted. With the
  optimizer's `schedule`, the learning rate is among the metrics. The parameters
  in `frozen` go into the loss, and come out as they were. `summing` says how
  gradients are summed over devices; with shares the loss takes them.
  `opt_places` are the shardings of the optimizer's state, where some of it is
  kept in the memory of the host.
  """

  def step(state, batch):
    rng = jax.random.fold_in(jax.random.key(seed), state.step)
    trained, rest = freezing.split(state.params, frozen)

    others = summing.spread(rest)

    def loss_of_trained(trained, *inputs):
      return loss(freezing.overlaid(others, trained), *inputs)

    gradient = accumulated(loss_of_trained, accumulate, summing)
    with summing.traced():
      value, grads = gradient(trained, batch, rng)
    norm = optax.global_norm(running.learned(grads))

    before = host.fetch(state.opt_state, opt_places)
    updates, opt_state = optimizer.update(grads, before, trained)
    # An update can be beyond float32 though its gradient is not.
    size = optax.global_norm(updates)
    finite = jnp.isfinite(value) & jnp.isfinite(norm) & jnp.isfinite(size)
    params = optax.apply_updates(trained, updates)
    average = ema.update(
      state.ema, params, ema.decay_at(ema_config, state.step)
    )

    def keep(new, old):
      return jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)

    bad = jnp.logical_not(finite).astype(jnp.int32)
    new_state = states.TrainState(
      state.step + 1,
      freezing.overlaid(rest, keep(params, trained)),
      keep(average, state.ema),
      host.stow(keep(opt_state, before), opt_places),
      state.skipped + bad,
      (state.skipped_in_row + bad) * bad,
    )
    metrics = {
      "loss": value,
      "grad_norm": norm,
      "skipped": new_state.skipped,
      "skipped_in_row": new_state.skipped_in_row,
    }
    if schedule is not None:
      metrics["learning_rate"] = schedule(state.step - state.skipped)
    return new_state, metrics

  return step


def accumulated(loss: Loss, parts: int, summing: sums.Sums = sums.PLAIN):
  """Returns `(params, batch, rng) -> (loss, gradient)`, over `parts` in turn.

  The gradient of the mean is the mean of the gradients: the sums are kept in
  float32, and the peak of memory is that of one part. With shares `loss` takes
  parameters that are spread over them, and they are summed after the last part.
  """

  def mean_loss(params, batch, rng):
    value, _ = loss(params, batch, rng)
    return value

  value_and_grad = jax.value_and_grad(mean_loss)
  if parts == 1:
    return value_and_grad

  def split(x_B):
    # Each part takes every parts-th example, so that a batch divided over
    # devices stays divided the same way.
    x_BA = x_B.reshape((x_B.shape[0] // parts, parts) + x_B.shape[1:])
    return jnp.swapaxes(x_BA, 0, 1)

  def gradient(params, batch, rng):
    def add(total, part_and_rng):
      part, part_rng = part_and_rng
      found = value_and_grad(params, part, part_rng)
      return jax.tree.map(
        lambda a, b: a + b.astype(jnp.float32) / parts, total, found
      ), None

    params = summing.spread(params)
    start = (jnp.zeros((), jnp.float32), summing.zeros(params))
    xs = (jax.tree.map(split, batch), jax.random.split(rng, parts))
    (value, total), _ = jax.lax.scan(add, start, xs)
    return value, summing.total(total)

  return gradient
