"""What a run would be on a cluster that is not here.

`compiled` compiles the step that `flowjax train` runs for that cluster, and
reads the program; `modelled` answers from formulas. Neither runs anything:
times are always a model's.
"""

import dataclasses
import re
from typing import Any

import jax

from flowjax import errors
from flowjax.parallel import collectives, roofline, topology
from flowjax.parallel import mesh as meshes
from flowjax.train import aspects, experiment, loop, memory, parts, traffic

# What of the state is counted leaf by leaf.
STATE = ("parameters", "average", "optimizer")
# A program of 8 GB or more counts its memory in these.
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
# FlowJAX's own margin for what a compiler adds: buffers of collectives, copies.
MARGIN = 1.05


@dataclasses.dataclass(frozen=True)
class Plan:
  """What is known of a step on one device; `source` says how.

  `memory` is by kind; what it adds up to is `bytes_per_device`.
  `flops_per_step` is by the formula, three times the forward pass of the batch;
  `flops_done` counts also what is computed a second time.
  """

  source: str
  topology: topology.Topology
  shape: dict[str, int]
  batch_size: int
  remat: str
  memory: dict[str, int]
  bytes_per_device: int
  hbm_bytes: int
  moved: list[collectives.Collective]
  layer_depth: int
  flops_per_step: float
  flops_done: float
  step: roofline.Step
  notes: tuple[str, ...] = ()

  @property
  def fits(self) -> bool:
    """Whether a device has the memory."""
    return self.bytes_per_device <= self.hbm_bytes

  @property
  def mfu(self) -> float:
    """The part of the peak that the formula's FLOPs would be."""
    peak = self.topology.chip.peak * self.topology.size
    return self.flops_per_step / self.step.seconds / peak

  def to_json(self) -> dict[str, Any]:
    """Returns it as JSON can hold it."""
    step = self.step
    return {
      "fits": self.fits,
      "bytes_per_device": self.bytes_per_device,
      "hbm_bytes": self.hbm_bytes,
      "memory_by_kind": self.memory,
      "collectives": collectives.table(self.moved, self.layer_depth),
      "flops_per_step": self.flops_per_step,
      "flops_done_per_step": self.flops_done,
      "step_seconds": step.seconds,
      "seconds": {
        "compute": step.compute,
        "memory": step.memory,
        "communication": step.wires,
        "exposed_communication": step.exposed,
      },
      "mfu": self.mfu,
      "bound_by": step.bound_by,
      "source": {
        "bytes_per_device": self.source,
        "memory_by_kind": "modelled",
        "collectives": self.source,
        "flops_per_step": "formula",
        "step_seconds": "modelled",
        "mfu": "modelled",
      },
      "topology": self.topology.name,
      "slices": self.topology.slices,
      "devices": self.topology.size,
      "mesh": self.shape,
      "batch_size": self.batch_size,
      "remat": self.remat,
      "notes": list(self.notes),
    }


def modelled(
  config: experiment.Experiment,
  where: topology.Topology,
  *,
  fused: bool | None = None,
) -> Plan:
  """Answers from formulas.

  `fused` says whether attention is one kernel; by default, as "auto" chooses.
  """
  config = aspects.largest(config)
  shape = _shape(config, where)
  found = _outline(config, where)
  if fused is None:
    # cuDNN cannot be traced without itself; elsewhere the trace says it.
    kernels = ("auto", "cudnn") if where.is_gpu else ("splash",)
    fused = getattr(config.model, "attention", "xla") in kernels
  if fused:
    counted = dataclasses.replace(found.arithmetic, scores=0)
    found = dataclasses.replace(found, arithmetic=counted)
  each = memory.examples(config, shape)
  block = memory.of_activations(found.kept_by_all, found.model, shape)
  kinds = {
    **memory.of_state(found, shape),
    "gradients": memory.of_gradients(found, shape),
    "kept activations": each
    * memory.of_activations(found.kept, found.model, shape),
    # What a block keeps for itself, and the gradient of that.
    "one block": 2 * each * block // memory.depth(found.model),
    "scores of attention": each * memory.of_scores(found, shape),
    "gathered layers": memory.of_layers(found, shape),
  }
  return _plan(
    config,
    where,
    shape,
    found,
    source="modelled",
    kinds=kinds,
    held=int(MARGIN * sum(kinds.values())),
    moved=traffic.over_wires(config, found, shape),
  )


