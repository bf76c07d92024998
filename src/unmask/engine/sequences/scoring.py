"""Sequences whose prompt is scored: log-probabilities of given tokens, teacher-forced, before anything is generated.

Owns which positions a forward queries and what the tokens before them look like. A request that also generates is decoded by
another sequence afterwards; the engine exchanges the two.
"""

from __future__ import annotations

from unmask.engine.request import Completion, TokenLogprob
from unmask.engine.sequences.base import DecodingSequence, ModelOutput, ScheduledSequence


class ScoringSequence(DecodingSequence):
    """Scores every prompt token but the first, which nothing predicts. The prefix cache gives no token that is still unscored.

    Attributes:
        next: the first position that has no score yet.
    """

    def _begin(self) -> None:
        self._ids = [token for token in self.request.ids if token is not None]
        self._scores: list[TokenLogprob | None] = [None]
        self.tokens = self._ids
        self._after_score()

    @property
    def next(self) -> int:
        return len(self._scores)

    def _take(self, scheduled: ScheduledSequence, output: ModelOutput | None) -> None:
        self._count(scheduled)
        if output is not None:
            self._scores += output.scores
            self._after_score()

    def _after_score(self) -> None:
        if self.next >= len(self._ids):
            self.prompt_logprobs = tuple(self._scores[: len(self._ids)])
            self.completion = Completion((), "length", self.forwards, costs=self._costs(), prompt_logprobs=self.prompt_logprobs)


class CausalScoringSequence(ScoringSequence):
    """Scores by next-token prediction, exactly: for autoregressive models, and for shifted ones as they verify drafts.

    A forward scores as many tokens as fit its budget: a prompt costs what its prefill does, and the vocabulary head.
    """

    @property
    def _lag(self) -> int:
        """How many positions before a token the row stands that predicts it; a shifted model's reads the token before."""
        return 0 if self._shifted else 1

    @property
    def num_final(self) -> int:
        return self.next - self._lag

    @property
    def reach(self) -> int:
        return len(self._ids) - self._lag

    @property
    def min_tokens(self) -> int:
        return 1

    def schedule(self, budget: int) -> ScheduledSequence | None:
        start, stop = self.committed, min(self.reach, self.committed + budget)
        if stop <= start:
            return None
        queries = tuple(range(max(self.next, start + self._lag), stop + self._lag))
        rows = tuple(position - self._lag for position in queries)
        causal_end = stop if self._shifted else 0
        return self._scheduled(
            start, stop, queries, logits_positions=rows, causal_end=causal_end, targets=tuple(self._ids[p] for p in queries)
        )

    def apply(self, scheduled: ScheduledSequence, output: ModelOutput | None) -> None:
        self.committed = scheduled.stop
        self._take(scheduled, output)


class BlockScoringSequence(ScoringSequence):
    """Scores by the chain rule from left to right, for block-diffusion models that are not shifted.

    The log-likelihood of a text is the sum over its tokens of `log p(x_i | x_<i, masks at i and after it up to the end of the
    block)`: the probability of decoding exactly this text with one token a step, the leftmost. It is a valid
    log-likelihood (the probabilities of all continuations sum to 1), of that order of decoding; the bound that
    `eval.likelihood` estimates averages over orders. It costs a forward of one block for every token.
    """

    def _begin(self) -> None:
        super()._begin()
        self._mask_rest()

    @property
    def block_size(self) -> int:
        return self.request.params.block_size

    @property
    def num_final(self) -> int:
        return self.next // self.block_size * self.block_size

    @property
    def reach(self) -> int:
        return self.num_final + self.block_size

    def schedule(self, budget: int) -> ScheduledSequence | None:
        start, stop = self.committed, self.reach
        if stop - start > budget:
            chunk = min(budget // self.block_size * self.block_size, self.num_final - start)
            return self._scheduled(start, start + chunk) if chunk > 0 else None
        return self._scheduled(start, stop, (self.next,), targets=(self._ids[self.next],))

    def apply(self, scheduled: ScheduledSequence, output: ModelOutput | None) -> None:
        self.committed = scheduled.stop if output is None else scheduled.stop - self.block_size
        self._take(scheduled, output)
        self._mask_rest()

    def _mask_rest(self) -> None:
        """The canvas: scored tokens, then masks up to the end of the block that is being scored."""
        assert self.mask_id is not None, "diffusion models have a mask token"
        self.tokens = self._ids[: self.next] + [self.mask_id] * (self.reach - self.next)
