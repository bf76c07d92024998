"""What this machine can do at best, measured where it is used: the floors that forwards are compared with.

`floor = max(bytes of weights / read bandwidth, operations / rate)`; the rate is that of a large matrix product.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from unmask.models.config import ModelConfig


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


def seconds_of(work: Callable[[], Any], repeats: int = 7) -> list[float]:
    """Seconds of each run after one to warm up."""
    work()
    found = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        found.append(time.perf_counter() - started)
    return found


def bandwidth() -> float:
    """Bytes a second that all threads together read, from a tensor far larger than any cache."""
    big = torch.ones(2**28, dtype=torch.uint8).view(torch.int64)
    return 2**28 / min(seconds_of(lambda: big.sum()))


def float_rate(rows: int = 512) -> float:
    """Float32 operations a second of a large product."""
    a, b = torch.randn(rows, 2048), torch.randn(2048, 2048)
    return 2 * rows * 2048 * 2048 / min(seconds_of(lambda: a @ b))


def int8_rate(rows: int = 512) -> float:
    """Integer operations a second of a large 8-bit product: the library's."""
    a, b = (torch.randint(-127, 127, shape, dtype=torch.int8) for shape in ((rows, 2048), (2048, 2048)))
    return 2 * rows * 2048 * 2048 / min(seconds_of(lambda: torch._int_mm(a, b)))


def products(config: ModelConfig) -> int:
    """Weights of a dense model that every row is multiplied with, the vocabulary apart."""
    attention = config.hidden_size * (config.qkv_size + config.num_heads * config.head_dim)
    return config.num_layers * (attention + 3 * config.hidden_size * config.ffn_size)


def forward_floor(
    config: ModelConfig, rows: int, head_rows: int, *, bytes_per_weight: float, rate: float, bytes_per_second: float
) -> float:
    """Seconds that a forward of `rows` rows takes at least, `head_rows` of them through the vocabulary; attention is free."""
    head = config.vocab_size * config.hidden_size if head_rows else 0
    moved = (products(config) + head) * bytes_per_weight
    operations = 2 * (rows * products(config) + head_rows * head)
    return max(moved / bytes_per_second, operations / rate)


def spread(values: list[float]) -> str:
    """Median with the range."""
    return f"{statistics.median(values):.3g} ({min(values):.3g}-{max(values):.3g})"
