"""Speed, utilisation and memory of a training step, as they are logged."""

from __future__ import annotations

import resource
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from unmask.errors import ConfigError
from unmask.models.arch.config import ModelConfig
from unmask.train.plan.gpus import GIB, Gpu, gpu_of_device
from unmask.train.plan.work import as_trained, mean_row, model_flops, phase_works, trained_of
from unmask.train.recipe import Recipe


def speed_figures(num_tokens: int, seconds: float, peaks: Sequence[int]) -> dict[str, float]:
    """`seconds`, `tokens_per_second`, `tokens_per_second_per_device`, and `memory_gib`, the highest of the ranks' peaks."""
    rate = num_tokens / seconds
    return {
        "seconds": seconds,
        "tokens_per_second": rate,
        "tokens_per_second_per_device": rate / len(peaks),
        "memory_gib": max(peaks) / GIB,
    }


@dataclass(frozen=True)
class Utilisation:
    """Model FLOP utilisation (MFU): what the rows of a step need, over what all devices could compute in its time.

    Nothing that is computed twice counts. A document is taken to fill its row: shorter ones need less attention.

    Attributes:
        step_flops: FLOP of a step in each phase of the run.
        peak: FLOP/s of all devices, in bfloat16.
    """

    step_flops: tuple[float, ...]
    peak: float

    @classmethod
    def of_run(cls, recipe: Recipe, config: ModelConfig, gpu: Gpu | None, num_devices: int) -> Utilisation | None:
        """That of a run; None where the peak or the FLOP are not known: other devices, joint training with alignment."""
        if gpu is None:
            return None
        recipe = as_trained(recipe, config)
        try:
            rows = [mean_row(kinds) for kinds in phase_works(recipe)]
        except ConfigError:
            return None
        trained, batch_rows = trained_of(recipe), recipe.train.batch_rows
        return cls(tuple(model_flops(config, row, batch_rows, trained) for row in rows), gpu.flops * num_devices)

    def mfu(self, phase_index: int, seconds: float) -> float:
        """MFU of a step in this phase."""
        return self.step_flops[phase_index] / seconds / self.peak


def gpu_of(device: torch.device) -> Gpu | None:
    """The GPU that a device is; None: a CPU, or a GPU whose peak is not known."""
    return gpu_of_device(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def peak_memory() -> int:
    """Bytes: of the GPU where there is one in use, else of the process."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
