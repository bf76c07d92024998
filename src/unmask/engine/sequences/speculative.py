"""A sequence of self-speculative decoding in one forward: the text of autoregressive decoding, several tokens at a time.

Owns its state between forwards. A shifted model's causal tokens predict exactly what its weights would, decoding token by
token; its mask tokens draft what comes after. What one forward drafts, the next one verifies.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile

from torch import Tensor

from unmask.data.detokenizer import Decode
from unmask.diffusion.decode import Decision
from unmask.engine.request import Request, Step
from unmask.engine.sequences.base import NOTHING_LEFT, DecodingSequence, ModelOutput, ScheduledSequence
from unmask.errors import RequestError

_EVERYTHING = 2**40
"""A block size whose first block holds all positions."""


class SpeculativeSequence(DecodingSequence):
    """Drafts a block in one pass and accepts of it what the next, causal pass predicts itself.

    Tokens of a forward, with `v` decided and `d` drafted: the verify tokens, causal, up to position v + d, decide the accepted
    drafts and one more token; the mask tokens after them, a block at most with the last verify token, draft on. Drafts after a
    rejected one are forgotten, and so is what was drafted after them. A draft is kept only where its probability and those of
    all before it are above the threshold: a wrong one costs the forward's other drafts. Where none is kept, the next forward
    has half as many mask tokens, down to one: text that cannot be drafted costs little more than decoding it token by token.

    A drawn token depends on the logits, the seed and the position, so that sampling is verified like the rest: a draft is
    accepted if it is the target token, the one that its verify token draws. A grammar limits the target tokens, and adds what
    it leaves no choice about.

    Source: speculative decoding (2211.17192) with a model that drafts for itself, as in TiDAR (2511.08923).
    """

    block_size = 1

    def __init__(
        self, request: Request, number: int, mask_id: int, cache_block_size: int, decode: Decode | None = None
    ) -> None:
        super().__init__(request, number, mask_id, cache_block_size, decode)
        prompt = [token for token in request.ids if token is not None]
        self.tokens = prompt + [mask_id] * request.params.max_new_tokens
        self._num_decided, self._num_drafts = len(prompt), 0
        self._num_masks = request.params.block_size - 1
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
        """End of the verify tokens: one for each draft, and one more."""
        return min(self._num_decided + self._num_drafts + 1, len(self.tokens))

    @property
    def reach(self) -> int:
        if self.request.eos_ids.intersection(self.tokens[self._num_decided : self._causal_end]):
            return self._causal_end  # what is drafted ends there
        return min(self._causal_end + self._num_masks, len(self.tokens))

    def plan(self, budget: int) -> ScheduledSequence | None:
        start, causal_end = self.committed, self._causal_end
        if causal_end - start > budget:
            chunk = min(budget, self._num_decided - start)
            return self._scheduled(start, start + chunk, causal_end=causal_end) if chunk > 0 else None
        queries = tuple(range(self._num_decided, min(self.reach, start + budget)))
        return self._scheduled(start, queries[-1] + 1, queries, queries, causal_end=causal_end, allowed=self._allowed())

    def apply(self, scheduled: ScheduledSequence, output: ModelOutput | None) -> None:
        self._count(scheduled)
        if output is None:
            self.committed = scheduled.stop
            return
        causal_end, guess = scheduled.causal_end, output.guess
        predicted = dict(zip(guess.positions, guess.tokens, strict=True))
        confidences = dict(zip(guess.positions, guess.confidences, strict=True))
        drafted = range(self._num_decided, causal_end - 1)
        accepted_length = len(list(takewhile(lambda p: self.tokens[p] == predicted[p], drafted)))
        last = self._num_decided + accepted_length
        target_token = predicted[last]
        self.committed = last + 1
        self._edits += self.tokens[last] not in (self.mask_id, target_token)
        # Mask tokens have read the drafts: what they predict counts only where all of those are accepted.
        masks = range(causal_end, scheduled.stop) if last + 1 == causal_end else range(0)
        drafts = [predicted[p] for p in takewhile(lambda p: confidences[p] > self.request.params.threshold, masks)]
        if masks:
            self._num_masks = self.request.params.block_size - 1 if drafts else max(1, self._num_masks // 2)
        self._write(last, [target_token, *drafts])
        self._decide(last + 1)
        self._record(scheduled, output)
        self._finish()
        self._check_grammar()

    def _allowed(self) -> dict[int, Tensor]:
        """What the grammar allows at the verify tokens, by query; drafts are free."""
        allowed: dict[int, Tensor] = {}
        if self.grammar is None:
            return allowed
        state = self.grammar.copy()
        for index, token in enumerate(self.tokens[self._num_decided : self._causal_end]):
            allowed[index] = state.allowed()
            if index == self._num_drafts or token in self.request.eos_ids or not state.accepts(token):
                break  # a draft that is not allowed is not accepted
            try:
                state.advance(token)
                state.allowed()
            except RequestError:
                break  # raised for this request where the draft is accepted
        return allowed

    def _write(self, start: int, tokens: Sequence[int]) -> None:
        """These tokens from `start` on, and masks after them."""
        assert self.mask_id is not None
        room = len(self.tokens) - start
        fitting = tokens[:room]
        self.tokens[start:] = [*fitting, *[self.mask_id] * (room - len(fitting))]
        self._num_drafts = start + len(fitting) - self._num_decided

    def _decide(self, stop: int) -> None:
        """Everything below `stop` is decided, and what a grammar adds to it; drafts after it stay as far as they agree."""
        new = self.tokens[self._num_decided : stop]
        self._num_drafts -= stop - self._num_decided
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
        start, drafts = self._num_decided, self.tokens[self._num_decided :][: self._num_drafts]
        agree = drafts[: len(forced)] == forced[: len(drafts)]
        self._write(start, [*forced, *(drafts[len(forced) :] if agree else [])])
        self._num_decided += len(forced)
        self._num_drafts -= len(forced)
        for token in forced:
            self.grammar.advance(token)
        self.note_logprobs(range(start, self._num_decided), None, {})
        return True

    def _finish(self) -> None:
        self._end(range(len(self.request.ids), self._num_decided), over=self.is_whole)

    def _record(self, scheduled: ScheduledSequence, output: ModelOutput) -> None:
        """Log-probabilities and the step, where they are asked for; drafts are shown as guesses."""
        first = scheduled.queries[0]
        row_of = {position: i for i, position in enumerate(scheduled.queries)}
        self.note_logprobs(range(first, self.committed), output.logits_NV, row_of)
        if self.watched:
            positions = range(first, max(scheduled.stop, self._num_decided))
            undecided = [p >= self._num_decided for p in range(positions.stop)]
            decision = Decision({p: self.tokens[p] for p in range(first, self._num_decided)})
            fixed = [False] * positions.stop
            self._report(Step.after(positions, output.guess, decision, self.tokens, undecided, fixed, self.forwards))
