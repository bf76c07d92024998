"""Noise schedule: mask rates and their weights.

Owns the linear schedule, the mask-rate bandwidth and the sampling of t. Knows tensors only; randomness is an argument.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from unmask.diffusion.noise import GOLDEN, PLASTIC, NoiseKey, to_unit
from unmask.errors import ConfigError


def elbo_weight(t: Tensor) -> Tensor:
    """`w(t) = -alpha'_t / (1 - alpha_t) = 1 / t`; `alpha_t = 1 - t` (linear schedule) is the share of visible tokens.

    Source: LLaDA2.0 Eq. 1. Departs: the report prints the opposite sign; read literally, training would maximise the loss.
    """
    return 1.0 / t


@dataclass(frozen=True)
class Bandwidth:
    """The interval t is drawn from: (0, 1] for pre-training, narrower for fine-tuning (LLaDA2.0: 0.3-0.8)."""

    low: float = 0.0
    high: float = 1.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.low < self.high <= 1.0:
            raise ConfigError(f"mask-rate bandwidth [{self.low}, {self.high}] must satisfy 0 <= low < high <= 1")

    def scale(self, unit: Tensor) -> Tensor:
        """Map numbers in [0, 1) to rates in (low, high]: t = 0, which masks nothing, never occurs."""
        return self.high - unit * (self.high - self.low)


def stratified_t(key: NoiseKey, document: Tensor, block: Tensor, bandwidth: Bandwidth, *, turn: float = 0.0) -> Tensor:
    """One mask rate per block, spread evenly over the bandwidth across the blocks of a batch.

    A Weyl sequence: `frac(u(seed, epoch) + document * g1 + block * g2)` with irrational steps. Each rate is uniform over
    the seed; consecutive documents and blocks cover the interval with low discrepancy. It depends on (seed, document,
    epoch, block) only, so any split of the batch over ranks and micro-batches draws the same rates.

    Args:
        key: seed and epoch, tensors broadcastable to `document`.
        document: int64 document ids (consecutive in the data order).
        block: int64 block numbers within the document.
        bandwidth: interval of the rates.
        turn: share of the interval, in [0, 1), by which every rate is rotated: j / n for sample j of n covers it evenly.

    Returns:
        float32 rates in (low, high].

    Source: LLaDA2.0 section 3; BD3-LM's stratified sampler.
    Departs: strata come from a Weyl sequence instead of sorting the batch.
    """
    state = key.scalar("t") + document * GOLDEN + block * PLASTIC
    return bandwidth.scale((to_unit(state) + turn) % 1.0).to(torch.float32)
