"""A sequence of self-speculative decoding in one forward: the text of autoregressive decoding, several tokens at a time.

Owns its state between forwards. A shifted model's causal tokens predict exactly what its weights would, decoding token by
token; its mask tokens draft what comes after. What one forward drafts, the next one verifies.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile

from torch import Tensor

from unmask.diffusion.decode import Decision
from unmask.engine.request import DecodingStep
from unmask.engine.sequences.base import DecodingSequence, ModelOutput, ScheduledSequence
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

    def _begin(self) -> None:
        prompt, params = [token for token in self.request.ids if token is not None], self.request.params
        self._num_decided, self._num_drafts, self._num_masks = len(prompt), 0, params.block_size - 1
        assert self.mask_id is not None, "shifted models have a mask token"
        self.tokens = prompt + [self.mask_id] * params.max_new_tokens
        if self._add_forced():
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
        if self.request.end_ids.intersection(self.tokens[self._num_decided : self._causal_end]):
            return self._causal_end  # what is drafted ends there
        return min(self._causal_end + self._num_masks, len(self.tokens))

    def schedule(self, budget: int) -> ScheduledSequence | None:
        start, causal_end = self.committed, self._causal_end
        if causal_end - start > budget:
            chunk = min(budget, self._num_decided - start)
            return self._scheduled(start, start + chunk, causal_end=causal_end) if chunk > 0 else None
        queries = tuple(range(self._num_decided, min(self.reach, start + budget)))
        return self._scheduled(start, queries[-1] + 1, queries, causal_end=causal_end, allowed=self._allowed())

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
            if index == self._num_drafts or token in self.request.end_ids or not state.accepts(token):
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
        for token in new:
            self._follow(token)
            if token in self.request.end_ids:
                break
        self._add_forced()

    def _add_forced(self) -> bool:
        """Decide what the grammar leaves no choice about; whether there was anything."""
        start, drafts = self._num_decided, self.tokens[self._num_decided :][: self._num_drafts]
        forced = self._take_forced(start, len(self.tokens) - start)
        if forced:
            agree = drafts[: len(forced)] == forced[: len(drafts)]
            self._write(start, [*forced, *(drafts[len(forced) :] if agree else [])])
            self._num_decided += len(forced)
            self._num_drafts -= len(forced)
        return bool(forced)

    def _finish(self) -> None:
        self._end(range(len(self.request.ids), self._num_decided))

    def _record(self, scheduled: ScheduledSequence, output: ModelOutput) -> None:
        """Log-probabilities and the step, where they are asked for; drafts are shown as guesses."""
        first = scheduled.queries[0]
        self._note_logprobs(range(first, self.committed), output)
        if self.watched:
            positions = range(first, max(scheduled.stop, self._num_decided))
            undecided = [p >= self._num_decided for p in range(positions.stop)]
            decision = Decision({p: self.tokens[p] for p in range(first, self._num_decided)})
            fixed = [False] * positions.stop
            self._report(DecodingStep.after(positions, output.guess, decision, self.tokens, undecided, fixed, self.forwards))
