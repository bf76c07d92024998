"""Drafting: how many draft tokens each request verifies in the next forward, and how many masks it runs to draft on.

Owns the estimates of acceptance, learnt from what requests show, and the choice that makes most of a forward's time. Knows
neither models nor caches; a sequence says what it could do (`DraftOptions`) and is told what to do.

Over a long time, most tokens per second are written by the forwards of greatest `tokens - rate * cost`, where `rate` is the
tokens per cost that decoding reaches at present. Counted as tokens are also those that drafts made now are worth to the next
forward, less what verifying them will cost.

Legend: O options of a sequence, F features of a forward (`engine.costs`), D drafts + 1, M masks + 1.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol

import numpy as np

from unmask.engine.costs import Counts, Floats, ForwardCosts

Source = Literal["masks", "lookup"]
Key = tuple[Source, int, int]

_STRENGTH = 4.0
"""Observations that a prior is worth."""
_MEMORY = 0.95
"""Of a request's observations, what counts after one more."""
_NOTHING_SEEN = np.zeros(4)
_HIGHEST = 0.98
_LONGEST = 32
"""Distances for which the worth of masks is kept."""
_FIRST_OUTCOME = 0.5
"""Until masks have shown what they draft: the probability of each draft, those before it being accepted."""
_NUM_OWN, _NUM_OTHERS, _OTHERS_WEIGHT = 8, 64, 2.0
_SHARE_OF_PROBES = 0.01
"""Of the time, what masks may cost that are run to see whether masks would pay."""
_MOST_CREDIT = 0.5
_RATE_MEMORY = 0.9
_PROMISING = 0.7
"""Drafts less probable than this share of the price of a verify token are no option: the price is a mean."""
_PRICED = 3
"""Verify tokens of a sequence whose mean cost is the price of one."""
_CHANGES = 8
"""Most changes of a sequence's option in one choice, on average."""
_ONE_MASK = np.array([1, 1, 0])


@dataclass(frozen=True)
class Draft:
    """A draft token that waits to be verified, or to be seen right or wrong as the text goes on.

    Attributes:
        probability: of being accepted if all drafts before it are.
        key: what its probability was estimated by.
        prior: what it would be without observations.
    """

    token: int
    probability: float
    key: Key
    prior: float


class Outcomes:
    """The last times that masks were run: of each draft, the probability that it and all before it are accepted.

    Args:
        size: how many are kept.
    """

    def __init__(self, size: int) -> None:
        self._chains = np.zeros((size, _LONGEST))
        self.count = 0

    def add(self, chain: Floats) -> None:
        """One more [_LONGEST]; the oldest is forgotten."""
        self._chains[self.count % len(self._chains)] = chain
        self.count += 1

    def surplus(self, num_masks: int, price: float) -> tuple[int, Floats]:
        """How many are kept, and the sum over them of what each draft exceeds the price by [num_masks]."""
        kept = min(self.count, len(self._chains))
        return kept, np.maximum(self._chains[:kept, :num_masks] - price, 0.0).sum(0)


class DraftHistory:
    """What the requests of an engine have shown of drafts: the prior of the next request."""

    def __init__(self) -> None:
        self._counts: dict[Key, tuple[float, float]] = {}
        self.outcomes = Outcomes(_NUM_OTHERS)
        self.outcomes.add(_FIRST_OUTCOME ** np.arange(1, _LONGEST + 1))

    def probability(self, key: Key, prior: float) -> float:
        """Of acceptance, from all requests."""
        accepted, seen = self._counts.get(key, (0.0, 0.0))
        return (accepted + _STRENGTH * prior) / (seen + _STRENGTH)

    def record(self, key: Key, accepted: bool) -> None:
        """A draft of this kind, all before it being accepted, turned out right or wrong."""
        before, seen = self._counts.get(key, (0.0, 0.0))
        self._counts[key] = before + accepted, seen + 1


