"""A request whose drafts are checked: the text of autoregressive decoding, several tokens in a forward.

Owns its state between forwards. A shifted model's causal rows predict exactly what its weights would, decoding token by token;
its masked rows guess what comes behind. What a forward guesses, the next one checks.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile

from torch import Tensor

from unmask.data.detokenizer import Decode
from unmask.diffusion.decode import Decision
from unmask.engine.request import Request, Step
from unmask.engine.sequences.base import DecodingSequence, ModelOutput, ScheduledSequence
from unmask.engine.sequences.constrained import NOTHING_LEFT
from unmask.errors import RequestError

_EVERYTHING = 2**40
"""A block size whose first block holds all positions."""


class SpeculativeSequence(DecodingSequence):
    """Drafts a block in one pass and keeps of it what the next pass, causal, would have said itself.

    Rows of a forward, with `v` tokens decided and `d` drafted: the causal ones up to position v + d decide one token more than
    there are drafts that hold; the open ones behind, at most a block with the last causal row, draft on. Drafts after one that
    does not hold are forgotten, and so is what was guessed behind them. A draft is made only where the guess and all those
    before it are more probable than the threshold: a wrong one costs the forward's other guesses. Where nothing is, the next
    forward has half as many open rows, down to one: text that cannot be drafted costs little more than decoding it token by
    token.

    A drawn token depends on the logits, the seed and the position, so that sampling is checked like the rest: a draft holds if
    it is what the causal row draws. A grammar rules out what the causal rows may say, and adds what it leaves no choice about.

    Source: speculative decoding (2211.17192) with a model that drafts for itself, as in TiDAR (2511.08923).
    """

    block_size = 1

    def __init__(
        self, request: Request, number: int, mask_id: int, cache_block_size: int, decode: Decode | None = None
    ) -> None:
        super().__init__(request, number, mask_id, cache_block_size, decode)
        given = [token for token in request.ids if token is not None]
        self.tokens = given + [mask_id] * request.params.max_new_tokens
        self._num_decided, self._num_drafted = len(given), 0
        self._num_open = request.params.block_size - 1
        if self._take_forced():
            self._finish()

    @property
    def mask_block_size(self) -> int:
        return _EVERYTHING

    @property
    def num_final(self) -> int:
        return self._num_decided

    @property
    def _causal_end(self) -> int:
        """Rows below it are causal: one for each draft, and one more."""
        return min(self._num_decided + self._num_drafted + 1, len(self.tokens))

    @property
    def reach(self) -> int:
        if self.request.eos_ids.intersection(self.tokens[self._num_decided : self._causal_end]):
            return self._causal_end  # what is drafted ends there
        return min(self._causal_end + self._num_open, len(self.tokens))

    def plan(self, budget: int) -> ScheduledSequence | None:
        start, causal_end = self.committed, self._causal_end
        if causal_end - start > budget:
            chunk = min(budget, self._num_decided - start)
            return ScheduledSequence(start, start + chunk, causal_end=causal_end) if chunk > 0 else None
        queries = tuple(range(self._num_decided, min(self.reach, start + budget)))
        return ScheduledSequence(start, queries[-1] + 1, queries, queries, causal_end)

    def adjusted(self, logits_NV: Tensor, positions: Sequence[int]) -> Tensor:
        """Also what the grammar does not allow where the text is decided; guesses are free."""
        logits_NV = super().adjusted(logits_NV, positions)
        if self.grammar is None:
            return logits_NV
        state = self.grammar.copy()
        for row, position in enumerate(positions[: self._num_drafted + 1]):
            logits_NV[row].masked_fill_(~state.allowed().to(logits_NV.device), float("-inf"))
            token = self.tokens[position]
            if row == self._num_drafted or token in self.request.eos_ids or not state.accepts(token):
                break  # a draft that is not allowed does not hold
            state.advance(token)
        return logits_NV

    def apply(self, plan: ScheduledSequence, answer: ModelOutput | None) -> None:
        self._count(plan)
        if answer is None:
            self.committed = plan.stop
            return
        causal_end, guess = plan.causal_end, answer.guess
        says = dict(zip(guess.positions, guess.tokens, strict=True))
        held = len(list(takewhile(lambda p: self.tokens[p] == says[p], range(self._num_decided, causal_end - 1))))
        known = self._num_decided + held
        self.committed = known + 1
        self._edits += self.tokens[known] not in (self.mask_id, says[known])
        kept = range(causal_end, plan.stop) if known + 1 == causal_end else range(0)
        sure = dict(zip(guess.positions, guess.confidences, strict=True))
        drafts = [says[p] for p in takewhile(lambda p: sure[p] > self.request.params.threshold, kept)]
        if kept:
            self._num_open = self.request.params.block_size - 1 if drafts else max(1, self._num_open // 2)
        self._write(known, [says[known], *drafts])
        self._decide(known + 1)
        self._tell(plan, answer)
        self._finish()

    def _write(self, start: int, tokens: Sequence[int]) -> None:
        """These tokens from `start` on, and nothing behind them."""
        assert self.mask_id is not None
        room = len(self.tokens) - start
        known = tokens[:room]
        self.tokens[start:] = [*known, *[self.mask_id] * (room - len(known))]
        self._num_drafted = start + len(known) - self._num_decided

    def _decide(self, stop: int) -> None:
        """Everything below `stop` is decided, and what a grammar adds to it; drafts behind stay as far as they agree."""
        new = self.tokens[self._num_decided : stop]
        self._num_drafted -= stop - self._num_decided
        self._num_decided = stop
        if self.grammar is None:
            return
        for token in new:
            if not self.grammar.accepts(token):
                raise RequestError(NOTHING_LEFT)
            if token in self.request.eos_ids:
                return
            self.grammar.advance(token)
        self._take_forced()

    def _take_forced(self) -> bool:
        """Decide what the grammar leaves no choice about; whether there was anything."""
        forced = [] if self.grammar is None else self.grammar.forced()[: len(self.tokens) - self._num_decided]
        if not forced:
            return False
        assert self.grammar is not None
        place, drafts = self._num_decided, self.tokens[self._num_decided :][: self._num_drafted]
        agree = drafts[: len(forced)] == forced[: len(drafts)]
        self._write(place, [*forced, *(drafts[len(forced) :] if agree else [])])
        self._num_decided += len(forced)
        self._num_drafted -= len(forced)
        for token in forced:
            self.grammar.advance(token)
        self.note_logprobs(range(place, self._num_decided), None, {})
        return True

    def _finish(self) -> None:
        self._end(range(len(self.request.ids), self._num_decided), over=self.is_whole)

    def _tell(self, plan: ScheduledSequence, answer: ModelOutput) -> None:
        """Log-probabilities and the step, where they are asked for; drafts are shown as guesses."""
        first = plan.queries[0]
        at = {position: i for i, position in enumerate(plan.queries)}
        self.note_logprobs(range(first, self.committed), answer.logits_NV, at)
        if self.watched:
            told = range(first, max(plan.stop, self._num_decided))
            undecided = [p >= self._num_decided for p in range(told.stop)]
            decision = Decision({p: self.tokens[p] for p in range(first, self._num_decided)})
            fixed = [False] * told.stop
            self._report(Step.after(told, answer.guess, decision, self.tokens, undecided, fixed, self.forwards))
