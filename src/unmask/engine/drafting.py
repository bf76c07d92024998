"""Drafting: how many draft tokens each request verifies in the next forward, and how many masks it runs to draft on.

Owns the choice that makes most of a forward's time. Knows neither models nor caches; a sequence says what it could do
(`DraftPlan`) and is told what to do.

Over a long time, most tokens per second are written by the forwards of greatest `tokens - rate * cost`, where `rate` is the
tokens per cost that decoding reaches at present. Counted as tokens are also those that drafts made now are worth to the next
forward, less what verifying them will cost.

Legend: F features of a forward (`engine.costs`), K options of all sequences together, S sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from unmask.engine.acceptance import Draft, DraftPrices
from unmask.engine.costs import ForwardCosts

Counts = tuple[int, int, int]
"""Of a forward: tokens, noisy tokens, tokens whose candidate takes all logits."""
_SHARE_OF_PROBES = 0.01
"""Of the time, what masks may cost that are run to see whether masks would pay."""
_MOST_CREDIT = 0.5
_RATE_MEMORY = 0.9
_PRICED = 3
"""Verify tokens of a sequence whose mean cost is the price of one."""
_LEAST_PRICE = 1e-3
"""Of a token, where it costs the forward nothing: of those the likeliest come first."""
_CHANGES = 8
"""Most changes of a sequence's option in one choice, on average."""


class DraftPlan(NamedTuple):
    """What a sequence does in the next forward beside its plain token: drafts to verify, then masks to draft on.

    Attributes:
        drafts: to verify.
        num_masks: to run.
        gain: expected tokens beyond the plain one, later ones included.
        now: those of the next forward alone.
    """

    drafts: tuple[Draft, ...] = ()
    num_masks: int = 0
    gain: float = 0.0
    now: float = 0.0

    @property
    def num_tokens(self) -> int:
        """Of the forward, beyond the plain one."""
        return len(self.drafts) + self.num_masks


NO_DRAFTS = DraftPlan()


class Drafting(Protocol):
    """A sequence that may draft.

    Attributes:
        is_drawn: its candidates take all logits.
        may_draft: it could have drafts, or run masks.
        num_idle: forwards since it ran masks.
        wants_probe: it has run no masks for some forwards, and could.
    """

    @property
    def is_drawn(self) -> bool: ...

    @property
    def may_draft(self) -> bool: ...

    @property
    def num_idle(self) -> int: ...

    @property
    def wants_probe(self) -> bool: ...

    def draft_options(self, prices: DraftPrices) -> list[DraftPlan]:
        """What may pay at these prices; the first is to do nothing."""
        ...

    def follow_plan(self, plan: DraftPlan) -> None:
        """Take part in the next forward like this."""
        ...

    def probe(self) -> None:
        """Run a mask beside what is planned, to see what masks would give."""
        ...


@dataclass
class DraftPlanner:
    """Plans the drafts of all sequences of a forward.

    Args:
        costs: of forwards.
    """

    costs: ForwardCosts

    def __post_init__(self) -> None:
        self._gain = 1.0  # tokens per cost over that without drafts, of late
        self._credit = _MOST_CREDIT  # for probes, in forwards without drafts

    def plan(self, sequences: Sequence[Drafting], num_beside: int = 0, num_running: int = 0) -> None:
        """Tell each sequence what to do in the next forward.

        Where a token more costs nearly what the surest draft is worth, as in a large batch, no sequence is asked what it could
        do.

        Args:
            sequences: one plain token each.
            num_beside: other tokens of the forward.
            num_running: sequences, of this forward or not, that share the engine's time; at least these.
        """
        if not sequences:
            return
        cost, drawn = self.costs.cost, sum(sequence.is_drawn for sequence in sequences)
        tokens, running = len(sequences) + num_beside, max(len(sequences), num_running)
        rate = self.costs.margin * self._gain * running / cost(running, 0, drawn)
        prices = self._prices((tokens, 0, drawn), len(sequences), rate)
        for sequence in sequences:
            sequence.follow_plan(NO_DRAFTS)
        may_pay = prices.drafts_may_pay or prices.masks_may_pay
        able = [sequence for sequence in sequences if sequence.may_draft] if may_pay else []
        counts, gained = self._choose(able, (tokens, 0, drawn), prices, rate)
        if not num_beside:
            gain = max(1.0, (1 + gained / len(sequences)) * cost(tokens, 0, drawn) / cost(*counts))
            self._gain = _RATE_MEMORY * self._gain + (1 - _RATE_MEMORY) * gain
        self._credit = min(self._credit + _SHARE_OF_PROBES, _MOST_CREDIT)
        if prices.masks_may_pay and (waiting := [sequence for sequence in able if sequence.wants_probe]):
            self._probe(waiting, counts, cost(running, 0, drawn))

    def _prices(self, plain: Counts, count: int, rate: float) -> DraftPrices:
        """Prices beside what the forward holds without drafts, those of so many sequences among it."""
        cost, (tokens, _, drawn) = self.costs.cost, plain
        return DraftPrices(
            rate * (cost(tokens + _PRICED * count, 0, drawn) - cost(*plain)) / (_PRICED * count),
            rate * (cost(tokens + 2, 2, drawn) - cost(tokens + 1, 1, drawn)),
            rate * (cost(tokens + 1, 1, drawn) - cost(*plain)),
            rate * (cost(tokens + 1, 0, drawn) - cost(*plain)),
        )

    def _choose(self, able: Sequence[Drafting], plain: Counts, prices: DraftPrices, rate: float) -> tuple[Counts, float]:
        """Tell those that may draft what to do; what the forward then holds, and the tokens expected of it beyond the plain."""
        drafting, options = list[Drafting](), list[Sequence[DraftPlan]]()
        for sequence in able:
            if len(each := sequence.draft_options(prices)) > 1:
                drafting.append(sequence)
                options.append(each)
        if not options:
            return plain, 0.0
        (tokens, noisy, drawn), gained = plain, 0.0
        chosen = choose(options, [each.is_drawn for each in drafting], self.costs, plain, rate)
        for sequence, plan in zip(drafting, chosen, strict=True):
            sequence.follow_plan(plan)
            tokens, noisy, gained = tokens + plan.num_tokens, noisy + plan.num_masks, gained + plan.now
            drawn += plan.num_tokens if sequence.is_drawn else 0
        return (tokens, noisy, drawn), gained

    def _probe(self, waiting: Sequence[Drafting], counts: Counts, base: float) -> None:
        """Let the sequence that has waited longest run a mask, if the share of time for that is there."""
        tokens, noisy, drawn = counts
        dearer = (self.costs.cost(tokens + 1, noisy + 1, drawn) - self.costs.cost(*counts)) / base
        if dearer <= self._credit:
            max(waiting, key=lambda sequence: sequence.num_idle).probe()
            self._credit -= dearer