class DraftEstimates:
    """A request's own view: acceptance and the worth of masks, starting from what other requests have shown.

    Args:
        history: shared by the requests of an engine.
    """

    def __init__(self, history: DraftHistory) -> None:
        self._history = history
        self._sums: dict[Source, Floats] = {}  # accepted, expected to be, rejected, expected to be
        self._outcomes = Outcomes(_NUM_OWN)

    def draft(self, token: int, key: Key, prior: float) -> Draft:
        """A draft with its probability: the prior as all requests correct it, and the odds as this request does."""
        probability = min(self._history.probability(key, prior), _HIGHEST)
        accepted, expected, rejected, feared = self._sums.get(key[0], _NOTHING_SEEN) + _STRENGTH
        odds = probability / (1 - probability) * (accepted / expected) * (feared / rejected)
        return Draft(token, min(odds / (1 + odds), _HIGHEST), key, prior)

    def record(self, draft: Draft, accepted: bool) -> None:
        """A draft, all before it being accepted, turned out right or wrong, whether it was verified or not."""
        expected = self._history.probability(draft.key, draft.prior)
        seen = np.array([accepted, expected, not accepted, 1 - expected])
        self._sums[draft.key[0]] = _MEMORY * self._sums.get(draft.key[0], _NOTHING_SEEN) + seen
        self._history.record(draft.key, accepted)

    def record_masks(self, drafts: Sequence[Draft], num_masks: int) -> None:
        """So many masks (at least one) have been run, and these drafts were kept."""
        outcome, count = np.zeros(_LONGEST), min(num_masks, _LONGEST)
        chain = np.cumprod([draft.probability for draft in drafts[:count]])
        outcome[: len(chain)] = chain
        if len(chain) == count:  # more masks might have drafted on as well
            outcome[count:] = chain[-1] ** (1 + np.arange(1, _LONGEST - count + 1) / count)
        self._outcomes.add(outcome)
        self._history.outcomes.add(outcome)

    def worth(self, num_masks: int, price: float) -> Floats:
        """Tokens that 0, 1, ... masks are expected to be worth to the next forward [num_masks + 1].

        Args:
            num_masks: most masks; of a great number, those that anything is known of.
            price: of a verify token, in tokens: a draft that is less probable will not be verified.
        """
        num_others, others = self._history.outcomes.surplus(num_masks, price)
        num_own, own = self._outcomes.surplus(num_masks, price)
        mean = (own + _OTHERS_WEIGHT / num_others * others) / (num_own + _OTHERS_WEIGHT)
        worth = np.zeros(len(mean) + 1)
        np.cumsum(mean, out=worth[1:])
        return worth


@dataclass(frozen=True)
class DraftPlan:
    """What a sequence does in the next forward beside its plain token: drafts to verify, then masks to draft on."""

    drafts: tuple[Draft, ...] = ()
    num_masks: int = 0


NO_DRAFTS = DraftPlan()


@dataclass(frozen=True, eq=False)
class DraftOptions:
    """What a sequence could do; the first option is nothing.

    Attributes:
        gain_O: expected tokens beyond the plain one, later ones included.
        now_O: those of the next forward alone.
        counts_OF: what the forward holds beyond the plain token.
        plans: of each option.
    """

    gain_O: Floats
    now_O: Floats
    counts_OF: Counts
    plans: Sequence[DraftPlan]


def promising(drafts: Iterable[Draft], price: float) -> list[Draft]:
    """The first drafts, as far as verifying them may pay.

    Args:
        drafts: in order; no more of them are looked at than needed.
        price: of a verify token, in tokens.
    """
    found, chain = list[Draft](), 1.0
    for draft in drafts:
        chain *= draft.probability
        if chain <= _PROMISING * price:
            break
        found.append(draft)
    return found


class DraftPrices(NamedTuple):
    """What a token more in the forward costs, in tokens that decoding writes in that time.

    Attributes:
        verify: a verify token.
        mask: a mask beside others.
    """

    verify: float
    mask: float


