"""What this machine can do at best, measured where it is used: the floors that forwards are compared with.

`floor = max(bytes of weights / read bandwidth, operations / rate)`; the rate is that of a large matrix product.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from unmask.models.arch.config import ModelConfig
from unmask.models.native.library import load_kernels
from unmask.models.native.linear import PackedLinear
from unmask.models.native.packing import pack_matrix
from unmask.models.native.quantize import matrix_bytes
from unmask.models.native.sizes import matrix_sizes


def machine() -> dict[str, Any]:
    """What figures were measured on."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    flags = next((line for line in lines if line.startswith("flags")), "")
    return {
        "cpu": model, "amx_bf16": "amx_bf16" in flags, "avx512_vnni": "avx512_vnni" in flags,
        "threads": torch.get_num_threads(), "torch": torch.__version__, "python": platform.python_version(),
    }  # fmt: skip


def seconds_of(work: Callable[[], Any], repeats: int = 7, *, warm: bool = True) -> list[float]:
    """Seconds of each run, after one to warm up."""
    if warm:
        work()
    found = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        found.append(time.perf_counter() - started)
    return found


Probe = tuple[Callable[[], Any], int]


def probes(rows: int = 512, size: int = 2048, read_bytes: int = 2**28) -> dict[str, Probe]:
    """Works that show what the machine can do, and how many bytes or operations each is: reading a tensor far larger than
    any cache, and large products in float32 and in 8 bits (the library's and ours)."""
    big = torch.ones(read_bytes, dtype=torch.uint8).view(torch.int64)
    a, b = torch.randn(rows, size), torch.randn(size, size)
    a8, b8 = (torch.randint(-127, 127, shape, dtype=torch.int8) for shape in ((rows, size), (size, size)))
    packed = PackedLinear(pack_matrix(b, 8), load_kernels())
    operations = 2 * rows * size * size
    return {
        "read": (lambda: big.sum(), read_bytes),
        "float32": (lambda: a @ b, operations),
        "int8": (lambda: torch._int_mm(a8, b8), operations),
        "int8, ours": (lambda: packed(a), operations),
    }


class Machine:
    """The floors. `measure` anew beside each thing that is compared: the speed of a shared machine changes by the minute."""

    def __init__(self, *, smoke: bool = False) -> None:
        self._probes = probes(32, 64, 2**16) if smoke else probes()
        (library,), (ours,) = (seconds_of(self._probes[name][0], 1, warm=False) for name in ("int8", "int8, ours"))
        if library > ours:  # without VNNI by far: seconds each time
            del self._probes["int8"]
        self.bytes_per_second, self.rates = 0.0, {"float32": 0.0, "int8": 0.0}
        self.measure(7)

    def measure(self, repeats: int = 1) -> None:
        """What the machine can do now, the best of `repeats`."""
        rates = {}
        for name, (work, amount) in self._probes.items():
            rates[name] = amount / min(seconds_of(work, repeats, warm=False))
        self.bytes_per_second = rates["read"]
        self.rates = {"float32": rates["float32"], "int8": max(rates[name] for name in rates if name.startswith("int8"))}

    def floor(self, config: ModelConfig, weights: str, rows: int, head_rows: int) -> float:
        """Seconds that a forward of a dense model takes at least, `rows` rows of which `head_rows` pass the vocabulary;
        attention and gated LoRA are free."""
        moved, operations, bits = 0, 0, {"float32": 32, "bfloat16": 16, "int8": 8, "int4": 4}[weights]
        for name, (outputs, inputs) in matrix_sizes(config).items():
            count = head_rows if name == "head" else rows if name.endswith(".base") else 0
            operations += 2 * count * outputs * inputs
            if count:
                moved += matrix_bytes(outputs, inputs, max(bits, 8) if name == "head" else bits)
        rate = self.rates["int8" if weights.startswith("int") else "float32"]
        return max(moved / self.bytes_per_second, operations / rate)
