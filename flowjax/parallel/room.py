"""Whether a program fits into the memory of this machine, where that is a CPU.

GPUs and TPUs say it themselves when they run out of memory. On CPUs a program
may be begun whose temporaries cannot be allocated, and then it never ends; or
the system promises what it does not have, and kills the process.
"""

import os
import pathlib

import jax

# Where containers are told how much they may use, in cgroups of both versions.
_LIMITS = (
  "/sys/fs/cgroup/memory.max",
  "/sys/fs/cgroup/memory/memory.limit_in_bytes",
)


class NoRoom(RuntimeError):
  """A program that needs more memory than there is; it has not been run."""


def require(program: jax.stages.Compiled) -> None:
  """Raises NoRoom where a compiled program is too large for this machine."""
  needed = needs(program)
  if needed > (there := of_machine()):
    raise NoRoom(
      f"a program needs {needed / 1e9:,.1f} GB of this machine's "
      f"{there / 1e9:,.1f} GB, and was not run."
    )


def needs(program: jax.stages.Compiled) -> int:
  """Returns how many bytes of this host a program holds; 0 if not on CPUs."""
  shardings = jax.tree.leaves(program.output_shardings)
  stats = program.memory_analysis()
  if not shardings or stats is None:
    return 0
  devices = shardings[0].addressable_devices
  if any(device.platform != "cpu" for device in devices):
    return 0
  each = (
    stats.argument_size_in_bytes
    + stats.temp_size_in_bytes
    + stats.output_size_in_bytes
    - stats.alias_size_in_bytes
  )
  return each * len(devices)


def of_machine() -> int:
  """Returns the bytes of memory of this machine, or of its container."""
  found = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
  for name in _LIMITS:
    try:
      found.append(int(pathlib.Path(name).read_text()))
    except (OSError, ValueError):  # There is no such file, or it says "max".
      pass
  return min(found)