class Drafting(Protocol):
    """A sequence that may draft.

    Attributes:
        is_drawn: its candidates take all logits.
        may_draft: it has drafts, or can run masks.
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

    def draft_options(self, prices: DraftPrices) -> DraftOptions | None:
        """What may pay at these prices; None: nothing."""
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
    history: DraftHistory = field(default_factory=DraftHistory)

    def __post_init__(self) -> None:
        self._gain = 1.0  # tokens per cost over that without drafts, of late
        self._credit = _MOST_CREDIT  # for probes, in forwards without drafts

    def plan(self, sequences: Sequence[Drafting], num_beside: int = 0, num_running: int = 0) -> None:
        """Tell each sequence what to do in the next forward.

        Args:
            sequences: one plain token each.
            num_beside: other tokens of the forward.
            num_running: sequences, of this forward or not, that share the engine's time; at least these.
        """
        able = [sequence for sequence in sequences if sequence.may_draft]
        if not able:
            return
        count, drawn = len(sequences), sum(sequence.is_drawn for sequence in sequences)
        plain_F, running = np.array([count + num_beside, 0, drawn]), max(count, num_running)
        usual = running - count - num_beside
        counts_KF = plain_F + np.array([[usual, 0, 0], [0, 0, 0], [_PRICED * count, 0, 0], [1, 1, 0], [2, 2, 0]])
        base, plain, dearer, one_mask, two_masks = self.costs.relative(counts_KF).tolist()
        rate = self._gain * running / base
        prices = DraftPrices(rate * (dearer - plain) / (_PRICED * count), rate * (two_masks - one_mask))
        options = list[tuple[Drafting, DraftOptions]]()
        for sequence in able:
            sequence.follow_plan(NO_DRAFTS)
            if (each := sequence.draft_options(prices)) is not None:
                options.append((sequence, each))
        chosen = choose([each for _, each in options], self.costs, plain_F, rate)
        planned_F, gained = plain_F.copy(), 0.0
        for (sequence, each), option in zip(options, chosen, strict=True):
            sequence.follow_plan(each.plans[option])
            planned_F += each.counts_OF[option]
            gained += float(each.now_O[option])
        if not num_beside:
            gain = max(1.0, (1 + gained / count) * plain / float(self.costs.relative(planned_F[None])[0]))
            self._gain = _RATE_MEMORY * self._gain + (1 - _RATE_MEMORY) * gain
        self._probe(able, planned_F, base)

    def _probe(self, sequences: Sequence[Drafting], planned_F: Counts, base: float) -> None:
        """Let the sequence that has waited longest run a mask, if the credit pays for it."""
        self._credit = min(self._credit + _SHARE_OF_PROBES, _MOST_CREDIT)
        waiting = [sequence for sequence in sequences if sequence.wants_probe]
        if waiting:
            before, after = self.costs.relative(np.array([planned_F, planned_F + _ONE_MASK])).tolist()
            if (after - before) / base <= self._credit:
                max(waiting, key=lambda sequence: sequence.num_idle).probe()
                self._credit -= (after - before) / base


def choose(options: Sequence[DraftOptions], costs: ForwardCosts, plain_F: Counts, rate: float) -> list[int]:
    """An option for each sequence, so that `gain - rate * cost` of the forward is greatest.

    One sequence at a time changes its option, as gains most for what it costs, until no change is for the better: from
    everybody's doing nothing, and from what would be best if all did alike, as where a fixed cost is shared. The better end
    counts; for one sequence it is the maximum.

    Args:
        options: of each sequence.
        costs: of the forward.
        plain_F: the forward in which nobody drafts.
        rate: tokens per cost.
    """
    if not options:
        return []
    count = len(options)
    climb = _Climb(options, costs, plain_F, rate)
    starts = [[0] * count]
    if count > 1:
        starts.append([
            int(np.argmax(count * each.gain_O - rate * costs.relative(plain_F + count * each.counts_OF))) for each in options
        ])  # fmt: skip
    return max((climb(start) for start in starts), key=lambda end: end[0])[1]


class _Climb:
    """Changes one option at a time. Legend: K options of all sequences together, S sequences."""

    def __init__(self, options: Sequence[DraftOptions], costs: ForwardCosts, plain_F: Counts, rate: float) -> None:
        self._costs, self._plain_F, self._rate = costs, plain_F, rate
        self._gain_K = np.concatenate([each.gain_O for each in options])
        self._counts_KF = np.concatenate([each.counts_OF for each in options])
        sizes = [len(each.gain_O) for each in options]
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
            best = int(np.argmax(np.where(better_K, more_K / np.maximum(dearer_K, 1e-9), -np.inf)))
            chosen_S[self._owner_K[best]] = best
        total_F = self._plain_F + self._counts_KF[chosen_S].sum(0)
        value = self._gain_K[chosen_S].sum() - self._rate * self._costs.relative(total_F[None])[0]
        return float(value), (chosen_S - self._first_S).tolist()
