"""GPUs that plans are made for, and the shares of their peaks that a plan counts on.

Source: NVIDIA's data sheets of A100, H100, H200 (SXM) and of DGX A100 to B200: bfloat16 peaks without sparsity; NVLink
in one direction (half of the advertised sum); network as built into a DGX, one adapter of 200 (A100) or 400 Gb/s for each GPU.
Memory is what `nvidia-smi` reports.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from unmask.errors import ConfigError

GIB = 2**30
PER_NODE = 8
"""GPUs joined by NVLink."""


@dataclass(frozen=True)
class Gpu:
    """A GPU: memory in bytes, bfloat16 peak in FLOP/s, bandwidths in bytes/s (of NVLink and network in one direction).

    `devices`: what CUDA calls those with this peak.
    """

    name: str
    memory: float
    flops: float
    hbm: float
    nvlink: float
    network: float
    devices: tuple[str, ...]


@dataclass(frozen=True)
class Efficiency:
    """Shares of the peaks that are reached: assumptions, stated with every plan.

    Attributes:
        matrices: dense matrix products.
        experts: grouped products of routed experts.
        attention: attention under the block-diffusion mask.
        links: NVLink and network.
        hbm: memory, in the optimiser's update.
        memory: of the memory, what a run can fill; the rest is CUDA's, NCCL's, or lost between allocations.
    """

    matrices: float = 0.60
    experts: float = 0.40
    attention: float = 0.40
    links: float = 0.75
    hbm: float = 0.80
    memory: float = 0.92


GPUS: Mapping[str, Gpu] = MappingProxyType(
    {
        gpu.name: gpu
        for gpu in (
            Gpu("a100-40gb", 40.0 * GIB, 312e12, 1.555e12, 300e9, 25e9, ("NVIDIA A100-SXM4-40GB", "NVIDIA A100-PCIE-40GB")),
            Gpu("a100-80gb", 80.0 * GIB, 312e12, 2.039e12, 300e9, 25e9, ("NVIDIA A100-SXM4-80GB", "NVIDIA A100 80GB PCIe")),
            Gpu("h100-80gb", 79.6 * GIB, 989e12, 3.35e12, 450e9, 50e9, ("NVIDIA H100 80GB HBM3",)),
            Gpu("h200", 140.4 * GIB, 989e12, 4.8e12, 450e9, 50e9, ("NVIDIA H200",)),
            Gpu("b200", 179.1 * GIB, 2250e12, 8.0e12, 900e9, 50e9, ("NVIDIA B200",)),
        )
    }
)


def find_gpu(name: str) -> Gpu:
    """The GPU of this name (`h100` and `a100` alone: with 80 GB).

    Raises:
        ConfigError: no such GPU.
    """
    gpu = GPUS.get(name.lower()) or GPUS.get(f"{name.lower()}-80gb")
    if gpu is None:
        raise ConfigError(f"gpu is {name!r}; it must be one of {', '.join(GPUS)}")
    return gpu


def gpu_of_device(device: str) -> Gpu | None:
    """The GPU that CUDA calls so; None: its peak is not known here."""
    return next((gpu for gpu in GPUS.values() if device in gpu.devices), None)
