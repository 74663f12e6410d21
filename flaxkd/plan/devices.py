"""Peaks of accelerators, as published by their makers, and the share of them that others have reached."""

import math
import re
from typing import NamedTuple

import jax


class Device(NamedTuple):
    """Dense bfloat16 FLOP/s of one device, as jax counts devices, and its memory in bytes."""

    flops_per_second: float
    memory: int


# By a part of `jax.Device.device_kind`; the first match counts. NVIDIA: data sheets of A100, H100 and H200
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
    "TPU v5": Device(459e12, 95 * 2**30),  # v5p's own name
    "TPU v6 lite": Device(918e12, 32 * 2**30),
    "TPU v6e": Device(918e12, 32 * 2**30),
}


def peak(device: jax.Device) -> Device | None:
    """The row of a device, or None without one: a CPU's peak depends on more than its name."""
    kind = device.device_kind
    return next((row for name, row in PEAKS.items() if name.lower() in kind.lower()), None)


class Kind(NamedTuple):
    """A device to plan for. `utilisation` is a share of its peak, and `source` says where it comes from."""

    platform: str
    device_kind: str  # a row of PEAKS
    utilisation: float
    source: str
    chip: str = "default"  # setting of its compiler: megacore makes both cores of a chip one device


MLPERF = "MLPerf Training v4.1, Stable Diffusion 2, 512 px, cached latents"
GUESS = "no figure is published for training Stable Diffusion on it: a guess between those of other TPUs"
KINDS = {
    "v4": Kind("tpu", "TPU v4", 0.40, GUESS, "megacore"),
    "v5e": Kind("tpu", "TPU v5e", 0.40, GUESS),
    "v5p": Kind("tpu", "TPU v5", 0.44, f"{MLPERF}: v5p-16, MaxDiffusion, 86.4 images/s a chip"),
    "v6e": Kind("tpu", "TPU v6e", 0.30, GUESS),
    "a100-40": Kind("gpu", "A100", 0.27, "mosaicml/diffusion README: 36.3 images/s an A100, 512 px, cached latents"),
    "a100-80": Kind("gpu", "A100 80GB", 0.27, "mosaicml/diffusion README: 36.3 images/s an A100, 512 px, cached"),
    "h100": Kind("gpu", "H100", 0.33, f"{MLPERF}: 8 H100, NeMo, 137.4 images/s a GPU"),
    "h200": Kind("gpu", "H200", 0.33, "that of the H100, which computes alike: no figure is published for it"),
}


class Target(NamedTuple):
    """A machine to plan for: `v5e:4x8` is 32 chips, `a100-80x8` is 8 GPUs."""

    name: str
    kind: str  # a row of KINDS
    topology: str  # as the compiler names it
    count: int

    @property
    def platform(self) -> str:
        return KINDS[self.kind].platform

    @property
    def peak(self) -> Device:
        return PEAKS[KINDS[self.kind].device_kind]


# Slices that can be rented: cloud.google.com/tpu/docs, the page of each version, and "Plan TPUs in GKE". A cube is a
# slice of three sides, multiples of 4 in rising order, of at most so many chips.
FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
DEEP = ("2x2x1", "2x2x2", "2x2x4", "2x4x4")
SLICES = {"v4": DEEP, "v5e": FLAT, "v5p": DEEP, "v6e": FLAT}
CUBES = {"v4": 4096, "v5p": 6144}


def check_slice(kind: str, topology: str) -> None:
    """Raises ValueError, with those that exist, for a topology that no TPU of that kind has."""
    sides = [int(side) for side in topology.split("x")]
    most, cube = CUBES.get(kind, 0), len(sides) == 3 and all(side and side % 4 == 0 for side in sides)
    if topology not in SLICES[kind] and not (cube and sides == sorted(sides) and math.prod(sides) <= most):
        cubes = f", and AxBxC with A <= B <= C, multiples of 4, up to {most:,} chips" if most else ""
        raise ValueError(f"there is no {kind}:{topology}: {kind} has {', '.join(SLICES[kind])}{cubes}")


def target(name: str) -> Target:
    """The machine of that name. Raises ValueError with examples for an unknown name."""
    tpu = re.fullmatch(r"(v\d[ep]?):(\d+(?:x\d+){1,2})", name)
    gpu = re.fullmatch(r"([a-z]+\d00(?:-\d+)?)(?:x([1-9]\d*))?", name)
    kind = (tpu or gpu)[1] if tpu or gpu else None
    kind = "a100-80" if kind == "a100" else kind
    if kind not in KINDS or (KINDS[kind].platform == "tpu") != bool(tpu):
        raise ValueError(
            f"unknown device {name!r}: TPUs are KIND:TOPOLOGY (v5e:4x8, v5p:2x2x1, v6e:2x2, v4:2x2x1), GPUs "
            f"KINDxCOUNT (a100-40x8, a100-80x8, h100x8, h200x8); the kinds are {', '.join(KINDS)}"
        )
    if tpu:
        check_slice(kind, tpu[2])
        return Target(name, kind, name, math.prod(map(int, tpu[2].split("x"))))
    count = int(gpu[2] or 1)
    return Target(name, kind, f"1x1x{count}", count)


class Gpu(NamedTuple):
    """An NVIDIA GPU for XLA's compiler; sizes in bytes. Source: tuning guides of Ampere and Hopper, data sheets."""

    title: str
    capability: int  # major version
    cores: int
    units: int  # of float32, per core
    clock: float  # GHz
    bandwidth: float  # of the memory, bytes/s
    cache: int  # level 2
    shared: int  # shared memory per core

    def description(self, memory: int) -> str:
        """The GPU as text of the protocol buffer stream_executor.GpuTargetConfigProto."""
        return f"""
gpu_device_info {{
  threads_per_block_limit: 1024  threads_per_warp: 32  threads_per_core_limit: 2048
  shared_memory_per_block: 49152  shared_memory_per_core: {self.shared}
  shared_memory_per_block_optin: {self.shared - 1024}
  core_count: {self.cores}  fpus_per_core: {self.units}  clock_rate_ghz: {self.clock}
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  thread_dim_limit_x: 1024  thread_dim_limit_y: 1024  thread_dim_limit_z: 64
  registers_per_core_limit: 65536  registers_per_block_limit: 65536
  memory_bandwidth: {int(self.bandwidth)}  l2_cache_size: {self.cache}  device_memory_size: {memory}
  cuda_compute_capability {{ major: {self.capability} minor: 0 }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
device_description_str: "{self.title}"
"""


GPUS = {
    "a100-40": Gpu("NVIDIA A100-SXM4-40GB", 8, 108, 64, 1.41, 1.555e12, 40 * 2**20, 164 * 2**10),
    "a100-80": Gpu("NVIDIA A100-SXM4-80GB", 8, 108, 64, 1.41, 2.039e12, 40 * 2**20, 164 * 2**10),
    "h100": Gpu("NVIDIA H100 80GB HBM3", 9, 132, 128, 1.98, 3.352e12, 50 * 2**20, 228 * 2**10),
    "h200": Gpu("NVIDIA H200", 9, 132, 128, 1.98, 4.8e12, 50 * 2**20, 228 * 2**10),
}