def choose(
    options: Sequence[Sequence[DraftPlan]],
    is_drawn: Sequence[bool],
    costs: ForwardCosts,
    plain: Counts,
    rate: float,
) -> list[DraftPlan]:
    """An option for each sequence, so that `gain - rate * cost` of the forward is greatest.

    One sequence at a time changes its option, as gains most for what it costs, until no change is for the better: from
    everybody's doing nothing, and from what would be best if all did alike, as where a fixed cost is shared. The better end
    counts; for one sequence it is the maximum.

    Args:
        options: of each sequence; the first is nothing.
        is_drawn: of each sequence.
        costs: of the forward.
        plain: what the forward holds in which nobody drafts.
        rate: tokens per cost.
    """
    tokens, noisy, drawn = plain

    def if_all_did(plan: DraftPlan, count: int, is_drawn: bool) -> float:
        more = count * plan.num_tokens
        cost = costs.cost(tokens + more, noisy + count * plan.num_masks, drawn + (more if is_drawn else 0))
        return count * plan.gain - rate * cost

    count = len(options)
    alike = [
        max(range(len(each)), key=lambda i: if_all_did(each[i], count, one_drawn))
        for each, one_drawn in zip(options, is_drawn, strict=True)
    ]
    if count > 1:
        climb = _Climb(options, is_drawn, costs, plain, rate)
        alike = max((climb(start) for start in ([0] * count, alike)), key=lambda end: end[0])[1]
    return [each[i] for each, i in zip(options, alike, strict=True)]


class _Climb:
    """Changes one option at a time."""

    def __init__(
        self,
        options: Sequence[Sequence[DraftPlan]],
        is_drawn: Sequence[bool],
        costs: ForwardCosts,
        plain: Counts,
        rate: float,
    ) -> None:
        self._costs, self._plain_F, self._rate = costs, np.array(plain), rate
        rows = [
            (plan.gain, plan.num_tokens, plan.num_masks, plan.num_tokens if one_drawn else 0)
            for each, one_drawn in zip(options, is_drawn, strict=True)
            for plan in each
        ]
        rows_K4 = np.array(rows)
        self._gain_K, self._counts_KF = rows_K4[:, 0], rows_K4[:, 1:].astype(np.int64)
        sizes = [len(each) for each in options]
        self._owner_K, self._first_S = np.repeat(np.arange(len(sizes)), sizes), np.cumsum([0, *sizes[:-1]])

    def __call__(self, start: Sequence[int]) -> tuple[float, list[int]]:
        """The value reached from these options, and the options."""
        chosen_S = self._first_S + np.array(start)
        for _ in range(_CHANGES * len(chosen_S)):
            current_K = chosen_S[self._owner_K]
            more_K = self._gain_K - self._gain_K[current_K]
            total_F = self._plain_F + self._counts_KF[chosen_S].sum(0)
            cost_K = self._costs.relative(total_F + self._counts_KF - self._counts_KF[current_K])
            dearer_K = cost_K - cost_K[chosen_S[0]]
            better_K = more_K > self._rate * dearer_K + 1e-9
            if not better_K.any():
                break
            added_K = self._counts_KF[:, 0] - self._counts_KF[current_K, 0]
            price_K = np.maximum(dearer_K + _LEAST_PRICE * added_K, 1e-9)
            best = int(np.argmax(np.where(better_K, more_K / price_K, -np.inf)))
            chosen_S[self._owner_K[best]] = best
        total_F = self._plain_F + self._counts_KF[chosen_S].sum(0)
        value = self._gain_K[chosen_S].sum() - self._rate * self._costs.relative(total_F[None])[0]
        return float(value), (chosen_S - self._first_S).tolist()
