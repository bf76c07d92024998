"""Acceptance of drafts, estimated from what requests show: by kind of draft, by request, and for all requests of a model.

Owns the estimates and what they are made of. What is drafted for how much, `engine.drafting` decides; where the estimates are
kept, `engine.draft_statistics`.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate, islice, takewhile
from operator import mul
from typing import Any, Literal, NamedTuple

Source = Literal["masks", "lookup", "ngrams"]
Key = tuple[Source, int, int]

_STRENGTH = 4.0
"""Observations that a prior is worth."""
_MEMORY, _LONG_MEMORY = 0.95, 0.997
"""Of a request's observations and of those of all requests, what counts after one more."""
_NOTHING_SEEN = (0.0, 0.0, 0.0, 0.0)
_HIGHEST, _LEAST_GAIN = 0.98, 0.1
"""Probability of the surest draft, and tokens that it must gain for sequences to be asked for drafts: asking takes time too."""
_LONGEST = 32
"""Distances for which the worth of masks is kept."""
_NUM_JUDGED, _PAYING_PRIOR, _PAYING_MEMORY = 2, (0.1, 2.0), 0.98
"""Runs of masks after which a request shows whether masks pay; of (paying requests, requests), what is taken to have been seen;
and of the requests, what counts after one more."""
_PAYING_GAIN, _FORESEEN = 0.25, 48
"""What masks gain for each token where they pay, and most tokens that an answer is counted on to have."""
_UNLIKELY = 0.02
"""Of drafts of text, and all before them: those that no price lets be verified."""
_UNTRIED = 0.8
"""Of the probability of another draft, where no mask has been run so far ahead."""
_FIRST_OUTCOME = 0.3
"""Until masks have shown what they draft: the probability of each draft, those before it being accepted."""
_NUM_OWN, _NUM_OTHERS, _OTHERS_WEIGHT = 8, 64, 2.0
_COUNTED_ON, _PRICE_STEP = 0.7, 0.05
"""Of what masks were worth, what is counted on: text may draft the same again. And what prices are rounded to for their worth,
which takes long to add up."""
_PROMISING = 0.9
"""Drafts less probable than this share of the price of a verify token are no option: the price is a mean."""


class DraftPrices(NamedTuple):
    """What a token more in the forward costs, in tokens that decoding writes in that time.

    Attributes:
        verify: a verify token, on average over some.
        mask: a mask beside others.
        first_mask: a mask where there is no other.
        first_verify: the first verify token.
    """

    verify: float
    mask: float
    first_mask: float
    first_verify: float

    @property
    def drafts_may_pay(self) -> bool:
        """Whether the surest draft gains enough by being verified to look for it; else nothing need be known of drafts."""
        return _HIGHEST - min(self.first_verify, self.verify) > _LEAST_GAIN

    @property
    def masks_may_pay(self) -> bool:
        """Whether a mask might whose draft is the surest."""
        return _HIGHEST - min(self.first_verify, self.verify) > min(self.mask, self.first_mask)


class Draft(NamedTuple):
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


class Outcome(NamedTuple):
    """What masks drafted once: of each draft, the probability that it and all before it are accepted.

    Attributes:
        masks: of the masks' drafts, `_LONGEST`.
        text: of the drafts that text gave at the same place, without masks.
    """

    masks: tuple[float, ...]
    text: tuple[float, ...] = ()

    def surplus(self, price: float) -> list[float]:
        """What each draft of the masks exceeds the price by, less its part of what text would have been worth anyway."""
        own, text = ([chain - price for chain in chains if chain > price] for chains in self)
        total = sum(own)
        share = max(0.0, 1 - sum(text) / total) if own else 0.0
        return [share * each for each in own]


