"""One pure denoising step: candidates, confidence, which positions to commit and which tokens to edit.

Owns the decision rules: LLaDA2.0's threshold, LLaDA2.1's editing, and two for comparison. Knows logits and numbers only: no
model, no cache, no global generator.

Legend: N queried positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from unmask.diffusion.noise import NoiseKey
from unmask.diffusion.objectives import ban_mask
from unmask.errors import RequestError

Policy = Literal["threshold", "entropy", "fixed"]
PRESETS: Mapping[str, Mapping[str, Any]] = {
    "speed": {"threshold": 0.5, "edit_threshold": 0.0, "max_post_steps": 16},
    "quality": {"threshold": 0.7, "edit_threshold": 0.5, "max_post_steps": 16},
}
"""LLaDA2.1's two modes. Source: LLaDA2.1 (2602.08676), decoding settings."""


@dataclass(frozen=True)
class DecodeRules:
    """Sampling and acceptance. Temperature 0 is argmax; `top_k` and `top_p` None are off.

    `policy` chooses what a step commits: "threshold" (LLaDA2.0), "entropy" (positions of least entropy while the sum of all
    but the largest stays within `entropy_bound` nats) or "fixed" (the same number every step). With an `edit_threshold`, a
    step also replaces decided tokens (LLaDA2.1; 0 edits any change, None is off), in the newest `window` blocks, and a block
    ends after a pass that edits nothing or after `max_post_steps` passes without masks. With `verify`, for shifted models, a
    block is a draft of one pass, and of it remains what decoding token by token would have said.

    Source: LLaDA2.0 section 5 defaults (block 32, threshold 0.95, 32 steps); entropy bound: Ben-Hamu et al. (2505.24857).
    """

    block_size: int = 32
    threshold: float = 0.95
    steps: int = 32
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0
    policy: Policy = "threshold"
    entropy_bound: float = 0.1
    edit_threshold: float | None = None
    max_post_steps: int = 16
    window: int = 1
    verify: bool = False

    def __post_init__(self) -> None:
        for name, value in (("block size", self.block_size), ("steps", self.steps), ("window", self.window)):
            if value < 1:
                raise RequestError(f"{name} is {value}; it must be at least 1")
        for name, share in (("threshold", self.threshold), ("edit_threshold", self.edit_threshold)):
            if share is not None and not 0.0 <= share <= 1.0:
                raise RequestError(f"{name} is {share}; a probability lies in [0, 1]")
        if not 0.0 <= self.temperature < float("inf"):
            raise RequestError(f"temperature is {self.temperature}; it must be 0 (argmax) or positive and finite")
        if self.top_k is not None and self.top_k < 1:
            raise RequestError(f"top_k is {self.top_k}; it must be at least 1, or left out")
        if self.top_p is not None and not 0.0 < self.top_p <= 1.0:
            raise RequestError(f"top_p is {self.top_p}; it must lie in (0, 1], or be left out")
        if self.policy not in get_args(Policy):
            raise RequestError(f"policy is {self.policy!r}; use one of {', '.join(get_args(Policy))}")
        if not self.entropy_bound >= 0.0:
            raise RequestError(f"entropy_bound is {self.entropy_bound}; it must be at least 0 nats")
        if self.max_post_steps < 0:
            raise RequestError(f"max_post_steps is {self.max_post_steps}; it must be at least 0")
        if self.window > 1 and self.edit_threshold is None:
            raise RequestError(f"window is {self.window} without an edit_threshold; only edits reach back into older blocks")
        if self.verify and (self.policy != "threshold" or self.editing):
            raise RequestError("verify checks what a threshold lets pass: leave policy, preset and edit_threshold out")

    @property
    def editing(self) -> bool:
        """Whether decided tokens may still be replaced."""
        return self.edit_threshold is not None


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


def greedy_candidates(logits_NV: Tensor) -> tuple[Tensor, Tensor]:
    """The likeliest token of every row (lowest id on ties) and its probability, by maximum and log-sum-exp.

    Returns:
        int64 [N] and float32 [N]. Any backend that has both numbers at hand need not write the logits.
    """
    logits_NV = logits_NV.float()
    best_N, token_N = logits_NV.max(-1)
    return token_N, (best_N - logits_NV.logsumexp(-1)).exp()


def candidates(
    logits_NV: Tensor, positions_N: Tensor, step: int, rules: DecodeRules, mask_id: int | None, *, sample: int = 0
) -> tuple[Tensor, Tensor]:
    """A token for every position and the model's confidence in it.

    Args:
        logits_NV: logits at the positions, any float dtype.
        positions_N: absolute int64 positions: with `step`, `sample` and the seed they key the draw, so that a result does
            not depend on what else is in the batch.
        step: denoising step within the block.
        rules: temperature 0 takes the argmax (lowest id on ties), else a draw by inverse distribution function.
        mask_id: never predicted; None for an autoregressive model.
        sample: which of several completions of one prompt.

    Returns:
        Tokens int64 [N] and float32 [N] confidences: the candidate's probability under the distribution it came from.
    """
    if mask_id is not None:
        logits_NV = ban_mask(logits_NV, mask_id)
    if rules.temperature == 0.0:
        return greedy_candidates(logits_NV)
    probabilities_NV = filtered_probabilities(logits_NV, rules)
    key = NoiseKey(rules.seed, torch.full_like(positions_N, sample))
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


def decide(guess: Guess, decided: Mapping[int, int], step: int, rules: DecodeRules) -> Decision:
    """The pure step: what becomes of every queried position.

    Args:
        guess: the model's candidates.
        decided: token by position of the queried positions that hold one already and may be edited; all others are masked.
        step: denoising step within the block, from 0.
        rules: policy and thresholds.

    Returns:
        Commits for masked positions and edits of decided ones.

    Source: LLaDA2.0 section 5; LLaDA2.1's token-to-token editing: in the same pass, every visible token whose candidate
    differs and is more confident than `edit_threshold` is replaced.
    """
    masked = [i for i, position in enumerate(guess.positions) if position not in decided]
    quota = step_quota(step, rules)
    confidences = [guess.confidences[i] for i in masked]
    if rules.policy == "entropy":
        assert guess.entropies is not None, "the entropy policy needs the entropies"
        chosen = accept_within_entropy([guess.entropies[i] for i in masked], rules.entropy_bound, min(quota, len(masked)))
    else:
        chosen = accept(confidences, rules.threshold if rules.policy == "threshold" else 1.0, quota)
    commits = {guess.positions[masked[i]]: guess.tokens[masked[i]] for i in chosen}
    if rules.edit_threshold is None:
        return Decision(commits)
    edits = {
        position: token
        for position, token, confidence in zip(guess.positions, guess.tokens, guess.confidences, strict=True)
        if position in decided and token != decided[position] and confidence > rules.edit_threshold
    }
    return Decision(commits, edits)
