"""Speed and memory of a training step, as they are logged."""

from __future__ import annotations

import resource
import sys

import torch

GIB = 2**30


def speed_figures(num_tokens: int, seconds: float, num_devices: int) -> dict[str, float]:
    """`seconds`, `tokens_per_second`, `tokens_per_second_per_device`, and `memory_gib`, the peak of this process's device."""
    rate = num_tokens / seconds
    return {
        "seconds": seconds,
        "tokens_per_second": rate,
        "tokens_per_second_per_device": rate / num_devices,
        "memory_gib": _peak_memory() / GIB,
    }


def _peak_memory() -> int:
    """Bytes: of the GPU where there is one in use, else of the process."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
