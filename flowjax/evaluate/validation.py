"""The held-out loss at fixed times, with noise that never changes.

t = (i + 0.5) / 8, every example at every time: the protocol of SD3
(arXiv:2403.03206) and MLPerf. Since neither times nor noise change between two
evaluations, their difference is that of the weights alone.
"""

# Shape suffixes: B batches, T fixed times.

import collections.abc
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flowjax import errors
from flowjax.flow import losses

Batches = collections.abc.Iterable[dict[str, np.ndarray]]


class Validation:
  """Evaluates a loss of `losses.fixed_time` over one epoch.

  `batches()` begins the epoch anew; all batches are of one size, and "mask" in
  them says which examples are real. `put` places a batch on the devices, and
  `together` makes of a jitted function one that several processes call
  together. The noise of an example follows from `seed` and its place in the
  epoch: it is the same on every mesh, and another for another size of the
  batches.
  """

  def __init__(
    self,
    loss: losses.Loss,
    batches: collections.abc.Callable[[], Batches],
    *,
    seed: int = 0,
    put: collections.abc.Callable[[dict], dict] | None = None,
    together: collections.abc.Callable[[Any], Any] = lambda jitted: jitted,
  ):
    self._batches, self._put = batches, put or (lambda batch: batch)
    self._key = jax.random.key(seed)

    def total(params, batch, key, index):
      mean, metrics = loss(params, batch, jax.random.fold_in(key, index))
      count = jnp.float32(len(jax.tree.leaves(batch)[0]))
      if "mask" in batch:
        count = jnp.sum(batch["mask"].astype(jnp.float32))
      by_time = metrics.get("loss_by_time", jnp.zeros((0,)))
      return count, mean, by_time, metrics.get("means", {})

    self._total = together(jax.jit(total))

  def run(self, params: Any) -> dict[str, float]:
    """Returns `validation_loss`, and `validation_loss_t0`, ... for each time.

    A loss that knows no times, such as that of a normalizing flow, has only the
    first. What else it averages over examples, its metrics "means", is beside:
    `validation_psnr` and so on.

    Each example counts the same, in whatever batch it is.
    """
    parts: list[tuple[jax.Array, jax.Array, jax.Array, dict]] = []
    for index, batch in enumerate(self._batches()):
      placed = self._put(batch)
      parts.append(self._total(params, placed, self._key, np.int32(index)))
      # At most two batches at once, or the device would hold them all.
      jax.block_until_ready(parts[-2:][0])
    count_B = np.array([count for count, *_ in parts], np.float64)
    if not count_B.sum():
      raise errors.DataError(
        "The held-out split has no example to validate on: hold out more by "
        "config.data.held_out, or set config.log.validation_every=0."
      )
    share_B = count_B / count_B.sum()
    mean = share_B @ np.array([mean for _, mean, *_ in parts], np.float64)
    loss_T = share_B @ np.array([loss_T for *_, loss_T, _ in parts], np.float64)
    means = {
      f"validation_{name}": float(
        share_B @ np.array([each[name] for *_, each in parts], np.float64)
      )
      for name in parts[0][-1]
    }
    by_time = {
      f"validation_loss_t{i}": float(loss) for i, loss in enumerate(loss_T)
    }
    return {"validation_loss": float(mean), **means, **by_time}
