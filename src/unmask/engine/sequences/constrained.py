"""A sequence decoded by block diffusion under a grammar: exact at the frontier, provisional to the right of it.

Owns how a denoised block and a grammar that reads from left to right meet. The grammar itself is `engine.grammar`.

The *frontier* is the first position that the grammar has not checked. Its distribution is known exactly (what stands to its
left is final), so the candidate there is the likeliest *allowed* token, and its confidence its probability among the
allowed ones. Tokens accepted further right help the model as context; when the frontier reaches one that the grammar does
not allow, it is masked again. What is left of the frontier is always a valid prefix.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from unmask.diffusion.decode import Decision, candidates
from unmask.engine.policies import accept
from unmask.engine.sequences.base import ModelOutput
from unmask.engine.sequences.block_diffusion import BlockDiffusionSequence

if TYPE_CHECKING:
    from unmask.engine.grammar import GrammarState


class ConstrainedSequence(BlockDiffusionSequence):
    """Block diffusion whose text is a sentence of a grammar. Blocks that the grammar fills alone need no forward."""

    grammar: GrammarState

    def _begin(self) -> None:
        super()._begin()
        self._frontier = self._to_decide[0]
        if self._complete_forced() and self.completion is None:
            self._next_block()

    def _decide(self, output: ModelOutput) -> Decision:
        """One denoising step.

        At least one token is settled: the frontier is masked when a forward begins, because a step ends by checking what is
        there.
        """
        return Decision(self._advance(output) | self._fill_right(output))

    def _advance(self, output: ModelOutput) -> dict[int, int]:
        """Settle tokens at the frontier, the first one whatever its confidence."""
        assert output.processed_NV is not None
        row_of = {position: i for i, position in enumerate(output.guess.positions)}
        commits: dict[int, int] = {}
        while self._frontier < self.reach and not self.grammar.finished:
            position = self._frontier
            if not self.undecided[position]:
                if self.grammar.accepts(self.tokens[position]):
                    self._settle(self.tokens[position])
                    continue
                assert self.mask_id is not None
                self.tokens[position], self.undecided[position] = self.mask_id, True
            if position not in row_of:
                break
            token, confidence = self._candidate(output.processed_NV[row_of[position]], position)
            if commits and not confidence > self.request.params.threshold:
                break
            self._settle(token, confidence)
            self._fill_forced()
            commits |= {p: self.tokens[p] for p in range(position, self._frontier)}
        return commits

    def _candidate(self, processed_V: Tensor, position: int) -> tuple[int, float]:
        """The token at the frontier and its confidence, among those that the grammar allows."""
        request = self.request
        allowed_1V = processed_V.masked_fill(~self.grammar.allowed().to(processed_V.device), float("-inf"))[None]
        position_1 = torch.tensor([position], device=allowed_1V.device)
        token_1, confidence_1 = candidates(
            allowed_1V, position_1, self.step, request.params, None, sample=request.sample, seed=request.noise_seed
        )
        return int(token_1), float(confidence_1)

    def _fill_right(self, output: ModelOutput) -> dict[int, int]:
        """Provisional tokens to the right of the frontier, those whose confidence is above the threshold."""
        guess, commits = output.guess, dict[int, int]()
        right = [i for i, p in enumerate(guess.positions) if p > self._frontier and self.undecided[p]]
        for i in accept([guess.confidences[i] for i in right], self.request.params.threshold, 0):
            position = guess.positions[right[i]]
            self.tokens[position], self.undecided[position] = guess.tokens[right[i]], False
            commits[position] = guess.tokens[right[i]]
        return commits

    def _settle(self, token: int, confidence: float = 1.0) -> None:
        """`token` stands at the frontier for good."""
        self._follow(token, confidence)
        self._place([token])

    def _place(self, tokens: Sequence[int]) -> None:
        """Put tokens that the grammar has checked at the frontier, over anything provisional, and move it behind them."""
        start, self._frontier = self._frontier, self._frontier + len(tokens)
        self.tokens[start : self._frontier] = tokens
        self.undecided[start : self._frontier] = [False] * len(tokens)

    def _fill_forced(self) -> None:
        """Fill in, within the block, what the grammar leaves no choice about."""
        while self._frontier < self.reach and (forced := self._take_forced(self._frontier, self.reach - self._frontier)):
            self._place(forced)

    def _complete_forced(self) -> bool:
        """Fill in what the grammar leaves no choice about; whether that completes the block."""
        self._fill_forced()
        complete = self._frontier == self.reach or self.is_whole
        if complete:
            self._end(self._final_positions(True))
        return complete

    def _is_done(self, had_masks: bool, decision: Decision) -> bool:
        return self._frontier >= self.reach and super()._is_done(had_masks, decision)

    def _final_positions(self, done: bool) -> list[int]:
        return self._to_decide[: bisect_left(self._to_decide, self._frontier)]

    def _next_block(self) -> None:
        super()._next_block()
        while self._complete_forced() and self.completion is None:
            super()._next_block()
