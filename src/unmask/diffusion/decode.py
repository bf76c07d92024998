"""One pure denoising step: candidates, confidence, which positions to commit and which tokens to edit.

Owns the decision rules: LLaDA2.0's threshold, LLaDA2.1's editing, and two for comparison. Knows logits and numbers only: no
model, no cache, no global generator.

Legend: N queried positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from unmask.diffusion.noise import NoiseKey
from unmask.diffusion.objectives import ban_mask


class StepOptions(Protocol):
    """The decoding options that a step reads.

    `policy` chooses the tokens to commit: "threshold" (LLaDA2.0), "entropy" (positions of least entropy while the sum of all
    but the largest stays within `entropy_bound` nats) or "fixed" (the same number every step). With an `edit_threshold`, a
    step also replaces decided tokens (LLaDA2.1; 0 edits any change, None is off).
    """

    @property
    def block_size(self) -> int: ...
    @property
    def steps(self) -> int: ...
    @property
    def threshold(self) -> float: ...
    @property
    def policy(self) -> str: ...
    @property
    def entropy_bound(self) -> float: ...
    @property
    def edit_threshold(self) -> float | None: ...
    @property
    def temperature(self) -> float: ...
    @property
    def top_k(self) -> int | None: ...
    @property
    def top_p(self) -> float | None: ...
    @property
    def seed(self) -> int: ...


def step_quota(step: int, params: StepOptions) -> int:
    """How many positions step `step` (from 0) commits at least: block size over steps, the remainder in the first steps."""
    whole, remainder = divmod(params.block_size, params.steps)
    return whole + (1 if step < remainder else 0)


def filtered_probabilities(logits_NV: Tensor, params: StepOptions) -> Tensor:
    """Distribution that a draw uses: temperature, then top-k, then top-p; float32 [N, V].

    Ties at the top-k border keep every tied token; top-p keeps the smallest set whose mass reaches `top_p`, at least one.
    """
    logits_NV = logits_NV.float() / params.temperature
    if params.top_k is not None and params.top_k < logits_NV.shape[-1]:
        least = logits_NV.topk(params.top_k, dim=-1).values[:, -1:]
        logits_NV = logits_NV.masked_fill(logits_NV < least, float("-inf"))
    probabilities_NV = logits_NV.softmax(-1)
    if params.top_p is not None and params.top_p < 1.0:
        ordered, order = probabilities_NV.sort(dim=-1, descending=True, stable=True)
        before = ordered.cumsum(-1) - ordered
        drop = torch.zeros_like(before, dtype=torch.bool).scatter_(1, order, before >= params.top_p)
        probabilities_NV = probabilities_NV.masked_fill(drop, 0.0)
        probabilities_NV = probabilities_NV / probabilities_NV.sum(-1, keepdim=True)
    return probabilities_NV


def greedy_candidates(logits_NV: Tensor) -> tuple[Tensor, Tensor]:
    """The likeliest token of every row (lowest id on ties) and its probability, by maximum and log-sum-exp.

    Returns:
        int64 [N] and float32 [N]. Any backend that has both numbers at hand need not write the logits.
    """
    logits_NV = logits_NV.float()
    best_N, token_N = logits_NV.max(-1)
    return token_N, (best_N - logits_NV.logsumexp(-1)).exp()


def candidates(
    logits_NV: Tensor, positions_N: Tensor, step: int, params: StepOptions, mask_id: int | None, *, sample: int = 0
) -> tuple[Tensor, Tensor]:
    """A token for every position and the model's confidence in it.

    Args:
        logits_NV: logits at the positions, any float dtype.
        positions_N: absolute int64 positions: with `step`, `sample` and the seed they key the draw, so that a result does
            not depend on what else is in the batch.
        step: denoising step within the block.
        params: temperature 0 takes the argmax (lowest id on ties), else a draw by inverse distribution function.
        mask_id: never predicted; None for an autoregressive model.
        sample: which of several completions of one prompt.

    Returns:
        Tokens int64 [N] and float32 [N] confidences: the candidate's probability under the distribution it came from.
    """
    if mask_id is not None:
        logits_NV = ban_mask(logits_NV, mask_id)
    if params.temperature == 0.0:
        return greedy_candidates(logits_NV)
    probabilities_NV = filtered_probabilities(logits_NV, params)
    key = NoiseKey(params.seed, torch.full_like(positions_N, sample))
    u_N = key.uniform("sample", positions_N, step)
    cdf_NV = probabilities_NV.double().cumsum(-1)
    draw_N1 = (u_N * cdf_NV[:, -1])[:, None]
    token_N = torch.searchsorted(cdf_NV, draw_N1, right=True)[:, 0].clamp(max=cdf_NV.shape[-1] - 1)
    return token_N, probabilities_NV.gather(1, token_N[:, None])[:, 0]


def entropies(logits_NV: Tensor, mask_id: int | None) -> Tensor:
    """Entropy of every row's distribution in nats, float32 [N], the mask token left out."""
    if mask_id is not None:
        logits_NV = ban_mask(logits_NV, mask_id)
    entropy_N: Tensor = torch.special.entr(logits_NV.float().softmax(-1)).sum(-1)
    return entropy_N


