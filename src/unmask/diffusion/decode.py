"""One pure denoising step: candidates, their confidence, and the decision which to commit and which tokens to edit.

Owns the candidates and LLaDA2.1's editing; the policy that chooses what to commit is an argument. Knows logits and numbers
only: no model, no cache, no global generator.

Legend: N queried positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from unmask.diffusion.draw import DrawOptions, draw
from unmask.diffusion.noise import NoiseKey
from unmask.diffusion.objectives import ban_mask

GREEDY_TEMPERATURE = 0.01
"""Up to here the most probable token is taken: a draw could only differ between logits that lie within the rounding of bfloat16
weights, and ties would be drawn where temperature 0 takes the lowest id."""
_LARGEST_TEMPERATURE = 1e30
"""Uniform in float32, in which larger ones are infinite."""


def is_greedy(params: DrawOptions) -> bool:
    """Whether the candidate is the most probable token, the lowest id on ties, whatever the seed."""
    return params.temperature <= GREEDY_TEMPERATURE or params.top_k == 1


def scaled_probabilities(logits_NV: Tensor, temperature: float) -> Tensor:
    """The distribution at a temperature, before filters; float32 [N, V], finite at every temperature."""
    return (logits_NV.float() / min(max(temperature, GREEDY_TEMPERATURE), _LARGEST_TEMPERATURE)).softmax(-1)


def greedy_candidates(logits_NV: Tensor) -> tuple[Tensor, Tensor]:
    """The likeliest token of every row (lowest id on ties) and its probability, by maximum and log-sum-exp.

    Returns:
        int64 [N] and float32 [N]. Any backend that has both numbers at hand need not write the logits.
    """
    logits_NV = logits_NV.float()
    best_N, token_N = logits_NV.max(-1)
    return token_N, (best_N - logits_NV.logsumexp(-1)).exp()


def candidates(
    logits_NV: Tensor,
    positions_N: Tensor,
    step: int | Tensor,
    params: DrawOptions,
    mask_id: int | None,
    *,
    sample: int | Tensor = 0,
    seed: int | Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """A token for every position and the model's confidence in it.

    Args:
        logits_NV: logits at the positions, any float dtype.
        positions_N: absolute int64 positions: with `step`, `sample` and the seed they key the draw, so that a result does
            not depend on what else is in the batch.
        step: denoising step within the block, or int64 [N].
        params: the argmax where they are greedy, else a draw by inverse distribution function.
        mask_id: never predicted; None for an autoregressive model.
        sample: which of several completions of one prompt, or int64 [N].
        seed: or int64 [N]; None: that of `params`.

    Returns:
        Tokens int64 [N] and float32 [N] confidences: the candidate's probability before temperature, top-k and top-p. Where
        all tokens are banned (-inf), token 0 and NaN.

    Departs: LLaDA2.0's code takes the probability under the scaled, filtered distribution. A low temperature, a small `top_k`
    or a small `top_p` push that to 1 whatever the model knows, so that a threshold accepts every guess. Unscaled, a threshold
    means the same at every temperature, and sampling that is nearly greedy takes the steps of greedy decoding. The other gate
    with that property, the smaller of the argmax's probability and the draw's relative to it, accepts the same draws at all
    thresholds above 0.62, those of the argmax; below, this one is the more careful.
    """
    logits_NV = ban_mask(logits_NV, mask_id)
    if is_greedy(params):
        return greedy_candidates(logits_NV)
    logits_NV = logits_NV.float()
    key = NoiseKey(params.seed if seed is None else seed, torch.zeros_like(positions_N) + sample)
    probabilities_NV = scaled_probabilities(logits_NV, params.temperature)
    if bool((is_banned_N := probabilities_NV[:, 0].isnan()).any()):
        probabilities_NV[is_banned_N] = torch.eye(1, logits_NV.shape[-1], device=logits_NV.device)
    token_N = draw(probabilities_NV, key.uniform("sample", positions_N, step), params)
    return token_N, (logits_NV.gather(1, token_N[:, None])[:, 0] - logits_NV.logsumexp(-1)).exp()


def entropies(logits_NV: Tensor, mask_id: int | None) -> Tensor:
    """Entropy of every row's distribution in nats, float32 [N], the mask token left out."""
    entropy_N: Tensor = torch.special.entr(ban_mask(logits_NV, mask_id).float().softmax(-1)).sum(-1)
    return entropy_N


@dataclass(frozen=True)
class Guess:
    """Candidates at the queried positions, in ascending order: token, its probability (the confidence, which temperature, top-k
    and top-p do not change), and, where the policy asks for it, the entropy in nats."""

    positions: Sequence[int]
    tokens: Sequence[int]
    confidences: Sequence[float]
    entropies: Sequence[float] | None = None

    def select(self, indices: Sequence[int]) -> Guess:
        """The candidates at these indices."""
        columns = (self.positions, self.tokens, self.confidences, self.entropies)
        return Guess(*(None if column is None else [column[i] for i in indices] for column in columns))  # type: ignore[arg-type]


@dataclass(frozen=True)
class Decision:
    """Tokens by position: masks that are filled, and decided tokens that are replaced."""

    commits: Mapping[int, int] = field(default_factory=dict)
    edits: Mapping[int, int] = field(default_factory=dict)


def decide(
    guess: Guess, decided: Mapping[int, int], choose: Callable[[Guess], Sequence[int]], edit_threshold: float | None
) -> Decision:
    """The pure step: what becomes of every queried position.

    Args:
        guess: the model's candidates.
        decided: token by position of the queried positions that hold one already and may be edited; all others are masked.
        choose: the policy: indices of the candidates to commit, among those of the masked positions.
        edit_threshold: 0 edits any change, None is off.

    Returns:
        Commits for masked positions and edits of decided ones.

    Source: LLaDA2.0 section 5; LLaDA2.1's token-to-token editing: in the same pass, every visible token whose candidate
    differs and is more confident than `edit_threshold` is replaced.
    """
    masked = guess.select([i for i, position in enumerate(guess.positions) if position not in decided])
    commits = {masked.positions[i]: masked.tokens[i] for i in choose(masked)}
    if edit_threshold is None:
        return Decision(commits)
    edits = {
        position: token
        for position, token, confidence in zip(guess.positions, guess.tokens, guess.confidences, strict=True)
        if position in decided and token != decided[position] and confidence > edit_threshold
    }
    return Decision(commits, edits)
