"""FlowJAX's side of solvers.py: whole solves, and loops around a network.

What is returned is a function of no arguments that runs once, to its end.
"""

# Shapes: B batch, H height, W width, C channels.

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import workload

import flowjax
from flowjax import models
from flowjax.flow import guidance, paths, sampling, solvers
from flowjax.models import dit

Run = Callable[[], Any]
# A network of one multiplication, beside those of workload.SIZES.
MULTIPLICATION = "multiplication"
SCALE = 4.0


@dataclasses.dataclass(frozen=True)
class Field:
  """A network and what it is given; `predict(params, x, t_B, cond)`."""

  predict: Callable[..., jax.Array]
  params: Any
  x_BHWC: np.ndarray
  cond: dict[str, np.ndarray]
  uncond: dict[str, np.ndarray]
  config: dit.DiTConfig | None = None

  @property
  def arguments(self) -> tuple[Any, ...]:
    """What a compiled loop takes: weights as constants would be folded."""
    return (self.params, self.x_BHWC, self.cond, self.uncond)


def field(size: str, batch: int) -> Field:
  """Makes a DiT of a size, all weights N(0, 0.02^2), or the multiplication."""
  work = workload.Workload(size="s" if size == MULTIPLICATION else size)
  config = dit.DiTConfig(**work.model())
  rng = np.random.default_rng(0)
  x_BHWC = rng.standard_normal(
    (batch, *config.image_size, config.channels), np.float32
  )
  label_B = (np.arange(batch) % config.num_classes).astype(np.int32)
  uncond = {"label": np.full_like(label_B, config.num_classes)}
  inputs = (x_BHWC, {"label": label_B}, uncond)
  if size == MULTIPLICATION:
    params = jnp.float32(0.5)
    return Field(lambda params, x, t_B, cond: params * x, params, *inputs)
  network = models.build(config)
  params = jax.tree.map(
    lambda leaf: jnp.asarray(
      0.02 * rng.standard_normal(leaf.shape, np.float32)
    ),
    jax.eval_shape(network.init, jax.random.key(0)),
  )
  return Field(network.apply, params, *inputs, config=config)


def method(
  solver: str,
  grid: np.ndarray,
  *,
  scale: float = 1.0,
  interval: guidance.Interval = guidance.ALWAYS,
) -> sampling.Method:
  """Builds the sampler that `flowjax sample` would, of a velocity network."""
  path = paths.straight()
  return sampling.Method(
    path=path,
    prediction="velocity",
    solver=solvers.build(solver, path),
    grid=np.asarray(grid, np.float32),
    rule=guidance.build("cfg", scale=scale),
    interval=interval,
  )


def bare(made: Field, count: int) -> Run:
  """Evaluates the network `count` times in one jit, and does nothing else.

  Each evaluation is given what the one before returned.
  """

  @jax.jit
  def loop(params, x_BHWC, cond, uncond):
    del uncond

    def body(x_BHWC, t):
      t_B = jnp.broadcast_to(t, x_BHWC.shape[:1])
      return made.predict(params, x_BHWC, t_B, cond), None

    times = jnp.linspace(1.0, 0.0, count + 1)[:-1]
    return jax.lax.scan(body, x_BHWC, times)[0]

  return lambda: jax.block_until_ready(loop(*made.arguments))


def solve(made: Field, how: sampling.Method) -> Run:
  """Samples in one jit."""

  @jax.jit
  def sample(params, x_BHWC, cond, uncond, rng):
    def predict(x_BHWC, t_B, cond):
      return made.predict(params, x_BHWC, t_B, cond)

    return how.sample(predict, cond, uncond, x_BHWC, rng)

  rng = jax.random.key(0)
  return lambda: jax.block_until_ready(sample(*made.arguments, rng))


def rows(how: sampling.Method, batch: int) -> list[int]:
  """Returns how many rows each evaluation of a solve sees, by running it.

  In any order. The network is the multiplication, which does not change what
  is evaluated.
  """
  made, seen = field(MULTIPLICATION, batch), []

  def predict(params, x_BHWC, t_B, cond):
    jax.debug.callback(lambda: seen.append(len(x_BHWC)))
    return made.predict(params, x_BHWC, t_B, cond)

  solve(dataclasses.replace(made, predict=predict), how)()
  jax.effects_barrier()
  return seen


def python_loop(made: Field, grid: np.ndarray, *, jitted_step: bool) -> Run:
  """Follows Euler's method from Python, around the jitted network.

  With `jitted_step` a whole step is one jitted call, network and update.
  """
  times = [np.float32(t) for t in grid]

  def move(params, x_BHWC, t, t_next, cond):
    t_B = jnp.broadcast_to(t, x_BHWC.shape[:1])
    v_BHWC = made.predict(params, x_BHWC, t_B, cond)
    return x_BHWC + (t_next - t) * v_BHWC

  network, step = jax.jit(made.predict), jax.jit(move)

  def run():
    x_BHWC = jnp.asarray(made.x_BHWC)
    for t, t_next in zip(times, times[1:], strict=False):
      if jitted_step:
        x_BHWC = step(made.params, x_BHWC, t, t_next, made.cond)
        continue
      t_B = np.full(len(x_BHWC), t)
      v_BHWC = network(made.params, x_BHWC, t_B, made.cond)
      x_BHWC = x_BHWC + (t_next - t) * v_BHWC
    return jax.block_until_ready(x_BHWC)

  return run


def steps_for(solver: str, evaluations: int) -> int:
  """Returns the most steps that evaluate the network no more often than this.

  Raises ValueError where one step does so already, or the solver chooses its
  own steps.
  """
  built = solvers.build(solver, paths.straight())
  fitting: Sequence[int] = [
    count
    for count in range(1, evaluations + 1)
    if built.evaluations(count) <= evaluations
  ]
  if not fitting:
    raise ValueError(
      f"One step of {solver} evaluates the network {built.evaluations(1)} "
      f"times, more than {evaluations}: raise --evaluations."
    )
  return fitting[-1]


def versions() -> str:
  """Names the libraries."""
  return (
    f"flowjax {flowjax.__version__}, jax {jax.__version__}, "
    f"jaxlib {jax.lib.__version__}, numpy {np.__version__}"
  )
