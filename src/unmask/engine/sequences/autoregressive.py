"""A sequence decoded autoregressively, one token per forward: the baseline, and how unconverted models run.

Owns its state between forwards. Its blocks are single tokens, so that it shares KV cache, scheduler and runner with the others.
"""

from __future__ import annotations

from unmask.data.detokenizer import Decode
from unmask.engine.request import Request, Step
from unmask.engine.sequences.base import NOTHING_LEFT, DecodingSequence, ModelOutput, ScheduledSequence
from unmask.errors import RequestError


class AutoregressiveSequence(DecodingSequence):
    """Next-token prediction: the hidden state of the last token answers for the position after it."""

    block_size = 1

    def __init__(self, request: Request, number: int, cache_block_size: int, decode: Decode | None = None) -> None:
        super().__init__(request, number, None, cache_block_size, decode)
        self.tokens = [token for token in request.ids if token is not None]
        self._take_forced()
        if len(self.tokens) > len(request.ids):
            self._finish()

    @property
    def num_final(self) -> int:
        # The last token is always computed: its hidden state predicts.
        return len(self.tokens) - 1

    @property
    def reach(self) -> int:
        return len(self.tokens)

    def plan(self, budget: int) -> ScheduledSequence | None:
        start, stop = self.committed, self.reach
        if stop - start > budget:
            return self._scheduled(start, start + budget) if budget > 0 else None
        allowed = {} if self.grammar is None else {0: self.grammar.allowed()}
        return self._scheduled(start, stop, (stop - 1,), (stop,), allowed=allowed)

    def apply(self, scheduled: ScheduledSequence, output: ModelOutput | None) -> None:
        self._count(scheduled)
        self.committed = scheduled.stop
        if output is None:
            return
        token, confidence = output.guess.tokens[0], output.guess.confidences[0]
        if self.grammar is not None and not self.grammar.accepts(token):
            raise RequestError(NOTHING_LEFT)
        position = len(self.tokens)
        self.tokens.append(token)
        self.note_logprobs([position], output.logits_NV, {position: 0})
        if self.watched:
            self._report(Step(position, (False,), (token,), (token,), (confidence,), (True,), (False,), self.forwards))
        if self.grammar is not None and token not in self.request.eos_ids:
            self.grammar.advance(token)
            self._take_forced()
        self._finish()
        self._check_grammar()

    def _finish(self) -> None:
        self._end(range(len(self.request.ids), len(self.tokens)), over=self.is_whole)

    def _take_forced(self) -> None:
        """Decide what the grammar leaves no choice about."""
        if self.grammar is None:
            return
        for token in self.grammar.forced():
            self.grammar.advance(token)
            self.tokens.append(token)
            self.note_logprobs([len(self.tokens) - 1], None, {})