@dataclass(frozen=True)
class Guess:
    """What a forward says of the queried positions, in ascending order: candidate, its confidence, and, where the policy
    asks for it, the entropy in nats."""

    positions: Sequence[int]
    tokens: Sequence[int]
    confidences: Sequence[float]
    entropies: Sequence[float] | None = None


@dataclass(frozen=True)
class Decision:
    """Tokens by position: masks that are filled, and decided tokens that are replaced."""

    commits: Mapping[int, int] = field(default_factory=dict)
    edits: Mapping[int, int] = field(default_factory=dict)


def accept(confidences: Sequence[float], threshold: float, quota: int) -> list[int]:
    """Which undecided positions to commit now.

    Every position whose confidence is *greater* than the threshold; if those are fewer than `quota`, the `quota` most
    confident instead, lowest position first on ties.

    Args:
        confidences: of the undecided positions, in ascending order of position.
        threshold: probability; 1.0 accepts nothing by confidence.
        quota: least number of commits (fewer when fewer are undecided).

    Returns:
        Ascending indices into `confidences`.

    Source: LLaDA2.0 section 5 (confidence-aware parallel decoding).
    """
    over = [i for i, confidence in enumerate(confidences) if confidence > threshold]
    if len(over) >= min(quota, len(confidences)):
        return over
    return sorted(sorted(range(len(confidences)), key=lambda i: -confidences[i])[:quota])


def accept_within_entropy(of_positions: Sequence[float], bound: float, quota: int) -> list[int]:
    """Positions of least entropy while the sum of all but the largest stays within `bound`; at least `quota`.

    Source: Ben-Hamu et al. (2505.24857), EB-sampler, Eq. 9 with the entropy as error proxy.
    """
    ranked = sorted(range(len(of_positions)), key=lambda i: of_positions[i])
    total, taken = 0.0, 0
    for i in ranked:
        # In ascending order the largest is the newest: the sum of all others is the sum before it.
        if total > bound:
            break
        total, taken = total + of_positions[i], taken + 1
    return sorted(ranked[: max(taken, quota)])


def decide(guess: Guess, decided: Mapping[int, int], step: int, params: StepOptions) -> Decision:
    """The pure step: what becomes of every queried position.

    Args:
        guess: the model's candidates.
        decided: token by position of the queried positions that hold one already and may be edited; all others are masked.
        step: denoising step within the block, from 0.
        params: policy and thresholds.

    Returns:
        Commits for masked positions and edits of decided ones.

    Source: LLaDA2.0 section 5; LLaDA2.1's token-to-token editing: in the same pass, every visible token whose candidate
    differs and is more confident than `edit_threshold` is replaced.
    """
    masked = [i for i, position in enumerate(guess.positions) if position not in decided]
    quota = step_quota(step, params)
    confidences = [guess.confidences[i] for i in masked]
    if params.policy == "entropy":
        assert guess.entropies is not None, "the entropy policy needs the entropies"
        chosen = accept_within_entropy([guess.entropies[i] for i in masked], params.entropy_bound, min(quota, len(masked)))
    else:
        chosen = accept(confidences, params.threshold if params.policy == "threshold" else 1.0, quota)
    commits = {guess.positions[masked[i]]: guess.tokens[masked[i]] for i in chosen}
    if params.edit_threshold is None:
        return Decision(commits)
    edits = {
        position: token
        for position, token, confidence in zip(guess.positions, guess.tokens, guess.confidences, strict=True)
        if position in decided and token != decided[position] and confidence > params.edit_threshold
    }
    return Decision(commits, edits)