class Outcomes:
    """The last times that masks were run.

    Args:
        size: how many are kept.
    """

    def __init__(self, size: int) -> None:
        self.kept: deque[Outcome] = deque(maxlen=size)
        self._sums: tuple[float, list[float]] = (-1.0, [])

    def add(self, outcome: Outcome) -> None:
        """One more; the oldest is forgotten."""
        self.kept.append(outcome)
        self._sums = (-1.0, [])

    def surplus(self, distance: int, price: float) -> float:
        """The sum over the outcomes of what a draft was worth, the price being rounded to `_PRICE_STEP`."""
        price = _PRICE_STEP * round(price / _PRICE_STEP)
        known, sums = self._sums  # engines in other threads may add outcomes meanwhile
        if known != price:
            sums = [0.0] * _LONGEST
            for outcome in list(self.kept):
                for i, surplus in enumerate(outcome.surplus(price)):
                    sums[i] += surplus
            self._sums = (price, sums)
        return sums[distance]


class DraftHistory:
    """What the requests of a model have shown of drafts: the prior of the next request."""

    def __init__(self) -> None:
        self.counts: dict[Key, tuple[float, float]] = {}
        self.paying = _PAYING_PRIOR  # requests that masks have paid for, and all
        self.outcomes = Outcomes(_NUM_OTHERS)
        self.outcomes.add(Outcome(tuple(_FIRST_OUTCOME ** (1 + i) for i in range(_LONGEST))))

    def probability(self, key: Key, prior: float) -> float:
        """Of acceptance, from all requests."""
        accepted, seen = self.counts.get(key, (0.0, 0.0))
        return (accepted + _STRENGTH * prior) / (seen + _STRENGTH)

    def record(self, key: Key, accepted: bool) -> None:
        """A draft of this kind, all before it being accepted, turned out right or wrong."""
        before, seen = self.counts.get(key, (0.0, 0.0))
        self.counts[key] = _LONG_MEMORY * before + accepted, _LONG_MEMORY * seen + 1

    def record_request(self, pays: bool) -> None:
        """Whether masks pay for a request, by its first runs of them."""
        paying, total = self.paying
        self.paying = _PAYING_MEMORY * paying + pays, _PAYING_MEMORY * total + 1

    def state(self) -> dict[str, Any]:
        """What has been seen, for JSON."""
        return {
            "counts": [[*key, *seen] for key, seen in list(self.counts.items())],
            "outcomes": [
                [[round(probability, 3) for probability in chain] for chain in outcome] for outcome in list(self.outcomes.kept)
            ],
            "paying": list(self.paying),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Start from what has been seen before.

        Raises:
            KeyError, TypeError, ValueError: this is no such state; nothing has changed.
        """
        counts = {
            (_source(source), int(kind), int(distance)): _share(accepted, seen)
            for source, kind, distance, accepted, seen in state["counts"]
        }
        outcomes = [
            Outcome(*(tuple(_share(probability, 1.0)[0] for probability in chain) for chain in chains))
            for chains in state["outcomes"]
        ]
        paying, total = state["paying"]
        paying = _share(paying, total)
        if not outcomes or any(len(outcome.masks) != _LONGEST or len(outcome.text) > _LONGEST for outcome in outcomes):
            raise ValueError(f"outcomes must have {_LONGEST} probabilities each, and at most as many of text")
        self.counts, self.paying = counts, paying
        for outcome in outcomes:
            self.outcomes.add(outcome)


def _source(name: object) -> Source:
    if name == "masks" or name == "lookup" or name == "ngrams":
        return name
    raise ValueError(f"a source of drafts is {name!r}; it must be masks, lookup or ngrams")


def _share(part: Any, whole: Any) -> tuple[float, float]:
    """A part of something as numbers."""
    part, whole = float(part), float(whole)
    if not 0 <= part <= whole < math.inf:
        raise ValueError(f"{part} of {whole} has been seen; it must lie in [0, {whole}]")
    return part, whole


class DraftEstimates:
    """A request's own view: acceptance and the worth of masks, starting from what other requests have shown.

    Args:
        history: shared by the requests of a model.
    """

    def __init__(self, history: DraftHistory) -> None:
        self._history = history
        self._sums: dict[Source, tuple[float, float, float, float]] = {}  # accepted, expected to be, rejected, expected to be
        self._outcomes = Outcomes(_NUM_OWN)
        self._prices: DraftPrices | None = None  # by which it is seen whether masks pay, until that is known

    def draft(self, token: int, key: Key, prior: float) -> Draft:
        """A draft with its probability: the prior as all requests correct it, and the odds as this request does."""
        probability = min(self._history.probability(key, prior), _HIGHEST)
        accepted, expected, rejected, feared = self._sums.get(key[0], _NOTHING_SEEN)
        odds = probability / (1 - probability) * ((accepted + _STRENGTH) / (expected + _STRENGTH))
        odds *= (feared + _STRENGTH) / (rejected + _STRENGTH)
        return Draft(token, min(odds / (1 + odds), _HIGHEST), key, prior)

    def record(self, key: Key, prior: float, accepted: bool) -> None:
        """A draft of this kind, all before it being accepted, turned out right or wrong, whether it was verified or not."""
        likely = self._history.probability(key, prior)
        before, expected, rejected, feared = self._sums.get(key[0], _NOTHING_SEEN)
        self._sums[key[0]] = (
            _MEMORY * before + accepted,
            _MEMORY * expected + likely,
            _MEMORY * rejected + (not accepted),
            _MEMORY * feared + 1 - likely,
        )
        self._history.record(key, accepted)

    def record_masks(self, drafts: Sequence[Draft], num_masks: int, text: Iterable[Draft] = ()) -> None:
        """So many masks (at least one) have been run, and these drafts were kept, where text gives those."""
        count = min(num_masks, _LONGEST)
        chain = list(accumulate((draft.probability for draft in drafts[:count]), mul))
        if len(chain) == count:  # more masks might have drafted on as well
            step = _UNTRIED * chain[-1] ** (1 / count)
            chain += [chain[-1] * step**i for i in range(1, _LONGEST - count + 1)]
        likely = takewhile(lambda probability: probability > _UNLIKELY, accumulate((draft.probability for draft in text), mul))
        outcome = Outcome((*chain, *[0.0] * (_LONGEST - len(chain))), tuple(islice(likely, _LONGEST)))
        self._outcomes.add(outcome)
        self._history.outcomes.add(outcome)
        if self._prices is not None and len(self._outcomes.kept) == _NUM_JUDGED:
            price, least = self._prices.verify, self._prices.first_mask
            self._history.record_request(self._outcomes.surplus(0, price) > _NUM_JUDGED * least)
            self._prices = None

    def worth(self, num_masks: int, prices: DraftPrices, room: int) -> list[float]:
        """Tokens that 0, 1, ... masks are expected to be worth to the next forward, as far as one more may pay.

        A request whose kind is unknown runs the first ones also for what they tell: if masks pay for it, all that follows is
        written faster.

        Args:
            num_masks: most masks.
            prices: of tokens.
            room: tokens that will be written faster.

        Returns:
            At most num_masks + 1 numbers.
        """
        if not prices.masks_may_pay:
            return [0.0]
        others, num_own = self._history.outcomes, len(self._outcomes.kept)
        share, total, worth = _OTHERS_WEIGHT / len(others.kept), num_own + _OTHERS_WEIGHT, [0.0]
        told = 0.0
        if num_own < _NUM_JUDGED:
            self._prices = prices
            paying, requests = self._history.paying
            told = paying / requests * _PAYING_GAIN * (1 - prices.first_mask) * min(room, _FORESEEN)
        for distance in range(min(num_masks, _LONGEST)):
            own = self._outcomes.surplus(distance, prices.verify)
            more = _COUNTED_ON * (own + share * others.surplus(distance, prices.verify)) / total
            if distance == 0:
                more += max(told, 0.0)
            if more <= (_PROMISING if distance else 1.0) * prices.mask:
                break  # further ones are worth less
            worth.append(worth[-1] + more)
        return worth


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
