"""The one table of peaks and wires."""

import types

import jax
import pytest

from flowjax.parallel import chips


@pytest.mark.parametrize(
  "kind, peak",
  [
    ("cpu", None),
    ("NVIDIA H100 80GB HBM3", 989e12),
    ("NVIDIA H100 PCIe", 756e12),
    ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
    ("NVIDIA H200", 989e12),
    ("NVIDIA H20", 148e12),
    ("NVIDIA GH200 480GB", 989e12),
    ("NVIDIA A100-SXM4-40GB", 312e12),
    ("NVIDIA B200", 2250e12),
    ("NVIDIA GB200", 2500e12),
    ("NVIDIA L4", 121e12),
    ("NVIDIA L40S", 362e12),
    ("NVIDIA GeForce RTX 3060", None),
    ("TPU v4", 275e12),
    ("TPU v5 lite", 197e12),
    ("TPU v5e", 197e12),
    ("TPU v5", 459e12),
    ("TPU v5p", 459e12),
    ("TPU v6 lite", 918e12),
    ("TPU v6e", 918e12),
  ],
)
def test_peaks_by_name(kind, peak):
  assert chips.peak_flops(types.SimpleNamespace(device_kind=kind)) == peak


def test_this_machine_has_no_known_peak():
  assert chips.peak_flops(jax.devices("cpu")[0]) is None


def test_what_a_plan_knows_of_a_chip_is_of_one_device():
  for chip in chips.CHIPS.values():
    assert chip.peak == chips.peak_of(chip.kind)
    assert 10 * chips.GIB < chip.hbm_bytes < 100 * chips.GIB
    # Further away is slower.
    assert chip.hbm_bandwidth > chip.link > chip.network
    assert 0.5 < chip.matmul < 1


def test_how_devices_are_joined_is_said_where_it_is_known():
  assert "ICI, 3 axes of 200 GB/s" in chips.wires_of("TPU v5")
  assert "NVLink, 450 GB/s" in chips.wires_of("NVIDIA H100 80GB HBM3")
  assert chips.wires_of("cpu") is None
