"""What accelerators can do at most, as their makers publish it: the measure of how well one is used."""

from typing import NamedTuple

import jax


class Device(NamedTuple):
    """Dense bfloat16 FLOP/s of one device, as jax counts devices, and its memory in bytes."""

    flops_per_second: float
    memory: int


# By what `jax.Device.device_kind` contains; the first that fits counts. NVIDIA: data sheets of A100, H100 and H200
# (without sparsity). TPU: cloud.google.com/tpu/docs, the page of each version.
PEAKS = {
    "A100-SXM4-80GB": Device(312e12, 80 * 2**30),
    "A100 80GB": Device(312e12, 80 * 2**30),
    "A100": Device(312e12, 40 * 2**30),
    "H100 PCIe": Device(756e12, 80 * 2**30),
    "H100": Device(989e12, 80 * 2**30),
    "H200": Device(989e12, 141 * 2**30),
    "TPU v4": Device(275e12, 32 * 2**30),
    "TPU v5 lite": Device(197e12, 16 * 2**30),
    "TPU v5e": Device(197e12, 16 * 2**30),
    "TPU v5": Device(459e12, 95 * 2**30),  # v5p calls itself so
    "TPU v6 lite": Device(918e12, 32 * 2**30),
    "TPU v6e": Device(918e12, 32 * 2**30),
}


def peak(device: jax.Device) -> Device | None:
    """The row of a device, or None if it is in none: a CPU's peak depends on more than its name."""
    kind = device.device_kind
    return next((row for name, row in PEAKS.items() if name.lower() in kind.lower()), None)
