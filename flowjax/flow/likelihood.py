"""The log-density of data under a flow, by the change of variables.

Along dx/dt = v(x, t) the log-density of what flows changes by

  d log p(x(t), t) / dt = -div v(x(t), t)

(arXiv:1806.07366, theorem 1), so the data has

  log p(x_0) = log p_1(x_1) + integral of div v over t from 0 to 1,

integrated together with x (arXiv:1810.01367; for diffusion models
arXiv:2011.13456, appendix D). A velocity treats the examples of a batch apart:
the divergence is that of each example by itself. It takes derivatives of the
field in forward mode, and gradients through all of it are those of reverse
mode: a continuous normalizing flow can be trained by maximum likelihood.
"""

# Shape suffixes: B batch, P probes. x has any shape that starts with B; D is
# the number of values in one example.

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from flowjax.flow import paths, solvers
from flowjax.flow.solvers import runge_kutta, sde

# field(x, t) -> v; t is one number.
Field = Callable[[jax.Array, jax.Array], jax.Array]
LogDensity = Callable[[jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class Divergence:
  """A way to the divergence: what is drawn once per solve, and its use.

  `draw(rng, x)` returns the probes, and `evaluate(field, x, t, probes)` the
  velocity together with its divergence.
  """

  draw: Callable[[jax.Array | None, jax.Array], Any]
  evaluate: Callable[..., tuple[jax.Array, jax.Array]]


class Result(NamedTuple):
  """The log-density of each example, in nats, and where the flow took it."""

  log_density_B: jax.Array
  x: jax.Array


def exact(chunk: int = 16) -> Divergence:
  """Builds the sum of the D diagonal entries of the Jacobian.

  D derivatives along the axes per evaluation, `chunk` of them at a time.
  """
  if chunk < 1:
    raise ValueError(
      f"chunk, the derivatives taken at a time, must be at least 1, not {chunk}"
      "; 16 is usual."
    )

  def evaluate(field, x, t, probes):
    del probes
    v, push = jax.linearize(lambda x: field(x, t), x)
    size = math.prod(x.shape[1:])

    def entry(i):
      axis = jax.nn.one_hot(i, size, dtype=x.dtype).reshape(1, *x.shape[1:])
      column = push(jnp.broadcast_to(axis, x.shape))
      return column.reshape(-1, size)[:, i]

    entries_DB = jax.lax.map(
      entry, jnp.arange(size), batch_size=min(chunk, size)
    )
    return v, jnp.sum(entries_DB, axis=0)

  return Divergence(draw=lambda rng, x: (), evaluate=evaluate)


def hutchinson(law: str = "rademacher", probes: int = 1) -> Divergence:
  """Builds the unbiased estimate e^T J e, averaged over `probes` probes e.

  Their law is "rademacher" (signs) or "gaussian". They are drawn once and kept
  for the whole solve, so that the solver, adaptive or not, sees one smooth
  field (arXiv:1810.01367, section 3.1).
  """
  if law not in _PROBES:
    raise ValueError(
      f"There is no law {law!r} of probes; it must be one of "
      f"{', '.join(_PROBES)}."
    )
  if probes < 1:
    raise ValueError(f"An estimate needs at least 1 probe, not {probes}.")

  def draw(rng, x):
    if rng is None:
      raise ValueError(
        "Hutchinson's estimate draws probes: give it a random key, "
        "rng=jax.random.key(seed), or use the exact divergence."
      )
    return _PROBES[law](rng, (probes, *x.shape), x.dtype)

  def evaluate(field, x, t, probes):
    def along(probe):
      v, slope = jax.jvp(lambda x: field(x, t), (x,), (probe,))
      return v, _sum(probe * slope)

    v, estimates_PB = jax.vmap(along, out_axes=(None, 0))(probes)
    return v, jnp.mean(estimates_PB, axis=0)

  return Divergence(draw, evaluate)


_PROBES = {"rademacher": jax.random.rademacher, "gaussian": jax.random.normal}


def log_density(
  field: Field,
  path: paths.Path,
  x: jax.Array,
  times: jax.Array,
  *,
  solver: Any = runge_kutta.rk4,
  divergence: Divergence | None = None,
  rng: jax.Array | None = None,
  log_prior: LogDensity | None = None,
) -> Result:
  """Returns log p of the data x, and the noise that it flows to.

  `times` rise from data to noise, as in the reverse of a grid for sampling.
  `log_prior` is the log-density of each example at times[-1]; without it that
  is normal with the path's `prior_scale`, exact where alpha is 0. The solver
  integrates velocities; the divergence is exact unless another is given.
  """
  _check_direction(times, rising=True)
  log_prior = log_prior or normal(path.prior_scale)
  end, change_B = transport(field, x, times, solver, divergence, rng)
  return Result(log_prior(end) + change_B, end)


def sample(
  field: Field,
  path: paths.Path,
  noise: jax.Array,
  times: jax.Array,
  *,
  solver: Any = runge_kutta.rk4,
  divergence: Divergence | None = None,
  rng: jax.Array | None = None,
  log_prior: LogDensity | None = None,
) -> Result:
  """Returns log p of the data that `noise` flows to, and that data.

  `noise` is a draw from the prior, with its scale; `times` fall from noise to
  data. All else as in `log_density`.
  """
  _check_direction(times, rising=False)
  log_prior = log_prior or normal(path.prior_scale)
  end, change_B = transport(field, noise, times, solver, divergence, rng)
  return Result(log_prior(paths.wide(noise)) - change_B, end)


def transport(
  field: Field,
  x: jax.Array,
  times: jax.Array,
  solver: Any = runge_kutta.rk4,
  divergence: Divergence | None = None,
  rng: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Returns x at times[-1] and the integral of div v on the way there.

  log p(x_start) = log p(x_end) + that integral, whichever way the times run.
  """
  if solver.prediction != "velocity" or isinstance(solver, sde.Stochastic):
    raise ValueError(
      f"The solver {solver.name!r} does not integrate a velocity alone, and so "
      "no change of variables; take one such as 'rk4' or 'dopri5'."
    )
  divergence = divergence or exact()
  x = paths.wide(jnp.asarray(x))
  probes = divergence.draw(rng, x)

  def both(state, t):
    v, divergence_B = divergence.evaluate(field, state["x"], t, probes)
    return {"x": v, "integral": divergence_B}

  state = {"x": x, "integral": jnp.zeros(x.shape[:1], x.dtype)}
  end = solvers.solve(solver, both, state, times)
  return end["x"], end["integral"]


def normal(scale: float) -> LogDensity:
  """Builds the log-density of D independent normals of this deviation."""

  def log_prior(x):
    size = math.prod(x.shape[1:])
    constant = size * math.log(scale * math.sqrt(2.0 * math.pi))
    return -0.5 * _sum(jnp.square(x / scale)) - constant

  return log_prior


def dequantise(rng: jax.Array, x: jax.Array, bin_width: float) -> jax.Array:
  """Adds noise uniform over the bin around each value of quantised data.

  The log-density of the result bounds the log-probability of the bins from
  below: log P(x) >= E log p(x + u) + D log bin_width (arXiv:1511.01844).
  """
  x = paths.wide(jnp.asarray(x))
  return x + bin_width * jax.random.uniform(
    rng, x.shape, x.dtype, minval=-0.5, maxval=0.5
  )


def bits_per_dimension(
  log_density_B: jax.Array, size: int, bin_width: float
) -> jax.Array:
  """Returns -(log p + D log bin_width) / (D log 2), D = `size`.

  For 8-bit images scaled to [-1, 1], bin_width = 2 / 255.
  """
  per_dimension_B = log_density_B / size + math.log(bin_width)
  return -per_dimension_B / math.log(2.0)


def _sum(x: jax.Array) -> jax.Array:
  return jnp.sum(x, axis=tuple(range(1, x.ndim)))


def _check_direction(times: jax.Array, *, rising: bool) -> None:
  if isinstance(times, jax.core.Tracer):
    return
  if (times[-1] > times[0]) != rising:
    raise ValueError(
      f"The times run from {float(times[0]):.4g} to {float(times[-1]):.4g}; "
      + (
        "the likelihood of data follows it to noise: reverse them."
        if rising
        else "a sample starts from noise, t near 1: reverse them."
      )
    )
