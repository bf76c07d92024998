"""A request whose drafts are checked: the text of autoregressive decoding, several tokens in a forward.

Owns its state between forwards. A shifted model's causal rows predict exactly what its weights would, decoding token by token;
its masked rows guess what comes behind. What a forward guesses, the next one checks.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import takewhile

from unmask.diffusion.decode import Decision, Guess
from unmask.diffusion.objectives import ban_mask
from unmask.engine.request import Request, Step
from unmask.engine.sequence import Answer, Decode, Plan, Sequence
from unmask.models.config import ModelConfig

DRAFT_THRESHOLD = 0.5
"""Of drafts that are checked, unless told otherwise: it decides how fast, not what is said."""
_EVERYTHING = 2**40
"""A block size whose first block holds all positions."""


def choose_verified(request: Request, config: ModelConfig, wanted: bool | None, threshold: float | None) -> Request:
    """The request with its drafts checked, if that is wanted; None: wherever it is possible.

    Args:
        request: as it is without.
        config: of the model.
        wanted: True, False or None.
        threshold: of the drafts; None: `DRAFT_THRESHOLD`.
    """
    rules = request.rules
    greedy = rules.temperature == 0.0 and rules.policy == "threshold" and not rules.editing
    possible = config.shifted and greedy and request.grammar is None and None not in request.ids
    if not (possible if wanted is None else wanted):
        return request
    return replace(request, rules=replace(rules, verify=True, threshold=DRAFT_THRESHOLD if threshold is None else threshold))


class VerifiedSequence(Sequence):
    """Drafts a block in one pass and keeps of it what the next pass, causal, would have said itself.

    Rows of a forward, with `v` tokens decided and `d` drafted: the causal ones up to position v + d decide one token more than
    there are drafts that hold; the open ones behind, a block with the last causal row, draft on. Drafts after one that does not
    hold are forgotten, and so is what was guessed behind them. A draft is made only where the guess and all those before it
    are more probable than the threshold: a wrong one costs the forward's other guesses.

    Source: speculative decoding (2211.17192) with a model that drafts for itself, as in TiDAR (2511.08923). Greedy only.
    """

    block_size = 1

    def __init__(self, request: Request, number: int, mask_id: int, page_size: int, decode: Decode | None = None) -> None:
        super().__init__(request, number, mask_id, page_size, decode)
        given = [token for token in request.ids if token is not None]
        self.tokens = given + [mask_id] * request.max_new_tokens
        self._num_given = self._num_decided = len(given)
        self._num_drafted = 0

    @property
    def open_size(self) -> int:
        return _EVERYTHING

    @property
    def num_final(self) -> int:
        return self._num_decided

    @property
    def _border(self) -> int:
        """Rows below it are causal: one for each draft, and one more."""
        return min(self._num_decided + self._num_drafted + 1, len(self.tokens))

    @property
    def reach(self) -> int:
        if self.request.eos_ids.intersection(self.tokens[self._num_decided : self._border]):
            return self._border  # what is drafted ends there
        return min(self._border + self.request.rules.block_size - 1, len(self.tokens))

    def plan(self, budget: int) -> Plan | None:
        start, border = self.committed, self._border
        if border - start > budget:
            chunk = min(budget, self._num_decided - start)
            return Plan(start, start + chunk, border) if chunk > 0 else None
        queries = tuple(range(self._num_decided, min(self.reach, start + budget)))
        return Plan(start, queries[-1] + 1, border, queries, queries)

    def apply(self, plan: Plan, answer: Answer | None) -> None:
        self._count(plan)
        if answer is None:
            self.committed = plan.stop
            return
        first, before = self._num_decided, self.tokens[:]
        guess, border = answer.guess, plan.num_final
        says = dict(zip(guess.positions, guess.tokens, strict=True))
        held = len(list(takewhile(lambda p: before[p] == says[p], range(first, border - 1))))
        self._num_decided = self.committed = first + held + 1
        kept = range(border, plan.stop) if self._num_decided == border else range(0)
        sure = dict(zip(guess.positions, guess.confidences, strict=True))
        drafts = list(takewhile(lambda p: sure[p] > self.request.rules.threshold, kept))
        self._num_drafted, self.step = len(drafts), self.step + 1
        known = first + held
        assert self.mask_id is not None
        self.tokens[known:] = [says[known], *(says[p] for p in drafts)]
        self.tokens += [self.mask_id] * (len(before) - len(self.tokens))
        self._tell(plan, answer, before)
        self._end(range(self._num_given, self._num_decided), over=False)

    def _tell(self, plan: Plan, answer: Answer, before: list[int]) -> None:
        """Log-probabilities and the step, where they are asked for."""
        decided = [p for p in plan.queries if p < self._num_decided]
        if self.request.logprobs is not None:
            assert answer.logits_NV is not None
            logprobs_NV = ban_mask(answer.logits_NV.float(), self.mask_id).log_softmax(-1)
            self.note_logprobs(decided, logprobs_NV, {p: i for i, p in enumerate(plan.queries)})
        if not self.watched:
            return
        told = range(plan.queries[0], plan.stop)
        new = {p: self.tokens[p] for p in told if self.tokens[p] != before[p] and self.tokens[p] != self.mask_id}
        decision = Decision(
            {p: token for p, token in new.items() if before[p] == self.mask_id},
            {p: token for p, token in new.items() if before[p] != self.mask_id},
        )
        self._edits += len(decision.edits)
        undecided = [p >= self._num_decided + self._num_drafted for p in range(len(self.tokens))]
        fixed = [False] * len(self.tokens)
        guess = Guess(plan.queries, answer.guess.tokens, answer.guess.confidences)
        self._report(Step.after(told, guess, decision, self.tokens, undecided, fixed, self.forwards))
