"""A sequence decoded autoregressively, token by token or, by verified drafts, several tokens in one forward.

Owns its state between forwards. Its text is what the model's causal tokens predict: that of decoding token by token. Drafts
come from masks that a shifted model runs behind its causal tokens (self-speculative decoding), and, for any model, from what
followed earlier occurrences of the same tokens in its text (prompt lookup) or in text that the model wrote before (n-grams).
Which of them pay is `engine.drafting`'s matter.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from operator import mul

from torch import Tensor

from unmask.diffusion.decode import Decision
from unmask.engine.acceptance import Draft, DraftEstimates, DraftPrices, Key, promising
from unmask.engine.drafting import NO_DRAFTS, DraftPlan
from unmask.engine.lookup import PromptLookup
from unmask.engine.ngrams import LONGEST_CONTEXT, NextToken
from unmask.engine.request import DecodingStep
from unmask.engine.sequences.base import DecodingSequence, ModelOutput, ScheduledSequence
from unmask.errors import RequestError

_EVERYTHING = 2**40
"""A block size whose first block holds all positions."""
_MOST_FOUND = 16
_LOOKUP_PRIORS = (0.3, 0.5, 0.65, 0.8, 0.9)
"""Of acceptance, by the length of the match: 2 tokens, 3, 4, 5 or 6, more."""
_CONFIDENCES, _DISTANCES = 10, 4
_NO_OPTIONS = [NO_DRAFTS]
_FIRST_INTERVAL, _LONGEST_INTERVAL = 4, 32
"""Forwards without masks before a probe."""


class SpeculativeSequence(DecodingSequence):
    """Verifies drafts: accepts of them what the causal pass predicts itself.

    Tokens of a forward, with `v` decided and `d` drafts: the verify tokens, causal, decide the accepted drafts and one more
    token; in a shifted model, mask tokens after them draft on. Drafts after a rejected one are forgotten, and so is what was
    drafted after them. Drafts that are not verified stay as long as the text agrees with them. Without drafts and masks a
    forward is that of decoding token by token.

    A drawn token depends on the logits, the seed and the position, so that sampling is verified like the rest: a draft is
    accepted if it is the target token, the one that its verify token draws. A grammar limits the target tokens, and adds what
    it leaves no choice about.

    Source: speculative decoding (2211.17192) with a model that drafts for itself, as in TiDAR (2511.08923); prompt lookup
    decoding (A. Saxena, 2023); drafts retrieved from text of the model, as in REST (2311.08252), here counted n-grams.
    """

    def _begin(self) -> None:
        prompt, params = [token for token in self.request.ids if token is not None], self.request.params
        self.tokens, self._num_decided = prompt, len(prompt)
        self._length = len(prompt) + params.max_new_tokens
        self._lag = 0 if self._shifted else 1  # a shifted model's row reads the token before the one it predicts
        self._estimates = DraftEstimates(self._history)
        self._pending: list[Draft] = []
        self._lookup: PromptLookup | None = None
        self._num_learnt = len(prompt)
        self._plan = NO_DRAFTS
        self.num_idle = self._interval = _FIRST_INTERVAL
        self.is_drawn = self.request.needs_logits
        if self._add_forced():
            self._finish()
            self._check_grammar()

    @property
    def mask_block_size(self) -> int:
        return _EVERYTHING

    @property
    def num_final(self) -> int:
        return self._num_decided - self._lag

    @property
    def reach(self) -> int:
        # One more than is final: that row's hidden state predicts the next token.
        return self.num_final + 1

    @property
    def min_tokens(self) -> int:
        return 1

    def schedule(self, budget: int) -> ScheduledSequence | None:
        start, causal_end = self.committed, self.reach
        if causal_end - start > budget:
            chunk = min(budget, self.num_final - start)
            return self._scheduled(start, start + chunk, causal_end=causal_end) if chunk > 0 else None
        drafts = [draft.token for draft in self._plan.drafts][: budget - (causal_end - start)]
        causal_end += len(drafts)
        stop = min(causal_end + self._plan.num_masks, start + budget)
        queries = tuple(range(self._num_decided, stop + self._lag))
        masks = [] if self.mask_id is None else [self.mask_id] * (len(queries) - len(drafts))
        self.tokens[self._num_decided :] = [*drafts, *masks]
        rows, allowed = tuple(range(self._num_decided - self._lag, stop)), self._allowed(drafts)
        return self._scheduled(start, stop, queries, logits_positions=rows, causal_end=causal_end, allowed=allowed)

    def apply(self, scheduled: ScheduledSequence, output: ModelOutput | None) -> None:
        self._count(scheduled)
        if output is None:
            self.committed = scheduled.stop
            return
        self._plan, first = NO_DRAFTS, self._num_decided
        targets, confidences = output.guess.tokens, output.guess.confidences
        drafts = self.tokens[first : scheduled.causal_end + self._lag - 1]
        num_accepted = next((i for i, token in enumerate(drafts) if token != targets[i]), len(drafts))
        num_masks = scheduled.stop - scheduled.causal_end
        num_new = self._decide(targets[: num_accepted + 1], confidences)
        self._accepted_drafts += min(num_accepted, num_new)
        self.committed = self._num_decided - self._lag
        if len(scheduled.queries) > 1:
            self._learn()
        # Masks have read the drafts: what they predict counts only where all of those are accepted.
        if num_masks and num_accepted == len(drafts):
            self._draft(targets[len(drafts) + 1 :], confidences[len(drafts) + 1 :])
        self.num_idle = 0 if num_masks else self.num_idle + 1
        self._add_forced()
        self._record(scheduled, output, first, num_new)
        self._finish()
        self._check_grammar()

    @property
    def wants_probe(self) -> bool:
        """Whether it has run no masks for some forwards, and could."""
        return self.num_idle >= self._interval and not self._plan.num_masks and self._most_masks(self._plan.drafts) > 0

    def probe(self) -> None:
        """Run a mask in the next forward, beside the drafts that it verifies."""
        self._plan = self._plan._replace(num_masks=1)
        self._interval = min(2 * self._interval, _LONGEST_INTERVAL)

    def follow_plan(self, plan: DraftPlan) -> None:
        """Take part in the next forward like this."""
        self._plan = plan
        if plan.num_masks:
            self._interval = _FIRST_INTERVAL

    @property
    def may_draft(self) -> bool:
        """Whether it could have drafts, or run masks."""
        return self._room > 0 and (self.mask_id is not None or self.request.params.prompt_lookup)

    def draft_options(self, prices: DraftPrices) -> list[DraftPlan]:
        """All numbers of pending drafts and masks, and all numbers of drafts found in text; the first is to do nothing.

        Args:
            prices: of verify tokens and masks.
        """
        self._learn()
        room = self._room
        pending = promising(self._until_end(self._pending[:room]), prices.verify) if self._pending else []
        found = promising(self._until_end(self._found(room)), prices.verify)
        num_masks = self._most_masks(())
        # What masks tell is told at less cost once the prompt has been read.
        faster = room if self.num_missing == 1 else 0
        worth = self._estimates.worth(num_masks, prices, faster) if num_masks else [0.0]
        if not pending and not found and len(worth) == 1:
            return _NO_OPTIONS
        plans, now = list[DraftPlan](), 0.0
        chains = list(accumulate((draft.probability for draft in pending), mul, initial=1.0))
        ends = bool(pending) and pending[-1].token in self.request.end_ids
        for count, chain in enumerate(chains):
            drafts, now = tuple(pending[:count]), now + chain if count else 0.0
            plans.append(DraftPlan(drafts, 0, now + _left_over(chains[count + 1 :], prices.verify), now))
            if not (ends and count == len(pending)):
                most = min(len(worth) - 1, room - count)
                plans += [DraftPlan(drafts, m, now + chain * worth[m], now) for m in range(1, most + 1)]
        now, chain = 0.0, 1.0
        for count, draft in enumerate(found, 1):
            chain *= draft.probability
            now += chain
            plans.append(DraftPlan(tuple(found[:count]), 0, now, now))
        return plans

    def _most_masks(self, drafts: Sequence[Draft]) -> int:
        """Masks that the next forward has room for after these drafts: a block with the last verify token at most."""
        if self.mask_id is None or any(draft.token in self.request.end_ids for draft in drafts):
            return 0
        return max(0, min(self.request.params.block_size - 1, self._room - len(drafts)))

    @property
    def _room(self) -> int:
        """Tokens that may follow the one that is decided next."""
        return self._length - self._num_decided - 1

    def _until_end(self, drafts: Iterable[Draft]) -> Iterator[Draft]:
        """Drafts up to the first that ends the completion."""
        for draft in drafts:
            yield draft
            if draft.token in self.request.end_ids:
                return

    def _found(self, room: int) -> Iterator[Draft]:
        """Drafts that text gives: at each place the likelier of what followed an earlier occurrence and of the n-gram's."""
        if self._lookup is None:
            return
        looked_up, length = self._lookup.draft(min(room, _MOST_FOUND)), self._lookup.length
        context = self.tokens[max(0, self._num_decided - LONGEST_CONTEXT) : self._num_decided]
        for i in range(min(room, _MOST_FOUND)):
            found = [self._estimates.draft(looked_up[i], *_lookup_kind(length + i))] if i < len(looked_up) else []
            if self._ngrams is not None and (ngram := self._ngrams.next(context)) is not None:
                found.append(self._estimates.draft(ngram.token, *_ngram_kind(ngram)))
            if not found:
                return
            best = max(found, key=lambda draft: draft.probability)
            yield best
            context.append(best.token)
            if i < len(looked_up) and best.token != looked_up[i]:
                looked_up = []  # the text is not taken to go on as it did there

    def _draft(self, tokens: Sequence[int], confidences: Sequence[float]) -> None:
        """Keep what masks have drafted, up to the first that is not above the request's threshold."""
        drafts = [
            self._estimates.draft(token, ("masks", int(_CONFIDENCES * confidence), min(i, _DISTANCES)), confidence)
            for i, (token, confidence) in enumerate(zip(tokens, confidences, strict=True))
        ]
        threshold = self.request.params.threshold
        num_kept = next((i for i, confidence in enumerate(confidences) if confidence <= threshold), len(drafts))
        self._pending = drafts[:num_kept]
        self._estimates.record_masks(self._pending, len(drafts), self._until_end(self._found(self._room)))

    def _decide(self, tokens: Sequence[int], confidences: Sequence[float]) -> int:
        """These tokens follow the decided ones, under a grammar up to the end of the sentence; returns how many do."""
        count = len(tokens)
        for index, token in enumerate(() if self.grammar is None else tokens):
            self._follow(token, confidences[index])
            if token in self.request.end_ids or self.is_whole:
                count = index + 1  # token by token, nothing would be decided behind it
                break
        self.tokens[self._num_decided :] = tokens[:count]
        self._num_decided += count
        return count

    def _learn(self) -> None:
        """Take in what has been decided since the last call: drafts have turned out right or wrong, verified or not, and the
        text in which is looked up has grown. Put off while nobody asks for drafts."""
        if self._lookup is None and self.request.params.prompt_lookup:
            self._lookup = PromptLookup(self.tokens[: self._num_learnt])
        for place in range(self._num_learnt, self._num_decided):
            token = self.tokens[place]
            if self._pending:
                draft, *rest = self._pending
                self._estimates.record(draft.key, draft.prior, draft.token == token)
                self._pending = rest if draft.token == token else []
            if self._lookup is not None:
                if (expected := self._lookup.next) is not None:
                    self._estimates.record(*_lookup_kind(self._lookup.length), expected == token)
                self._lookup.append(token)
                self._learn_ngram(place)
        self._num_learnt = self._num_decided

    def _learn_ngram(self, place: int) -> None:
        """Take in whether the token at this place is what the n-grams drafted."""
        if self._ngrams is not None:
            ngram = self._ngrams.next(self.tokens, place)
            if ngram is not None:
                self._estimates.record(*_ngram_kind(ngram), ngram.token == self.tokens[place])

    def _add_forced(self) -> bool:
        """Decide what the grammar leaves no choice about; whether there was anything."""
        if self.grammar is None:
            return False
        forced = self._take_forced(self._num_decided, self._length - self._num_decided)
        self.tokens[self._num_decided :] = forced
        self._num_decided += len(forced)
        return bool(forced)

    def _allowed(self, drafts: Sequence[int]) -> dict[int, Tensor]:
        """What the grammar allows at the verify tokens, by query; what masks draft is free."""
        allowed: dict[int, Tensor] = {}
        if self.grammar is None:
            return allowed
        state = self.grammar.copy()
        for index in range(len(drafts) + 1):
            allowed[index] = state.allowed()
            if index == len(drafts) or drafts[index] in self.request.end_ids or not state.accepts(drafts[index]):
                break  # a draft that is not allowed is not accepted
            try:
                state.advance(drafts[index])
                state.allowed()
            except RequestError:
                break  # raised for this request where the draft is accepted
        return allowed

    def _finish(self) -> None:
        self._end(range(len(self.request.ids), self._num_decided))

    def _record(self, scheduled: ScheduledSequence, output: ModelOutput, first: int, num_targets: int) -> None:
        """Log-probabilities and the step, where they are asked for; drafts are shown as guesses."""
        self._note_logprobs(range(first, first + num_targets), output)
        if self.watched:
            positions = range(first, max(scheduled.queries[-1] + 1, self._num_decided))
            undecided = [p >= self._num_decided for p in range(positions.stop)]
            decision = Decision({p: self.tokens[p] for p in range(first, self._num_decided)})
            fixed = [False] * positions.stop
            self._report(DecodingStep.after(positions, output.guess, decision, self.tokens, undecided, fixed, self.forwards))


def _lookup_kind(length: int) -> tuple[Key, float]:
    """Of a draft that continues a match of this length, and its probability without observations."""
    kind = min(length - 2, 3) if length < 7 else 4
    return ("lookup", kind, 0), _LOOKUP_PRIORS[kind]


def _ngram_kind(ngram: NextToken) -> tuple[Key, float]:
    """Of a draft of the n-grams, and its probability without observations."""
    return ("ngrams", int(_CONFIDENCES * ngram.probability), 0), ngram.probability


def _left_over(chain: Sequence[float], price: float) -> float:
    """What drafts are worth to the next forward that this one does not verify; the first of them is decided by this one.

    Args:
        chain: of each, the probability that it and all before it are accepted.
        price: of a verify token, in tokens.
    """
    return sum([max(later - price * chain[0], 0.0) for later in chain[1:]])
