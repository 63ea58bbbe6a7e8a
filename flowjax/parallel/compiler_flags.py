"""What the compiler is asked for on each platform: here, and nowhere else.

They are read once, when the first device is touched, and so must be set before.
A flag that the user has set stays as it is. The CPU needs none.
"""

import collections.abc
import dataclasses
import os

import jax

from flowjax.parallel import platforms


@dataclasses.dataclass(frozen=True)
class Recommended:
  """Flags by the variable that holds them, and options of jax's own."""

  options: collections.abc.Mapping[str, str]
  variable: str
  flags: collections.abc.Mapping[str, str]


# O1 has XLA hide collectives behind computation: the latency-hiding scheduler,
# pipelined collectives, loops whose next gather runs beside this computation.
# Collectives are combined up to the weights of one layer or two.
_GPU = Recommended(
  options={"jax_optimization_level": "O1"},
  variable="XLA_FLAGS",
  flags={
    "xla_gpu_enable_latency_hiding_scheduler": "true",
    "xla_gpu_all_gather_combine_threshold_bytes": str(2**30),
    "xla_gpu_all_reduce_combine_threshold_bytes": str(2**30),
    "xla_gpu_reduce_scatter_combine_threshold_bytes": str(2**27),
  },
)

# Gathers fused with the products that do not need them, in several steps; and
# sums of gradients between slices beside the computation.
_TPU = Recommended(
  options={},
  variable="LIBTPU_INIT_ARGS",
  flags={
    "xla_tpu_enable_async_collective_fusion": "true",
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": "true",
    "xla_tpu_enable_async_collective_fusion_multiple_steps": "true",
    "xla_tpu_overlap_compute_collective_tc": "true",
    "xla_enable_async_all_gather": "true",
    "xla_tpu_enable_data_parallel_all_reduce_opt": "true",
    "xla_tpu_data_parallel_opt_different_sized_ops": "true",
  },
)

RECOMMENDED = {"gpu": _GPU, "tpu": _TPU}


def apply(platform: str | None = None) -> str:
  """Sets what is recommended for a platform; returns one line that says so.

  By default that is the one which JAX is going to run on.
  """
  platform = platform or platforms.guess()
  if platform not in RECOMMENDED:
    return f"Compiler flags for {platform}: none are needed."
  wanted = RECOMMENDED[platform]
  before = os.environ.get(wanted.variable, "")
  theirs = {word.split("=")[0].lstrip("-") for word in before.split()}
  added = [
    f"--{name}={value}"
    for name, value in wanted.flags.items()
    if name not in theirs
  ]
  os.environ[wanted.variable] = " ".join([*before.split(), *added])
  said = []
  for name, value in wanted.options.items():
    if name.upper() not in os.environ:
      jax.config.update(name, value)
      said.append(f"{name}={value}")
  kept = sorted(theirs & wanted.flags.keys())
  text = f"Compiler flags for {platform}: {' '.join([*said, *added]) or 'none'}"
  if kept:
    text += f"; as you have set them: {' '.join(kept)}"
  return f"{text}. --no-compiler_flags leaves all of them out."
