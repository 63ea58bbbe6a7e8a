"""What chips can do, from their makers' data sheets: one table for all.

Everything is of one jax device: a whole chip, but half of one for TPU7x. Bytes
and FLOP/s are decimal; `hbm_bytes` is what a program may fill, by the compiler
for TPUs and by the driver for the H100.
"""

import dataclasses
import re
from typing import Any

GIB = 2**30

# Dense bf16 peak in FLOP/s; the first pattern found in device_kind counts.
PEAKS = (
  (r"MIG ", None),  # A share of a GPU, and the name does not say how much.
  (r"H100 PCIe", 756e12),
  (r"H100 NVL", 835e12),
  (r"H100|H200|GH200|H800", 989e12),
  (r"H20\b", 148e12),
  (r"GB200|GB300", 2500e12),
  (r"B200|B300", 2250e12),
  (r"A100|A800", 312e12),
  (r"L40S", 362e12),
  (r"\bL4\b", 121e12),
  (r"TPU7x", 1153e12),  # 2307e12 is a chip, which is two devices.
  (r"TPU v6", 918e12),
  (r"TPU v5 lite|TPU v5e", 197e12),
  (r"TPU v5", 459e12),
  (r"TPU v4 lite", 138e12),
  (r"TPU v4", 275e12),
  (r"TPU v3", 61.5e12),
  (r"TPU v2", 22.5e12),
)


@dataclasses.dataclass(frozen=True)
class Chip:
  """One device of a cluster, and its wires.

  `link` is the bandwidth in bytes/s, both directions of a ring together, along
  one axis of a torus (`axes` of them, closed from `wrap` devices on); with 0
  axes it is a switch, and `link` what a device may send while it receives as
  much. `network` is a device's share of what leaves its slice or node.
  `matmul` is the part of the peak that large products reach.
  """

  kind: str
  peak: float
  hbm_bytes: float
  hbm_bandwidth: float
  axes: int
  wrap: int
  link: float
  network: float
  matmul: float


def peak_of(kind: str) -> float | None:
  """Returns the dense bf16 peak in FLOP/s of a device_kind, None if unknown."""
  for pattern, peak in PEAKS:
    if re.search(pattern, kind):
      return peak
  return None


def peak_flops(device: Any) -> float | None:
  """Returns the dense bf16 peak of a device in FLOP/s, None if not known."""
  return peak_of(device.device_kind)


def _chip(kind: str, *rest: float) -> Chip:
  peak = peak_of(kind)
  assert peak is not None
  return Chip(kind, peak, *rest)  # type: ignore[arg-type]


# HBM, ICI and DCN from cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}, and
# what a program may fill of HBM as libtpu says it. ICI is given there for a
# chip with its 4 or 6 links; an axis of the torus has two of them: v5p's 600
# GB/s each way are 200 into a chip along each of three axes. NVLink 4 takes 450
# GB/s each way, and a DGX H100 has one 400 Gbit/s adapter for each GPU.
# `matmul` is 0.80 for large products on an H100 (measured by others), of which
# a whole network's reach some nine tenths; for TPUs it is assumed.
CHIPS = {
  "v4": _chip("TPU v4", 30.75 * GIB, 1.2e12, 3, 4, 100e9, 6.25e9, 0.80),
  "v5e": _chip("TPU v5 lite", 15.75 * GIB, 0.82e12, 2, 16, 100e9, 3.1e9, 0.80),
  "v5p": _chip("TPU v5", 95.74 * GIB, 2.765e12, 3, 4, 200e9, 6.25e9, 0.80),
  "v6e": _chip("TPU v6 lite", 31.25 * GIB, 1.6e12, 2, 16, 200e9, 12.5e9, 0.75),
  "tpu7x": _chip("TPU7x", 94.75 * GIB, 3.69e12, 3, 4, 100e9, 6.25e9, 0.75),
  "h100": _chip(
    "NVIDIA H100 80GB HBM3", 79.1 * GIB, 3.35e12, 0, 0, 450e9, 50e9, 0.73
  ),
}


def wires_of(kind: str) -> str | None:
  """Says how devices of a kind are joined, by data sheet; None if unknown."""
  for chip in CHIPS.values():
    if chip.kind == kind:
      inside = f"ICI, {chip.axes} axes of" if chip.axes else "NVLink,"
      return (
        f"{inside} {chip.link / 1e9:.0f} GB/s; beyond it "
        f"{chip.network / 1e9:.3g} GB/s"
      )
  return None
