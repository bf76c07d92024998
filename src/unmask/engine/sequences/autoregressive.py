"""A sequence decoded autoregressively, one token per forward: the baseline, and how unconverted models run.

Owns its state between forwards. Its blocks are single tokens, so that it shares KV cache, scheduler and runner with the others.
"""

from __future__ import annotations

from unmask.engine.request import DecodingStep
from unmask.engine.sequences.base import DecodingSequence, ModelOutput, ScheduledSequence


class AutoregressiveSequence(DecodingSequence):
    """Next-token prediction: the hidden state of the last token answers for the position after it."""

    def _begin(self) -> None:
        self.tokens = [token for token in self.request.ids if token is not None]
        if forced := self._take_forced(len(self.tokens)):
            self.tokens += forced
            self._finish()

    @property
    def num_final(self) -> int:
        # The last token is always computed: its hidden state predicts.
        return len(self.tokens) - 1

    @property
    def reach(self) -> int:
        return len(self.tokens)

    def schedule(self, budget: int) -> ScheduledSequence | None:
        start, stop = self.committed, self.reach
        if stop - start > budget:
            return self._scheduled(start, start + budget) if budget > 0 else None
        allowed = {} if self.grammar is None else {0: self.grammar.allowed()}
        return self._scheduled(start, stop, (stop,), logits_positions=(stop - 1,), allowed=allowed)

    def apply(self, scheduled: ScheduledSequence, output: ModelOutput | None) -> None:
        self._count(scheduled)
        self.committed = scheduled.stop
        if output is None:
            return
        token, confidence = output.guess.tokens[0], output.guess.confidences[0]
        position = len(self.tokens)
        self.tokens.append(token)
        self._note_logprobs([position], output)
        if self.watched:
            self._report(DecodingStep(position, (False,), (token,), (token,), (confidence,), (True,), (False,), self.forwards))
        self._follow(token)
        self.tokens += self._take_forced(len(self.tokens))
        self._finish()
        self._check_grammar()

    def _finish(self) -> None:
        self._end(range(len(self.request.ids), len(self.tokens)))
