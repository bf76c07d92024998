"""A request that predicts the token behind the last one: the baseline, and the way unconverted models run.

Owns its state between forwards. Its blocks are single tokens, so that it shares cache, scheduler and runner.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from unmask.data.detokenizer import Decode
from unmask.engine.request import Request, Step
from unmask.engine.sequences.base import DecodingSequence, ModelOutput, ScheduledSequence
from unmask.engine.sequences.constrained import NOTHING_LEFT
from unmask.errors import RequestError


class AutoregressiveSequence(DecodingSequence):
    """Next-token prediction: one row a forward, whose hidden state answers for the position behind it."""

    block_size = 1

    def __init__(self, request: Request, number: int, cache_block_size: int, decode: Decode | None = None) -> None:
        super().__init__(request, number, None, cache_block_size, decode)
        self.tokens = [token for token in request.ids if token is not None]
        self._take_forced()
        if len(self.tokens) > len(request.ids):
            self._finish()

    @property
    def num_final(self) -> int:
        # The last token's row is always computed: its hidden state predicts.
        return len(self.tokens) - 1

    @property
    def reach(self) -> int:
        return len(self.tokens)

    def plan(self, budget: int) -> ScheduledSequence | None:
        start, stop = self.committed, self.reach
        if stop - start > budget:
            return ScheduledSequence(start, start + budget) if budget > 0 else None
        return ScheduledSequence(start, stop, (stop - 1,), (stop,))

    def adjusted(self, logits_NV: Tensor, positions: Sequence[int]) -> Tensor:
        """Also what the grammar does not allow: the queried position is always its frontier."""
        logits_NV = super().adjusted(logits_NV, positions)
        if self.grammar is not None:
            logits_NV.masked_fill_(~self.grammar.allowed().to(logits_NV.device), float("-inf"))
        return logits_NV

    def apply(self, plan: ScheduledSequence, answer: ModelOutput | None) -> None:
        self._count(plan)
        self.committed = plan.stop
        if answer is None:
            return
        token, confidence = answer.guess.tokens[0], answer.guess.confidences[0]
        if self.grammar is not None and not self.grammar.accepts(token):
            raise RequestError(NOTHING_LEFT)
        place = len(self.tokens)
        self.tokens.append(token)
        self.note_logprobs([place], answer.logits_NV, {place: 0})
        if self.watched:
            self._report(Step(place, (False,), (token,), (token,), (confidence,), (True,), (False,), self.forwards))
        if self.grammar is not None and token not in self.request.eos_ids:
            self.grammar.advance(token)
            self._take_forced()
        self._finish()

    def _finish(self) -> None:
        self._end(range(len(self.request.ids), len(self.tokens)), over=self.is_whole)

    def _take_forced(self) -> None:
        if self.grammar is None:
            return
        for token in self.grammar.forced():
            self.grammar.advance(token)
            self.tokens.append(token)
            self.note_logprobs([len(self.tokens) - 1], None, {})
