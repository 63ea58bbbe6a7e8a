"""FlowJAX's side: its real training step, on one device.

It imports what a step needs and no more, so that a machine with jax, flax and
optax is enough.
"""

import dataclasses
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import traces
import workload
from child import MATMUL_SIZE

import flowjax
from flowjax import models
from flowjax.flow import losses, paths, times
from flowjax.parallel import mesh as meshes
from flowjax.parallel import rules
from flowjax.train import ema, optim
from flowjax.train import state as states
from flowjax.train import step as steps

# That of configs/imagenet_dit.py; the learning rate is constant.
STEPS = 400_000
MOST_AT_ONCE = 2**30


@dataclasses.dataclass(frozen=True)
class Step:
  """A training step, and the shapes and places of what goes in."""

  network: models.Network
  mesh: jax.sharding.Mesh
  jitted: Any
  initial: Any
  state: states.TrainState
  batch: dict[str, jax.ShapeDtypeStruct]

  def lower(self):
    with meshes.use(self.mesh):
      return self.jitted.lower(self.state, self.batch)


def make_step(work: workload.Workload, device: jax.Device) -> Step:
  """Builds the step of configs/imagenet_dit.py for one device.

  Rectified flow with logit-normal times, AdamW, a moving average; an update
  that is not finite is skipped. The same for networks that read texts.
  """
  dropout = "label_dropout" if work.kind == "dit" else "condition_dropout"
  config = models.CONFIGS[work.kind](
    **work.model(),
    **{dropout: workload.LABEL_DROPOUT},
    remat=work.remat,
    scan=work.scan,
    attention=work.attention,
    dtype=work.dtype,
  )
  network = models.build(config)
  abstract = jax.eval_shape(network.init, jax.random.key(0))
  tuning = optim.OptimConfig(learning_rate=workload.LEARNING_RATE)
  optimizer = optim.build(tuning, STEPS, abstract)

  def initial() -> states.TrainState:
    return states.initial(lambda rng: _random_like(abstract), optimizer, 0)

  mesh = meshes.build(meshes.MeshConfig(), [device])
  shapes = jax.eval_shape(initial)
  shardings = states.shardings(shapes, rules.for_model(config), mesh)
  law = times.logit_normal()
  step = steps.build(
    losses.flow_matching(network.apply, paths.straight(), law),
    optimizer,
    seed=0,
    ema_config=ema.EmaConfig(decay=workload.EMA_DECAY),
    schedule=optim.schedule(tuning, STEPS),
  )
  image = jax.ShapeDtypeStruct(
    (work.batch, *config.image_size, config.channels), jnp.float32
  )
  cond = jax.eval_shape(lambda: network.example(work.batch))
  place = meshes.batch_sharding(mesh)
  return Step(
    network=network,
    mesh=mesh,
    jitted=jax.jit(
      step, donate_argnums=0, out_shardings=(shardings, meshes.replicated(mesh))
    ),
    initial=jax.jit(initial, out_shardings=shardings),
    state=jax.tree.map(
      lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
      shapes,
      shardings,
    ),
    batch=jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
      {"image": image, **cond},
    ),
  )


def _random_like(abstract):
  """Draws N(0, 0.02^2): a branch that starts at zero would cost less power.

  All at once, for each draw would be compiled by itself; of more than a billion
  the first come again, so that indices fit into 32 bits.
  """
  leaves, tree = jax.tree.flatten(abstract)
  room = min(sum(leaf.size for leaf in leaves), MOST_AT_ONCE)
  flat = 0.02 * jax.random.normal(jax.random.key(1, impl="rbg"), (room,))
  parts, start = [], 0
  for leaf in leaves:
    start = start if start + leaf.size <= room else 0
    parts.append(flat[start : start + leaf.size].reshape(leaf.shape))
    start += leaf.size
  return jax.tree.unflatten(tree, parts)


def _random_inputs(x: jax.ShapeDtypeStruct, rng: np.random.Generator):
  """Returns labels, or normal numbers, where a step takes them."""
  if jnp.issubdtype(x.dtype, jnp.integer):
    return jax.device_put(rng.integers(0, 1000, x.shape, x.dtype), x.sharding)
  return jax.device_put(rng.standard_normal(x.shape, x.dtype), x.sharding)


def _compile(made: Step) -> tuple[Any, dict[str, float]]:
  clocks = [(time.perf_counter(), time.process_time())]
  lowered = made.lower()
  clocks.append((time.perf_counter(), time.process_time()))
  compiled = lowered.compile()
  clocks.append((time.perf_counter(), time.process_time()))
  return compiled, {
    "lower_seconds": clocks[1][0] - clocks[0][0],
    "lower_cpu_seconds": clocks[1][1] - clocks[0][1],
    "compile_seconds": clocks[2][0] - clocks[1][0],
    "compile_cpu_seconds": clocks[2][1] - clocks[1][1],
  }


class Side:
  """Answers what `measure.Side` asks, and describes itself."""

  def __init__(self, work: workload.Workload):
    self.work = work
    # Asked for and not there is an error of jax: nothing runs elsewhere.
    self.device = jax.devices(work.device)[0]
    self.metrics: dict[str, jax.Array] = {}

    size = (MATMUL_SIZE[work.device],) * 2
    with jax.default_device(self.device):
      x = jax.random.normal(jax.random.key(2), size)
      self.matrix = x.astype(work.dtype)
    self.product = jax.jit(jnp.matmul)

  def build(self) -> dict[str, Any]:
    """Traces and compiles the step, and makes the state and the batch."""
    made = make_step(self.work, self.device)
    self.compiled, seconds = _compile(made)
    self.state = made.initial()
    rng = np.random.default_rng(0)
    self.batch = {key: _random_inputs(x, rng) for key, x in made.batch.items()}
    memory = self.compiled.memory_analysis()
    return {
      "parameters": sum(x.size for x in jax.tree.leaves(made.state.params)),
      "network_flops": made.network.flops,
      **seconds,
      "temporaries_gib": memory.temp_size_in_bytes / 2**30,
      "arguments_gib": memory.argument_size_in_bytes / 2**30,
    }

  def compile(self, depth: int) -> dict[str, Any]:
    """Traces and compiles the step of a network of this depth, to no use."""
    work = dataclasses.replace(self.work, depth=depth)
    return _compile(make_step(work, self.device))[1]

  def step(self):
    self.state, self.metrics = self.compiled(self.state, self.batch)
    return self.metrics

  def matmul(self):
    return self.product(self.matrix, self.matrix)

  def wait(self, handle) -> None:
    jax.block_until_ready(handle)

  def kernels(self, count: int) -> list[dict[str, Any]]:
    """Returns where the device's time goes, per step."""

    def run():
      for _ in range(count):
        last = self.step()
      self.wait(last)

    return traces.of_jax(run, count)

  def report(self) -> dict[str, Any]:
    memory = self.device.memory_stats() or {}
    return {
      "device": self.device.device_kind,
      "versions": f"flowjax {flowjax.__version__}, jax {jax.__version__}, "
      f"jaxlib {jax.lib.__version__}, numpy {np.__version__}",
      "loss": float(self.metrics["loss"]),
      "skipped": int(self.metrics["skipped"]),
      "peak_memory_gib": memory.get("peak_bytes_in_use", 0) / 2**30,
    }
