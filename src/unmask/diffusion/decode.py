"""One pure denoising step: candidates, confidence, which positions to commit.

Owns the decision rule of LLaDA2.0. Knows logits and booleans only: no model, no cache, no global generator.

Legend: N positions of the block, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from unmask.diffusion.noise import NoiseKey
from unmask.diffusion.objectives import ban_mask
from unmask.errors import RequestError


@dataclass(frozen=True)
class DecodeRules:
    """Sampling and acceptance. Temperature 0 is argmax; `top_k` and `top_p` None are off.

    Source: LLaDA2.0 section 5 defaults (block 32, threshold 0.95, 32 steps).
    """

    block_size: int = 32
    threshold: float = 0.95
    steps: int = 32
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.block_size < 1:
            raise RequestError(f"block size is {self.block_size}; it must be at least 1")
        if self.steps < 1:
            raise RequestError(f"steps is {self.steps}; a block needs at least 1")
        if not 0.0 <= self.threshold <= 1.0:
            raise RequestError(f"threshold is {self.threshold}; a probability lies in [0, 1]")
        if not 0.0 <= self.temperature < float("inf"):
            raise RequestError(f"temperature is {self.temperature}; it must be 0 (argmax) or positive and finite")
        if self.top_k is not None and self.top_k < 1:
            raise RequestError(f"top_k is {self.top_k}; it must be at least 1, or left out")
        if self.top_p is not None and not 0.0 < self.top_p <= 1.0:
            raise RequestError(f"top_p is {self.top_p}; it must lie in (0, 1], or be left out")


def step_quota(step: int, rules: DecodeRules) -> int:
    """How many positions step `step` (from 0) commits at least: block size over steps, the remainder in the first steps."""
    whole, remainder = divmod(rules.block_size, rules.steps)
    return whole + (1 if step < remainder else 0)


def filtered_probabilities(logits_NV: Tensor, rules: DecodeRules) -> Tensor:
    """Distribution that a draw uses: temperature, then top-k, then top-p; float32 [N, V].

    Ties at the top-k border keep every tied token; top-p keeps the smallest set whose mass reaches `top_p`, at least one.
    """
    logits_NV = logits_NV.float() / rules.temperature
    if rules.top_k is not None and rules.top_k < logits_NV.shape[-1]:
        least = logits_NV.topk(rules.top_k, dim=-1).values[:, -1:]
        logits_NV = logits_NV.masked_fill(logits_NV < least, float("-inf"))
    probabilities_NV = logits_NV.softmax(-1)
    if rules.top_p is not None and rules.top_p < 1.0:
        ordered, order = probabilities_NV.sort(dim=-1, descending=True, stable=True)
        before = ordered.cumsum(-1) - ordered
        drop = torch.zeros_like(before, dtype=torch.bool).scatter_(1, order, before >= rules.top_p)
        probabilities_NV = probabilities_NV.masked_fill(drop, 0.0)
        probabilities_NV = probabilities_NV / probabilities_NV.sum(-1, keepdim=True)
    return probabilities_NV


def candidates(
    logits_NV: Tensor, positions_N: Tensor, step: int, rules: DecodeRules, mask_id: int | None
) -> tuple[Tensor, Tensor]:
    """A token for every position and the model's confidence in it.

    Args:
        logits_NV: logits at the positions, any float dtype.
        positions_N: absolute int64 positions: with `step` and the seed they key the draw, so that a result does not
            depend on what else is in the batch.
        step: denoising step within the block.
        rules: temperature 0 takes the argmax (lowest id on ties), else a draw by inverse distribution function.
        mask_id: never predicted; None for an autoregressive model.

    Returns:
        Tokens int64 [N] and float32 [N] confidences: the candidate's probability under the distribution it came from.
    """
    if mask_id is not None:
        logits_NV = ban_mask(logits_NV, mask_id)
    if rules.temperature == 0.0:
        token_N = logits_NV.argmax(-1)
        probabilities_NV = logits_NV.float().softmax(-1)
    else:
        probabilities_NV = filtered_probabilities(logits_NV, rules)
        key = NoiseKey(rules.seed, torch.zeros_like(positions_N))
        u_N = key.uniform("sample", positions_N, step)
        cdf_NV = probabilities_NV.double().cumsum(-1)
        draw_N1 = (u_N * cdf_NV[:, -1])[:, None]
        token_N = torch.searchsorted(cdf_NV, draw_N1, right=True)[:, 0].clamp(max=cdf_NV.shape[-1] - 1)
    return token_N, probabilities_NV.gather(1, token_N[:, None])[:, 0]


def accept(confidence_N: Tensor, undecided_N: Tensor, threshold: float, quota: int) -> Tensor:
    """Which undecided positions to commit now.

    Every position whose confidence is *greater* than the threshold; if those are fewer than `quota`, the `quota` most
    confident instead, lowest position first on ties.

    Args:
        confidence_N: float32 confidences, positions in ascending order.
        undecided_N: True where still masked.
        threshold: probability; 1.0 accepts nothing by confidence.
        quota: least number of commits (fewer when fewer are undecided).

    Returns:
        Bool [N], a subset of `undecided_N`.

    Source: LLaDA2.0 section 5 (confidence-aware parallel decoding).
    """
    over_N = undecided_N & (confidence_N > threshold)
    quota = min(quota, int(undecided_N.sum()))
    if int(over_N.sum()) >= quota:
        return over_N
    ranked = confidence_N.masked_fill(~undecided_N, -1.0).argsort(descending=True, stable=True)
    chosen_N = torch.zeros_like(undecided_N)
    chosen_N[ranked[:quota]] = True
    return chosen_N