def compiled(
  config: experiment.Experiment, where: topology.Topology
) -> tuple[Plan, Any]:
  """Compiles the step for a cluster and reads what it holds and sends.

  Returns the program beside the plan, or None where it does not fit: a compiler
  that says so gives no program, and the rest is modelled.
  """
  config = aspects.largest(config)
  model = config.model
  if config.mesh.slices == -1:  # GPUs that are but described do not say it.
    mesh = dataclasses.replace(config.mesh, slices=where.domains)
    config = dataclasses.replace(config, mesh=mesh)
  notes: tuple[str, ...] = ()
  try:
    built = parts.build(config, topology.devices(where))
  except RuntimeError as error:
    if "cuDNN" not in str(error) or model.attention != "auto":
      raise
    # Its kernels come with NVIDIA's own packages.
    notes = (
      "cuDNN is not installed: compiled with attention='xla', which holds the "
      "matrix of scores. On the GPU 'auto' takes cuDNN's kernel.",
    )
    config = dataclasses.replace(
      config, model=dataclasses.replace(model, attention="xla")
    )
    built = parts.build(config, topology.devices(where))
  guess = modelled(config, where)
  try:
    program = loop.lower_step(built).compile()
  except jax.errors.JaxRuntimeError as error:
    told = "The compiler found no room; what it would send is modelled."
    return dataclasses.replace(
      guess,
      source="compiled",
      bytes_per_device=_bytes_of(error, guess),
      notes=(*guess.notes, *notes, told),
    ), None
  stats = program.memory_analysis()
  inputs, temporaries = stats.argument_size_in_bytes, stats.temp_size_in_bytes
  state = {name: guess.memory[name] for name in STATE}
  kinds = {
    **state,
    "batch": inputs - sum(state.values()),
    "temporaries": temporaries,
    "  of which gradients": guess.memory["gradients"],
    "  of which kept activations": guess.memory["kept activations"],
  }
  plan = _plan(
    config,
    where,
    guess.shape,
    _outline(config, where),
    source="compiled",
    kinds=kinds,
    held=inputs
    + temporaries
    + stats.output_size_in_bytes
    - stats.alias_size_in_bytes,
    moved=collectives.read(program.as_text(), built.mesh),
    notes=notes,
  )
  return plan, program


def _plan(
  config: experiment.Experiment,
  where: topology.Topology,
  shape: dict[str, int],
  found: memory.Outline,
  *,
  source: str,
  kinds: dict[str, int],
  held: int,
  moved: list[collectives.Collective],
  notes: tuple[str, ...] = (),
) -> Plan:
  batch = config.data.batch_size
  layer_depth = 1 + (config.optim.accumulate > 1)
  done = float(found.arithmetic.flops * batch)
  step = roofline.step(
    moved,
    roofline.layout(shape, where),
    where.chip,
    flops=done / where.size,
    hbm_bytes=traffic.through_memory(config, found, shape),
    layer_depth=layer_depth,
  )
  return Plan(
    source,
    where,
    shape,
    batch,
    getattr(config.model, "remat", "none"),
    kinds,
    held,
    int(where.chip.hbm_bytes),
    moved,
    layer_depth,
    float(found.built.flops * batch),
    done,
    step,
    (*notes, *([aspects.said(config.data)] if config.data.buckets else [])),
  )


def _outline(
  config: experiment.Experiment, where: topology.Topology
) -> memory.Outline:
  """Returns the outline for a device of a cluster, if it can be described."""
  body = getattr(config.model, "attention", None)
  foreign = "splash" if where.is_gpu else "cudnn"
  if body == foreign:
    kernel = "cudnn" if where.is_gpu else "splash"
    raise errors.UserError(
      f"config.model.attention = {body!r} cannot run on {where.name}. Use "
      f"'auto', {kernel!r} or 'xla'."
    )
  if not where.is_gpu and topology.is_installed(where):
    return memory.outline(config, topology.device_like(where))
  if body is not None:
    # A kernel cannot be traced here, for a device that is not described.
    xla = dataclasses.replace(config.model, attention="xla")
    config = dataclasses.replace(config, model=xla)
  return memory.outline(config)


def _shape(
  config: experiment.Experiment, where: topology.Topology
) -> dict[str, int]:
  """Returns the mesh on a cluster, which divides the batch and the model."""
  with errors.naming("config.mesh"):
    given = config.mesh.slices
    sizes = config.mesh.shape(
      where.size, where.domains if given == -1 else given
    )
  shape = dict(zip(meshes.AXES, sizes, strict=True))
  ways, times = shape["data"] * shape["fsdp"], config.optim.accumulate
  part = config.data.batch_size // times
  if part % ways:
    near = sorted({part // ways * ways, -(-part // ways) * ways} - {0})
    raise errors.UserError(
      f"config.data.batch_size = {config.data.batch_size} is not divisible by "
      f"data x fsdp = {ways}"
      + f" in each of optim.accumulate = {times} parts" * (times > 1)
      + f". Sizes that are: {', '.join(str(size * times) for size in near)}."
    )
  parts.check_divides(config.model, shape)
  return shape


def _bytes_of(error: Exception, fallback: Plan) -> int:
  """Returns how much the compiler says it needs; raises other errors."""
  text = str(error)
  if "RESOURCE_EXHAUSTED" not in text:
    raise error
  found = re.search(
    r"Used ([\d.]+)([KMGT])|\(([\d.]+)([KMGT])\) exceeds available", text
  )
  if found is None:
    return max(fallback.bytes_per_device, fallback.hbm_bytes + 1)
  number, unit = [word for word in found.groups() if word]
  needed = int(float(number) * _UNITS[unit])
  return max(needed, fallback.hbm_bytes + 1)
